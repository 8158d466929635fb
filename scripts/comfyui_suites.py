#!/usr/bin/env python3
"""Run ComfyUI's own test suites, tests-unit and tests/execution, without this pack and with it, and compare the
outcome of every test.

  python scripts/comfyui_suites.py --install           also install what the suites need beside ComfyUI, into a folder
                                                       of its own in the cache
  python scripts/comfyui_suites.py --suite tests-unit  one suite
  python scripts/comfyui_suites.py --json result.json  write the counts and all differences

The suites run in a temporary copy of ComfyUI (without its models), where they write their databases and pictures; with
the pack, it is linked into the copy's custom_nodes/. ComfyUI's own folder is only read. A test whose outcome differs is
run again, alone, on both sides: some of them depend on time. The status is 1 when a difference stays. About ten minutes
on two cores. Not covered: tests/inference, which needs models and a GPU.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from collections import Counter
from pathlib import Path

import environment
from comfy_server import PACK, ROOT, free_port

# with options; servers of the second one want a port too
SUITES = {"tests-unit": (), "tests/execution": ("--skip-timing-checks",)}
NEEDED = ("pytest-aiohttp", "pytest-asyncio", "websocket-client", "opencv-python-headless")
# of those that are copied from models/, input/ and output/: their placeholders and examples, not somebody's models
LARGEST_FILE = 4 * 2**20
SECONDS = 3600
PLUGINS, PATIENCE = "suite_plugins", "patient_servers"
SIDES = {"without": False, "with": True}


def copy_comfyui(source, target):
    """ComfyUI's folder without its history, its custom nodes and large files."""

    def skipped(folder, names):
        path = Path(folder)
        top = path == source
        own = {"custom_nodes", ".git", "user", "temp"} if top else set()
        data = path.is_relative_to(source) and path.relative_to(source).parts[:1] in (
            ("models",),
            ("input",),
            ("output",),
        )
        return [
            name
            for name in names
            if name in own or data and (path / name).is_file() and (path / name).stat().st_size > LARGEST_FILE
        ]

    shutil.copytree(source, target, ignore=skipped, symlinks=True)
    (target / "custom_nodes").mkdir()
    (target / PLUGINS).mkdir()
    shutil.copy(Path(__file__).with_name(f"{PATIENCE}.py"), target / PLUGINS)


def install(cache):
    """The folder with what the suites need; made once. Nothing in the environment changes."""
    folder = cache / f"suites-{hashlib.sha256(' '.join((*NEEDED, sys.version)).encode()).hexdigest()[:12]}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=cache) as fresh:
            environment.run(
                [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", f"{fresh}/made", *NEEDED],
                "installing what the suites need",
            )
            Path(f"{fresh}/made").rename(folder)
    return folder


def run(comfyui, suite, tests, extra):
    """{test: outcome} of one pytest run of files of a suite in a copy of ComfyUI. Raises SystemExit where pytest itself
    could not run.
    """
    report = comfyui / "junit.xml"
    report.unlink(missing_ok=True)
    paths = os.pathsep.join(filter(None, (str(comfyui / PLUGINS), extra and str(extra), os.environ.get("PYTHONPATH"))))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        PATIENCE,
        f"--junitxml={report}",
        *(SUITES[suite] and (*SUITES[suite], "--port", str(free_port()))),
        *tests,
    ]
    child = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": paths,
    }
    with open(comfyui / "suite.log", "ab") as log:
        done = subprocess.run(
            command,
            cwd=comfyui,
            env=child,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=SECONDS,
        )
    if not report.is_file():
        raise SystemExit(
            f"suites: pytest ended with status {done.returncode} and no report. The end of its "
            f"log:\n{tail(comfyui / 'suite.log')}"
        )
    return outcomes(report)


def tail(file, lines=30):
    return "\n".join(file.read_text(errors="replace").splitlines()[-lines:])


def outcomes(report):
    """{name: passed, failed, error or skipped} of a JUnit report."""
    found = {}
    for case in xml.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        name = f"{case.get('classname')}::{case.get('name')}"
        found[name] = next((kind for kind in ("error", "failure", "skipped") if kind in kinds), "passed")
    return found


def differences(without, with_pack):
    """{test: [outcome without, outcome with]} where they differ; None for a test that is not there."""
    return {
        name: [without.get(name), with_pack.get(name)]
        for name in sorted({*without, *with_pack})
        if without.get(name) != with_pack.get(name)
    }


def file_of(name, comfyui):
    """The file of a test of a JUnit report: its class name is a dotted path, perhaps with classes behind."""
    parts = name.split("::")[0].split(".")
    return next(
        (
            str(file)
            for n in range(len(parts), 0, -1)
            if (comfyui / (file := Path(*parts[:n]).with_suffix(".py"))).is_file()
        ),
        None,
    )


def compare(suite, copies, extra):
    """The result of one suite: counts per side, and the differences that stay when their files are run again."""
    found = {side: run(copies[side], suite, [suite], extra) for side in SIDES}
    changed = differences(found["without"], found["with"])
    again = sorted({file for name in changed if (file := file_of(name, copies["with"]))})
    if again:
        say(f"{suite}: {len(changed)} tests differ, running their files again: {', '.join(again)}")
        second = {side: run(copies[side], suite, again, extra) for side in SIDES}
        changed = {
            name: pair for name, pair in changed.items() if second["without"].get(name) != second["with"].get(name)
        }
    return {
        "suite": suite,
        **{side: dict(Counter(found[side].values())) for side in SIDES},
        "differences": changed,
        "failed_without": sorted(name for name, outcome in found["without"].items() if outcome in ("failure", "error")),
    }


def say(text):
    print(text, file=sys.stderr, flush=True)


def as_text(result):
    sides = "; ".join(
        f"{side} the pack: " + ", ".join(f"{n} {kind}" for kind, n in sorted(result[side].items())) for side in SIDES
    )
    same = (
        "every test ends alike"
        if not result["differences"]
        else "they differ in "
        + ", ".join(f"{name} ({before} -> {after})" for name, (before, after) in result["differences"].items())
    )
    return f"{result['suite']}: {sides}; {same}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--suite", action="append", choices=list(SUITES), help="one suite; may be repeated; all by default"
    )
    parser.add_argument(
        "--install", action="store_true", help="install what the suites need into a folder of its own in the cache"
    )
    parser.add_argument("--json", metavar="FILE", help="write the result to this file too")
    options = parser.parse_args()
    cache = environment.cache_folder()
    source, extra = environment.comfyui(cache), install(cache) if options.install else None
    with tempfile.TemporaryDirectory(prefix="flux2-suites-") as folder:
        copies = {side: Path(folder) / side for side in SIDES}
        for side, pack in SIDES.items():
            copy_comfyui(source, copies[side])
            if pack:
                (copies[side] / "custom_nodes" / PACK).symlink_to(ROOT)
        results = []
        for suite in options.suite or SUITES:
            say(f"{suite}: running without the pack, then with it")
            results.append(compare(suite, copies, extra))
            print(as_text(results[-1]), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1) + "\n")
    return 1 if any(result["differences"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
