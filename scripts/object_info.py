#!/usr/bin/env python3
"""What saved workflows rely on: ids, inputs, their order, types, defaults and outputs of every node, as ComfyUI's
/object_info says them.

  python scripts/object_info.py            compare the nodes with tests/data/object_info.json and say what changed
  python scripts/object_info.py --update   write the file anew, on purpose, and say what changed

A saved graph stores widget values by position and API graphs leave out inputs with a default, so inputs may only be
appended, as optional ones. Starts a ComfyUI of its own on the CPU (about 20 seconds) and stops it. Not covered: display
names, tooltips and categories, which may change.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import environment
from comfy_server import DIRECT, ComfyServer

FILE = Path(__file__).resolve().parent.parent / "tests" / "data" / "object_info.json"
PACK_MODULE = "custom_nodes.flux2-attention"
# options that are somebody's files
FILE_ENDINGS = (".safetensors", ".sft", ".ckpt", ".pt", ".bin", ".gguf", ".json", ".txt", ".png", ".jpg")
VALUES = ("default", "min", "max")
HOW_TO_UPDATE = "If that is wanted, update the snapshot on purpose: python scripts/object_info.py --update"


def fetch(url):
    """The pack's part of /object_info of the ComfyUI at `url`, reduced to what saved workflows rely on."""
    with DIRECT.open(f"{url}/object_info", timeout=60) as answer:
        known = json.load(answer)
    return {name: contract(info) for name, info in sorted(known.items()) if info.get("python_module") == PACK_MODULE}


def contract(info):
    """{"inputs": [{name, kind, type, ...}] in the order of the widgets, "outputs": [[type, is a list]], "output_node"}
    of one node.
    """
    inputs = [
        entry(name, kind, info["input"][kind][name])
        for kind in ("required", "optional")
        for name in info["input_order"].get(kind, [])
    ]
    return {
        "inputs": inputs,
        "outputs": [list(pair) for pair in zip(info["output"], info["output_is_list"])],
        "output_node": info["output_node"],
    }


def entry(name, kind, spec):
    """One input. Options that are names of files on a machine are left out."""
    type_, options = spec[0], spec[1] if len(spec) > 1 else {}
    if isinstance(type_, list):  # a list of options in the place of the type is the older way to write a combo
        type_, options = "COMBO", {**options, "options": type_}
    found = {"name": name, "kind": kind, "type": type_, **{key: options[key] for key in VALUES if key in options}}
    if type_ == "COMBO":
        found["options"] = [option for option in options.get("options", []) if not str(option).endswith(FILE_ENDINGS)]
    if str(found.get("default", "")).endswith(FILE_ENDINGS):
        del found["default"]
    return found


# --- what changed ----------------------------------------------------------------------------------------------------


def broken(old, new):
    """Sentences: every change that breaks a saved workflow."""
    gone = [f"The node {name} is gone." for name in old if name not in new]
    return gone + [
        f"{name}: {sentence}" for name in old if name in new for sentence in broken_node(old[name], new[name])
    ]


def broken_node(old, new):
    names, now = [i["name"] for i in old["inputs"]], [i["name"] for i in new["inputs"]]
    if now[: len(names)] != names:
        return [
            (
                f"its inputs were {', '.join(names)} and are {', '.join(now)}; inputs may only be appended at the end, "
                "because graphs store widget values by position."
            )
        ]
    found = [
        sentence for before, after in zip(old["inputs"], new["inputs"]) for sentence in broken_input(before, after)
    ]
    found += [
        f"the new input {i['name']} is required: graphs without it would be refused. Make it optional."
        for i in new["inputs"][len(names) :]
        if i["kind"] == "required"
    ]
    if new["outputs"][: len(old["outputs"])] != old["outputs"]:
        found.append(f"its outputs were {old['outputs']} and are {new['outputs']}; outputs may only be appended.")
    if old["output_node"] != new["output_node"]:
        found.append("whether it is an output node, which decides what runs, has changed.")
    return found


def broken_input(old, new):
    name = old["name"]
    for key in ("type", "default"):
        if old.get(key) != new.get(key):
            yield f"the {key} of its input {name} was {old.get(key)!r} and is {new.get(key)!r}."
    if old["kind"] == "optional" and new["kind"] == "required":
        yield f"its input {name} was optional and is required."
    lost = [option for option in old.get("options", []) if option not in new.get("options", [])]
    if lost:
        yield f"its input {name} no longer has the options {', '.join(map(repr, lost))}."
    if narrower(old, new):
        yield (
            f"the range of its input {name} was {old.get('min')} to {old.get('max')} and is {new.get('min')} to "
            f"{new.get('max')}."
        )


def narrower(old, new):
    return new.get("min", -math.inf) > old.get("min", -math.inf) or new.get("max", math.inf) < old.get("max", math.inf)


def added(old, new):
    """Sentences: what is new or wider, which breaks nothing but is not in the snapshot yet."""
    nodes = [f"The node {name} is new." for name in new if name not in old]
    return nodes + [
        f"{name} has changed in a way that breaks no saved workflow."
        for name in old
        if name in new and new[name] != old[name] and not broken_node(old[name], new[name])
    ]


def snapshot():
    return json.loads(FILE.read_text()) if FILE.is_file() else {}


def write(found):
    """One input a line: a change of the file then reads as what changed."""
    lines = []
    for name, node in found.items():
        inputs = ",\n".join("    " + json.dumps(i) for i in node["inputs"])
        lines.append(
            f'{json.dumps(name)}: {{"inputs": [\n{inputs}],\n  "outputs": {json.dumps(node["outputs"])}, '
            f'"output_node": {json.dumps(node["output_node"])}}}'
        )
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--update", action="store_true", help="write tests/data/object_info.json anew")
    update = parser.parse_args().update
    with ComfyServer(environment.comfyui(environment.cache_folder()), arguments=["--cpu"]) as server:
        found = fetch(server.url)
    breaks, news = broken(snapshot(), found), added(snapshot(), found)
    print("\n".join(breaks + news) or "Nothing has changed.")
    if update:
        write(found)
        print(f"Written: {FILE.name}, {len(found)} nodes.")
    elif breaks or news:
        print(HOW_TO_UPDATE)
    return 1 if breaks and not update else 0


if __name__ == "__main__":
    sys.exit(main())
