"""Model folders inside ComfyUI's folders: a diffusers or transformers model is a folder with config.json and
.safetensors files.

Works on lists of names and root paths, so it needs no ComfyUI. In the lists, a folder replaces the files that it is
made of, and no others.
"""

import os
from pathlib import Path, PurePosixPath

from .header import CheckpointError, files_of


def choices(files, roots):
    """What a loader offers: `files` (names relative to the roots, as ComfyUI lists them), with the weights of a model
    folder replaced by the folder.
    """
    inside = {}
    for name in files:
        if name.endswith(".safetensors") and _parent(name):
            inside.setdefault(_parent(name), []).append(name)
    offered = set(files)
    for parent in inside:
        folder = _find(parent, roots, _is_model_folder)
        made_of = files_of(folder) if folder else ()
        if made_of:
            offered -= {name for name in inside[parent] if PurePosixPath(name.replace("\\", "/")).name in made_of}
            offered.add(parent)
    return sorted(offered)


def pipeline_parts(roots, part):
    """Parts of whole diffusers pipelines: "NAME/part" for each folder NAME in `roots` that has model_index.json and
    that part.
    """
    pipelines = (index.parent for root in roots for index in sorted(Path(root).glob("*/model_index.json")))
    return sorted({f"{folder.name}/{part}" for folder in pipelines if _is_model_folder(folder / part)})


def locate(name, there, roots, folder):
    """The path behind a name. Raises CheckpointError naming the file, the folder (ComfyUI's name) that it was looked
    for in, and what is `there`.
    """
    path = _find(name, roots, os.path.lexists) if _is_inside(name) else None
    if path is not None and not os.path.exists(path):
        raise CheckpointError(
            f"{name!r} in the model folder {folder} is a link that points nowhere: what it stood for was moved or "
            f"deleted. Put the file there, or remove the link.",
            "missing-file",
        )
    if path is None:
        offered = (
            f"There are: {', '.join(there[:8])}{' ...' if len(there) > 8 else ''}."
            if there
            else "There is nothing in it yet."
        )
        raise CheckpointError(
            f"There is no {str(name)[:200]!r} in the model folder {folder}. {offered} Choose one of these, or put the "
            f"file there and refresh.",
            "missing-file",
        )
    return path


def _parent(name):
    parent = PurePosixPath(name.replace("\\", "/")).parent
    return "" if str(parent) == "." else str(parent)


def _is_inside(name):
    """Whether a name is that of something inside the root it is joined to, on Windows too ("C:x", "file:stream")."""
    path = PurePosixPath(str(name).replace("\\", "/"))
    return (
        bool(path.parts)
        and not path.is_absolute()
        and ".." not in path.parts
        and ":" not in str(path)
        and "\0" not in str(path)
    )


def _is_model_folder(path):
    return os.path.isfile(Path(path) / "config.json")


def _find(name, roots, test):
    """The first of the paths root/name that passes a test of os.path, which is False for names that no system takes."""
    return next((path for path in (Path(root) / str(name) for root in roots) if test(path)), None)
