"""A measurement as a file in ComfyUI's output folder."""

import contextlib
import itertools
import json
import os
import time

import folder_paths


def save(data):
    """Write a benchmark into ComfyUI's output folder and say where. A disk that refuses costs only the file: what was
    measured is on the node.
    """
    try:
        return f"Saved as {write_json(data)} in ComfyUI's output folder."
    except OSError as error:
        return (
            f"The JSON file could not be saved in ComfyUI's output folder: {error.strerror or error}. Make room or "
            "give ComfyUI the right to write there."
        )


def write_json(data):
    """A new file in the output folder, never in the place of another one (two ComfyUI may share it); returns its path
    below that folder.
    """
    folder, stamp = "flux2_attention", time.strftime("%Y%m%d-%H%M%S")
    os.makedirs(os.path.join(folder_paths.get_output_directory(), folder), exist_ok=True)
    for again in itertools.count(1):
        name = os.path.join(folder, f"benchmark-{stamp}{f'-{again}' if again > 1 else ''}.json")
        try:
            handle = open(os.path.join(folder_paths.get_output_directory(), name), "x", encoding="utf-8")
        except FileExistsError:
            continue
        try:
            with handle:
                json.dump(data, handle, indent=1)
            return name
        except OSError:  # a full disk: half of a result is no file
            with contextlib.suppress(OSError):
                os.remove(handle.name)
            raise
