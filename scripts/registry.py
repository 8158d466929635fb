#!/usr/bin/env python3
"""What the Comfy Registry wants to know of this pack, checked; and the three facts that only the publisher knows,
written once.

  python scripts/registry.py                                        say what is wrong with pyproject.toml, .comfyignore
                                                                    and CHANGELOG.md
  python scripts/registry.py --publishing                           the same, and that publisher and addresses are
                                                                    filled in
  python scripts/registry.py --publisher ID --repository URL        fill them in: PublisherId, Icon, Banner and the
                                                                    project's addresses
  python scripts/registry.py --changelog                            print what CHANGELOG.md says of this version

Rules from docs.comfy.org/registry/specifications and comfy-cli's parser (1.23). Standard library alone (on Python 3.10
also tomli).
"""

import argparse
import re
import struct
import sys
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
ICON, ICON_LIMIT = "docs/icon.png", (800, 400)
BANNER, BANNER_SHAPE = "docs/banner.png", (21, 9)
ACCELERATORS = (
    "GPU :: NVIDIA CUDA",
    "GPU :: AMD ROCm",
    "GPU :: Intel Arc",
    "NPU :: Huawei Ascend",
    "GPU :: Apple Metal",
)
SYSTEMS = ("OS Independent", "Microsoft", "POSIX", "MacOS")
URLS = {"Repository": "", "Documentation": "#readme", "Bug Tracker": "/issues"}
GITHUB = re.compile(r"https://github\.com/([\w.-]+)/([\w.-]+?)(?:\.git)?/?")
FILL_IN = "python scripts/registry.py --publisher ID --repository https://github.com/OWNER/NAME"


# --- checks: each yields sentences -----------------------------------------------------------------------------------


def problems(data, root=ROOT, publishing=False):
    """Every reason, as a sentence, why the registry would not take this pyproject (parsed) as it is meant."""
    project, comfy = data["project"], data["tool"]["comfy"]
    found = [
        *name_problems(project["name"]),
        *version_problems(project["version"], root),
        *classifier_problems(project["classifiers"]),
        *comfy_problems(comfy, project),
        *icon_problems(root),
    ]
    return found + (list(publisher_problems(project, comfy)) if publishing else [])


def name_problems(name):
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9]*(?:[._-][A-Za-z0-9]+)*", name) or len(name) >= 100:
        yield (
            f"The name {name!r} must be letters and digits, joined by single hyphens, underscores or periods, start "
            "with a letter and be shorter than 100."
        )
    if "comfy" in name.lower():
        yield f"The name {name!r} must not include ComfyUI."


def version_problems(version, root):
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        yield f"The version {version!r} must be X.Y.Z."
    if f"## {version}" not in (root / "CHANGELOG.md").read_text():
        yield f"CHANGELOG.md has no section '## {version}'."


def classifier_problems(classifiers):
    for prefix, valid in (("Operating System :: ", SYSTEMS), ("Environment :: ", ACCELERATORS)):
        values = [c.removeprefix(prefix) for c in classifiers if c.startswith(prefix)]
        if not values:
            yield f"There is no classifier '{prefix.rstrip(': ')}'."
        yield from (
            f"The registry does not know the classifier '{prefix}{value}'."
            for value in values
            if not value.startswith(valid)
        )


def comfy_problems(comfy, project):
    if not comfy.get("DisplayName"):
        yield "[tool.comfy] needs a DisplayName."
    if not re.fullmatch(r"(?:>=|==|<=|~=|!=|>|<)?\d+\.\d+\.\d+", comfy.get("requires-comfyui", "")):
        yield (
            "[tool.comfy] requires-comfyui must be one comparison with a version, such as >=0.30.0: comfy-cli reads "
            "no more than that."
        )
    if not any(project["license"].get(key) for key in ("file", "text")):
        yield "The license must be {file = ...} or {text = ...}."


def icon_problems(root):
    shape = png_shape(root / ICON)
    if not shape or shape[0] > ICON_LIMIT[0] or shape[1] > ICON_LIMIT[1]:
        yield f"{ICON} must be a PNG of at most {ICON_LIMIT[0]} x {ICON_LIMIT[1]} pixels."
    shape = png_shape(root / BANNER)
    if not shape or shape[0] * BANNER_SHAPE[1] != shape[1] * BANNER_SHAPE[0]:
        yield f"{BANNER} must be a PNG, {BANNER_SHAPE[0]} to {BANNER_SHAPE[1]}."


def png_shape(file):
    """(width, height) of a PNG, or None for anything else."""
    header = file.read_bytes()[:24]
    return struct.unpack(">II", header[16:24]) if header[:8] == b"\x89PNG\r\n\x1a\n" else None  # of its first chunk


def publisher_problems(project, comfy):
    if not comfy.get("PublisherId"):
        yield f"PublisherId is empty: create a publisher at registry.comfy.org, then run: {FILL_IN}"
    for name in URLS:
        if not project.get("urls", {}).get(name):
            yield f"There is no {name} address. Run: {FILL_IN}"
    for name in ("Icon", "Banner"):
        if not comfy.get(name, "").startswith("https://"):
            yield f"{name} must be an address. Run: {FILL_IN}"


# --- filling in ------------------------------------------------------------------------------------------------------


def filled(text, publisher, repository, branch="main"):
    """The text of pyproject.toml with publisher and addresses. ValueError where the repository is not an address on
    GitHub.
    """
    found = GITHUB.fullmatch(repository)
    if not found:
        raise ValueError(f"The repository must be https://github.com/OWNER/NAME, not {repository!r}.")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", publisher):
        raise ValueError(f"A publisher id is the name behind the @ on registry.comfy.org, not {publisher!r}.")
    owner, name = found.groups()
    address = f"https://github.com/{owner}/{name}"
    text = set_value(text, "PublisherId", publisher)
    for key, file in (("Icon", ICON), ("Banner", BANNER)):
        text = set_value(text, key, f"https://raw.githubusercontent.com/{owner}/{name}/{branch}/{file}")
    lines = "".join(f'{quoted(key)} = "{address}{rest}"\n' for key, rest in URLS.items())
    return re.sub(r"\[project\.urls\]\n(?:[^\[\n].*\n)*", lambda _: f"[project.urls]\n{lines}", text, count=1)


def set_value(text, key, value):
    changed, count = re.subn(rf'^{key} = ".*?"', lambda _: f'{key} = "{value}"', text, count=1, flags=re.M)
    if not count:
        raise ValueError(f"pyproject.toml has no line '{key} = ...' to fill in.")
    return changed


def quoted(key):
    return f'"{key}"' if " " in key else key


def changelog(version, root=ROOT):
    """The section of a version in CHANGELOG.md, without its heading; "" when there is none."""
    found = re.search(
        rf"^## {re.escape(version)}\b[^\n]*\n(.*?)(?=^## |\Z)", (root / "CHANGELOG.md").read_text(), re.M | re.S
    )
    return found[1].strip() if found else ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--publishing", action="store_true", help="also check what only the publisher knows")
    parser.add_argument("--publisher", metavar="ID", help="the publisher's id on registry.comfy.org")
    parser.add_argument("--repository", metavar="URL", help="https://github.com/OWNER/NAME")
    parser.add_argument("--changelog", action="store_true", help="print the section of this version, and nothing else")
    parser.add_argument("--branch", default="main", help="the branch that the icon's address names")
    options = parser.parse_args()
    if bool(options.publisher) != bool(options.repository):
        parser.error("--publisher and --repository belong together")
    file = ROOT / "pyproject.toml"
    if options.publisher:
        try:
            file.write_text(filled(file.read_text(), options.publisher, options.repository, options.branch))
        except ValueError as error:
            parser.error(str(error))
    if options.changelog:
        print(changelog(tomllib.loads(file.read_text())["project"]["version"]))
        return 0
    found = problems(tomllib.loads(file.read_text()), publishing=options.publishing or bool(options.publisher))
    print("\n".join(found) or "pyproject.toml is what the registry asks for.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
