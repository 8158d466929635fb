#!/usr/bin/env python3
"""Keep locales/ in step with the nodes: English comes from the schemas, translations are kept, what is missing or
outdated is listed.

  python scripts/make_locales.py                  write locales/en/nodeDefs.json, backend lists in all languages,
                                                  locales/state.json
  python scripts/make_locales.py --check          write nothing
  python scripts/make_locales.py --accept zh      zh's texts were looked at and still fit the English ones

The status is 1 when a language lacks a text, has one of a node that is gone, or has one whose English changed since.
Without --server a headless ComfyUI is started to ask for the nodes. ComfyUI merges
locales/<language>/{nodeDefs,main,commands,settings}.json into its page; only nodeDefs.json is made here, the others are
the same in all languages as far as their keys go. Values of combos are stored in workflows and have no translation.
"""

import argparse
import hashlib
import json
import re
import sys

import environment
from comfy_server import DIRECT, ROOT, ComfyServer

FOLDER = ROOT / "locales"
ENGLISH, LANGUAGES = "en", ("zh", "ja", "ko", "fr", "es", "ru")
NODES, OTHERS = "nodeDefs.json", ("main.json", "commands.json", "settings.json")
# {key: {language: marks of the English text and of its translation}}; ComfyUI reads the folders below locales/ only
STATE = "state.json"
SELECTOR = "Flux2SelectAttention"  # a node of this pack; its input `backend` lists every slug


# --- texts -----------------------------------------------------------------------------------------------------------


def english(info):
    """{node id: what the page shows of it} from ComfyUI's /object_info, in the shape of nodeDefs.json."""
    pack = info[SELECTOR]["python_module"]
    return {name: node_texts(entry) for name, entry in sorted(info.items()) if entry["python_module"] == pack}


def node_texts(entry):
    found = {"display_name": entry["display_name"], "description": entry["description"], "inputs": {}, "outputs": {}}
    for name, (_, *options) in (
        item for kind in ("required", "optional") for item in entry["input"].get(kind, {}).items()
    ):
        said = options[0] if options else {}
        found["inputs"][name.replace(".", "_")] = {
            "name": said.get("display_name") or name,
            "tooltip": said.get("tooltip") or "",
        }
    kinds = entry["output"]
    for number, (kind, name, tooltip) in enumerate(
        zip(kinds, entry["output_name"], entry.get("output_tooltips") or [""] * len(kinds))
    ):
        # an output named like its type is translated by ComfyUI itself
        found["outputs"][str(number)] = ({} if name == kind else {"name": name}) | {"tooltip": tooltip or ""}
    return found


def flat(tree, path=()):
    """{"Node.inputs.name.tooltip": text} of a tree of texts."""
    if not isinstance(tree, dict):
        return {".".join(path): tree}
    return {key: text for name, branch in tree.items() for key, text in flat(branch, (*path, name)).items()}


def tree(texts):
    """The inverse of flat."""
    made = {}
    for key, text in texts.items():
        *path, last = key.split(".")
        branch = made
        for name in path:
            branch = branch.setdefault(name, {})
        branch[last] = text
    return made


# --- lists of backends: the same in every language, and nothing that a translator must touch --------------------------


def slugs(info):
    return info[SELECTOR]["input"]["required"]["backend"][1]["options"]


def runs(names):
    """A pattern that matches enumerations of two or more slugs."""
    one = "(?:" + "|".join(sorted(map(re.escape, names), key=len, reverse=True)) + ")(?![\\w-])"
    return re.compile(rf"(?<![\w-]){one}(?:, {one})+")


def with_runs_of(source, text, pattern):
    """The text with its enumerations replaced by those of the English source; unchanged where their numbers differ."""
    wanted = pattern.findall(source)
    if len(wanted) != len(pattern.findall(text)):
        return text
    rest = iter(wanted)
    return pattern.sub(lambda _: next(rest), text)


def mark(text, pattern):
    """Short name of a text, the same when only its enumerations of backends differ."""
    return hashlib.sha256(pattern.sub("{backends}", text).encode()).hexdigest()[:8]


# --- a language ------------------------------------------------------------------------------------------------------


def brought_up_to_date(source, known, state, pattern, accept=False):
    """(texts, state, problems) of one language.

    source, known: {key: text} in English and in the language. state: {key: "mark of English, mark of translation"} from
    the last time; a translation that was edited since counts as done anew.
    """
    texts, after, problems = {}, {}, []
    for key, text in source.items():
        if not known.get(key):
            problems += [f"missing: {key}: {text}"] if text else []
            continue
        texts[key] = with_runs_of(text, known[key], pattern)
        now, before = (mark(text, pattern), mark(texts[key], pattern)), tuple(state.get(key, "").split())
        outdated = before and before[0] != now[0] and before[1] == now[1] and not accept
        problems += [f"outdated: {key}: {text}"] if outdated else []
        after[key] = " ".join(before if outdated else now)
    return texts, after, problems + [f"stale: {key}" for key in known if key not in source]


def other_problems(folder, language):
    """What main.json, commands.json and settings.json of a language lack or have too much, compared with the English
    ones.
    """
    problems = []
    for name in OTHERS:
        wanted, found = (set(flat(read(folder / code / name))) for code in (ENGLISH, language))
        problems += [f"missing: {name}: {key}" for key in sorted(wanted - found)] + [
            f"stale: {name}: {key}" for key in sorted(found - wanted)
        ]
    return problems


def update(info, folder=FOLDER, accept=(), write=True):
    """Bring a folder of locales up to date with ComfyUI's /object_info. Returns {language: [problem]}."""
    source, pattern, problems = flat(english(info)), runs(slugs(info)), {}
    before, after = read(folder / STATE), {key: {} for key in source}
    if write:
        save(folder / ENGLISH / NODES, tree(source))
    elif flat(read(folder / ENGLISH / NODES)) != source:
        problems[ENGLISH] = ["outdated: nodeDefs.json does not say what the nodes say"]
    for language in LANGUAGES:
        known = flat(read(folder / language / NODES))
        marks = {key: those[language] for key, those in before.items() if language in those}
        texts, marks, found = brought_up_to_date(source, known, marks, pattern, language in accept)
        for key, pair in marks.items():
            after[key][language] = pair
        if not write and texts != {key: known[key] for key in texts}:
            found.append("outdated: a list of backends")
        if write and texts:
            # a translator may still want it: reported, not thrown away
            stale = {key: known[key] for key in known if key not in source}
            save(folder / language / NODES, tree({**texts, **stale}))
        problems[language] = found + other_problems(folder, language)
    if write:
        save(folder / STATE, after)
    return {language: found for language, found in problems.items() if found}


# --- files -----------------------------------------------------------------------------------------------------------


def read(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def save(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def nodes_of(url):
    """ComfyUI's /object_info. SystemExit with a sentence when nothing answers there."""
    try:
        with DIRECT.open(f"{url.rstrip('/')}/object_info", timeout=60) as answer:
            return json.load(answer)
    except (OSError, ValueError) as error:
        raise SystemExit(f"make_locales: {url} does not answer as ComfyUI does ({error}).") from None


def parse(arguments=None):
    parser = argparse.ArgumentParser(prog="make_locales", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument(
        "--accept", action="append", default=[], choices=LANGUAGES, help="a language whose outdated texts still fit"
    )
    parser.add_argument("--server", help="URL of a running ComfyUI with this pack; without it one is started")
    return parser.parse_args(arguments)


def main():
    args = parse()
    if args.server:
        info = nodes_of(args.server)
    else:
        with ComfyServer(environment.comfyui(environment.cache_folder())) as server:
            info = nodes_of(server.url)
    problems = update(info, accept=args.accept, write=not args.check)
    for language, found in problems.items():
        print(f"{language}: {len(found)}", *found, sep="\n  ")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
