"""--summary FILE: what a run of the tests came to, as JSON. conftest.py takes this module in as a plugin.

  bash scripts/test.sh --summary benchmarks/results/tests-h200.json

The file holds one part for the tests on the CPU and one for those on GPUs (devices.py), each with the machine, the
versions, seconds, counts, names of failures with what they say, and the reasons of what was skipped with how many
tests have it. A run writes its own part and keeps the other.
"""

from collections import Counter
import importlib.metadata
import json
from pathlib import Path
import sys
import time

import pytest

from pack import ROOT

PACKAGES = ("pytest", "transformers", "comfy-kitchen", "comfy-aimdo")


def pytest_addoption(parser):
    parser.addoption("--summary", metavar="FILE", help="write what passed, failed and was skipped, and why, as JSON")


def pytest_configure(config):
    if config.option.summary and not hasattr(config, "workerinput"):  # pytest-xdist's workers report to one process
        config.pluginmanager.register(Summary(config.rootpath, Path(config.option.summary)), "flux2-summary")


class Summary:
    """Counts reports of tests and writes `file` when the run ends."""

    def __init__(self, root, file):
        self.root, self.file, self.begun = root, file.resolve(), time.monotonic()
        self.passed, self.failed, self.skipped = set(), {}, {}

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed[f"{report.nodeid} ({report.when})"] = said(report)
        elif report.skipped:
            self.skipped[report.nodeid] = reason(report)
        elif report.when == "call":
            self.passed.add(report.nodeid)

    def pytest_collectreport(self, report):
        if report.failed:
            self.failed[f"{report.nodeid} (collect)"] = said(report)
        elif report.skipped:
            self.skipped[report.nodeid] = reason(report)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, exitstatus):
        from devices import on_cpu

        failed_tests = {name.rsplit(" (", 1)[0] for name in self.failed}
        part = {
            **stamp(),
            "seconds": round(time.monotonic() - self.begun),
            "exit_status": int(exitstatus),
            "passed": len(self.passed - failed_tests),
            "failed": len(failed_tests),
            "skipped": len(self.skipped),
            "failures": self.failed,
            "skipped_because": dict(Counter(self.skipped.values()).most_common()),
        }
        write_part(self.file, "cpu" if on_cpu() else "gpu", part)


def write_part(file, name, part):
    """Put a part into the summary, and keep the other; what is no summary is replaced."""
    try:
        parts = json.loads(file.read_text())
        parts = {known: parts[known] for known in ("cpu", "gpu") if isinstance(parts.get(known), dict)}
    except (OSError, ValueError, AttributeError):
        parts = {}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**parts, name: part}, indent=1) + "\n")


def said(report):
    """What a failure says, in a line, without folders of this machine."""
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = [line.strip() for line in (crash.message if crash else str(report.longrepr)).splitlines() if line.strip()]
    return plain(" ".join(lines[:4] if crash else lines[-1:]))


def reason(report):
    """Why a test was skipped."""
    if isinstance(report.longrepr, tuple):
        return plain(report.longrepr[2].removeprefix("Skipped: "))
    return plain(getattr(report, "wasxfail", "") or str(report.longrepr))


def plain(text):
    return text.replace(str(ROOT), "").replace(str(Path.home()), "~")[:300]


def stamp():
    """{"machine", "versions"} as the results of benchmarks have them."""
    if str(ROOT / "benchmarks") not in sys.path:
        sys.path.append(str(ROOT / "benchmarks"))
    from common import machine, versions

    found = versions()
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        import comfyui_version

        found["comfyui"] = comfyui_version.__version__
    except ImportError:  # no test of this run imported ComfyUI
        pass
    return {"machine": machine(), "versions": found}
