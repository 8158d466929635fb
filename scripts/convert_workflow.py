#!/usr/bin/env python3
"""Make a FLUX.2 workflow use the nodes of this pack, and back again.

  python scripts/convert_workflow.py FILE [-o OUT] [--backend auto]     replace its loaders, put Select Attention behind
                                                                        the model
  python scripts/convert_workflow.py FILE --undo [-o OUT]               the loaders that were there before

Takes what ComfyUI's page saves, subgraphs and ComfyUI's own templates included, and API workflows. Loaders that are not
FLUX.2's stay, and it says why. Without -o the result is written beside FILE, with -attention (undone: -original) in its
name. Standard library alone. Not covered: workflows inside pictures (open the picture in ComfyUI and save), checkpoint
loaders and loaders of other packs.
"""

import argparse
import importlib.util
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import pack  # noqa: E402, F401
from flux2_pack.flux2.workflows.convert import NotConvertible, convert, undo  # noqa: E402

SUFFIXES = {False: "-attention", True: "-original"}  # undone or not


def parse(arguments=None):
    parser = argparse.ArgumentParser(prog="convert_workflow", description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="a workflow: JSON that ComfyUI saved or exported")
    parser.add_argument(
        "-o", "--output", help="where to write the result; - is the standard output (default: beside FILE)"
    )
    parser.add_argument("--undo", action="store_true", help="go back to the loaders that a conversion replaced")
    parser.add_argument("--backend", default="auto", help="as in the node Select Attention (default auto)")
    parser.add_argument(
        "--node",
        action="append",
        default=[],
        metavar="ID",
        help="this loader is FLUX.2's although nothing says so; may be given again",
    )
    return parser.parse_args(arguments)


def check_backend(slug):
    """NotConvertible for a name that no backend has, where PyTorch is there to ask the pack; else ComfyUI says it when
    the graph runs.
    """
    if slug == "auto" or importlib.util.find_spec("torch") is None:
        return
    from flux2_pack.attention import registry

    if slug not in registry.SLUGS:
        raise NotConvertible(f"There is no attention backend {slug!r}. The backends are: {', '.join(registry.SLUGS)}.")


def read(path):
    """(text with its own ends of lines, data). NotConvertible when there is no JSON."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        return text, json.loads(text)
    except OSError as error:
        raise NotConvertible(f"{path} cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise NotConvertible(
            f"{path} is not a workflow: a JSON file was expected ({error}). "
            "To convert a picture, open it in ComfyUI and save the workflow."
        ) from None


def in_the_style_of(text, data):
    """JSON with the indentation, spacing, ends of lines and escapes of another JSON text."""
    indent = re.match(r"\s*\{\r?\n([ \t]+)\"", text)
    separators = (",", ": " if '": ' in text else ":") if indent else ((", ", ": ") if '": ' in text else (",", ":"))
    written = json.dumps(
        data, indent=indent and indent[1], separators=separators, ensure_ascii=text.isascii() and "\\u" in text
    )
    # JSON has no ends of lines inside its strings
    return (written + "\n" * text.endswith("\n")).replace("\n", "\r\n" if "\r\n" in text else "\n")


def target(path, output, undone):
    """The file to write, or None for the standard output. NotConvertible when a file that nobody named is in the
    way.
    """
    if output == "-":
        return None
    if output:
        return Path(output)
    path = path.with_name(f"{path.stem.removesuffix(SUFFIXES[not undone])}{SUFFIXES[undone]}{path.suffix}")
    if path.exists():
        raise NotConvertible(f"{path} exists already; name the result with -o.")
    return path


def write(path, text):
    """In UTF-8 whatever the console's or system's own encoding is, and with the ends of lines as they are. path: None
    for the standard output.
    """
    data = text.encode("utf-8")
    try:
        path.write_bytes(data) if path else sys.stdout.buffer.write(data)
    except OSError as error:
        raise NotConvertible(f"{path or 'the standard output'} cannot be written ({error.strerror}).") from None


def run(args):
    check_backend(args.backend)
    text, data = read(args.file)
    result, report = undo(data) if args.undo else convert(data, args.backend, args.node)
    out = target(args.file, args.output, args.undo)
    write(out, in_the_style_of(text, result))
    print("\n".join([*report, *([f"wrote {out}"] if out else [])]), file=sys.stderr if out is None else sys.stdout)


def main():
    # a name in another script must not stop a console that cannot show it
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        run(parse())
    except (
        NotConvertible,
        OSError,
        UnicodeEncodeError,
    ) as error:  # the last: half a letter, which JSON can hold and UTF-8 cannot
        raise SystemExit(f"convert_workflow: {error}") from None


if __name__ == "__main__":
    main()
