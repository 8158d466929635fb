"""scripts/amd_check.sh, which owners of AMD cards run: here it ends with every part refused in words; its measuring
runs on a CPU at small sizes; a part that crashes or hangs costs its own row."""

import argparse
import json
import os
import re
import subprocess
import sys

import pytest
import torch

sys.path.insert(0, str(__import__("pack").ROOT / "benchmarks"))

import amd_check  # noqa: E402
from pack import ROOT  # noqa: E402
from rocm_fixture import pretend  # noqa: E402
from flux2_pack.attention import registry  # noqa: E402

CPU = torch.device("cpu")
AMD_SLUGS = {slug for slug, row in registry.ROWS.items() if "amd" in row.hardware.archs}


def arguments(**changed):
    return argparse.Namespace(**{"minutes": 10, "seq": 64, "heads": 2, "any_gpu": False, **changed})


def test_without_an_amd_gpu_it_ends_with_every_part_refused_in_words(tmp_path):
    environment = {**os.environ, "FLUX2_PYTHON": sys.executable}
    script = ["bash", str(ROOT / "scripts" / "amd_check.sh"), "--out", str(tmp_path / "made")]
    done = subprocess.run(script, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr + done.stdout, done.stderr[-2000:]
    result = json.loads((tmp_path / "made" / "amd-check.json").read_text())
    assert result["refused"].startswith("There is no GPU that PyTorch can use: torch ")
    assert set(result["backends"]) == AMD_SLUGS
    parts = [*result["backends"].values(), *(result[part] for part in amd_check.PARTS)]
    assert all(part == {"reasons": [result["refused"]]} for part in parts)
    page = (tmp_path / "made" / "amd-check.md").read_text()
    assert (
        "**Nothing could be tried.**" in page and all(f"`{slug}`" in page for slug in AMD_SLUGS) and page in done.stdout
    )
    assert "A run on an AMD card" in done.stdout


def test_a_python_without_torch_and_a_folder_that_cannot_be_written_are_sentences(tmp_path):
    script = ["bash", str(ROOT / "scripts" / "amd_check.sh")]
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\nexit 1\n")
    bare.chmod(0o755)
    done = subprocess.run(script, capture_output=True, text=True, env={**os.environ, "FLUX2_PYTHON": str(bare)})
    assert done.returncode == 1 and "has no PyTorch. Set FLUX2_PYTHON" in done.stderr
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [*script, "--out", str(tmp_path / "file" / "x")],
        capture_output=True,
        text=True,
        env={**os.environ, "FLUX2_PYTHON": sys.executable},
    )
    assert done.returncode == 1 and "could not be written" in done.stderr and "Traceback" not in done.stderr


# --- measuring, at small sizes on a CPU ------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", ["sdpa", "sdpa-math"])
def test_a_backend_is_checked_and_timed(slug):
    found = amd_check.backend(slug, 200, 3, CPU)
    assert found["error"] < 0.01 and found["error_with_lse"] < 0.01 and found["lse_error"] < 0.01
    assert found["ms"] > 0 and found["tflops"] == pytest.approx(4 * 3 * 200 * 200 * 128 / found["ms"] / 1e9)
    assert found["kernel"].startswith("PyTorch") and found["library"].startswith("PyTorch") and found["exact"] is True


def test_a_backend_that_cannot_run_has_its_reasons_and_how_to_get_it():
    found = amd_check.backend("aiter", 64, 2, CPU)
    assert "It needs an AMD GPU" in found["reasons"][0] and "Install AITER" in found["install"]


def test_a_wrong_kernel_shows_in_the_error(monkeypatch):
    kind = type(registry.adapter("sdpa", registry.describe("cpu")))
    right = kind.run
    monkeypatch.setattr(kind, "run", lambda *args: (right(*args)[0] * 1.05, right(*args)[1]))
    assert amd_check.backend("sdpa", 64, 2, CPU)["error"] > 0.04


def test_auto_and_the_tiles_say_what_they_did():
    assert "sdpa" in amd_check.auto(64, 2, CPU)["text"]
    assert "It needs an AMD GPU" in amd_check.tiles(64, 2, CPU)["reasons"][0]
    assert amd_check.several_gpus(64, 2, CPU)["reasons"] == ["There are no GPUs here."]


def test_the_fused_kernels_are_compared_with_pytorch():
    """By Triton's interpreter, in float32, in a process of its own."""
    code = (
        "import sys, json, torch; sys.path.insert(0, 'benchmarks'); import amd_check;"
        "print(json.dumps(amd_check.kernels(24, 2, torch.device('cpu'))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [row["kernel"] for row in rows] == ["norm_modulate", "swiglu", "q of single_qkv"]
    assert all(row.get("error", 1) < 1e-5 for row in rows), rows


def test_the_products_are_timed_in_bf16_and_refused_by_format():
    """A CPU has no fp8 products: each format has its reason. Triton's interpreter quantises."""
    code = (
        "import sys, json, torch; sys.path.insert(0, 'benchmarks'); import amd_check;"
        "print(json.dumps(amd_check.products(24, 1, torch.device('cpu'))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    rows = {row["product"]: row for row in json.loads(done.stdout.splitlines()[-1])["rows"]}
    assert rows["bf16"]["error"] < 0.01 and rows["bf16"]["ms"] > 0
    for name in ("fp8 e4m3fn", "fp8 e4m3fnuz"):
        assert rows[name].get("reasons") or rows[name]["error"] < 0.06, rows[name]


# --- the whole check -------------------------------------------------------------------------------------------------


def test_only_what_fits_the_card_is_started_and_exact_backends_first(monkeypatch):
    pretend(monkeypatch, "gfx1201")
    monkeypatch.setattr(amd_check, "describe", registry.describe)
    started = []
    result = amd_check.check(arguments(), lambda part, slug, seconds: started.append(slug or part) or {"ms": 1.0})
    assert started[:2] == ["sdpa", "sdpa-flash"] and started[-5:] == list(amd_check.PARTS)
    assert "aiter-flydsl" in started and "aiter" not in started
    assert "It needs one of the architectures" in result["backends"]["aiter"]["reasons"][0]
    assert result["refused"] is None and result["machine"]["arch"] == "gfx1201" and result["versions"]["hip"]


def test_when_the_time_is_over_the_rest_is_named_as_not_tried(monkeypatch):
    pretend(monkeypatch, "gfx942")
    monkeypatch.setattr(amd_check, "describe", registry.describe)
    clock = iter(range(0, 100_000, 90))
    monkeypatch.setattr(amd_check.time, "monotonic", lambda: next(clock))
    result = amd_check.check(arguments(), lambda part, slug, seconds: {"ms": 1.0})
    assert result["backends"]["sdpa"] == {"ms": 1.0}
    assert result["several GPUs"]["reasons"] == ["Not tried: the 10 minutes were over. --minutes gives it more."]


def test_a_part_that_crashes_or_hangs_costs_its_own_row(monkeypatch):
    run = amd_check.in_a_process(arguments())
    assert re.match(r"Its process ended with exit code 1: KeyError", run("no such part", None, 60)["reasons"][0])
    real = subprocess.run
    dies = [sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"]
    monkeypatch.setattr(amd_check.subprocess, "run", lambda command, **rest: real(dies, **rest))
    assert run("tiles", None, 60)["reasons"][0].startswith("Its process ended with signal 11")
    hangs = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(amd_check.subprocess, "run", lambda command, **rest: real(hangs, **rest))
    assert run("tiles", None, 1)["reasons"] == ["It took longer than 1 seconds and was ended."]


def test_the_page_shows_figures_reasons_and_nobodys_home(monkeypatch):
    pretend(monkeypatch, "gfx1100")
    monkeypatch.setattr(amd_check, "describe", registry.describe)
    home = str(amd_check.Path.home())
    answers = {
        "backend": {"ms": 12.5, "tflops": 41.0, "error": 2.3e-3, "lse_error": 1e-6, "kernel": "a|b", "library": "x 1"},
        "tiles": {"rows": [{"tile": "64x32", "ms": 1.5, "error": 2e-3}, {"tile": "64x64", "reasons": [f"{home}/x"]}]},
        "products": {"rows": [{"product": "bf16", "ms": 2.5, "error": 1e-3}]},
        "kernels": {"rows": [{"kernel": "swiglu", "ms": 0.5, "pytorch_ms": 0.9, "error": 2e-3}]},
        "auto": {"text": "auto: sdpa"},
        "several GPUs": {"reasons": ["There is one GPU here."]},
    }
    result = amd_check.check(arguments(), lambda part, slug, seconds: answers[part])
    page = amd_check.without_home(amd_check.page(result))
    assert "| `aiter-triton` | 12.500 | 41 | 2.3e-03 | 1.0e-06 | a/b | x 1 |" in page
    assert "| 64x32 | 1.500 | 2.0e-03 | - |  |" in page and "auto: sdpa" in page and "There is one GPU here." in page
    assert home not in page and "~/x" in page


def test_the_issue_form_and_the_workflow_use_the_script():
    form = (ROOT / ".github" / "ISSUE_TEMPLATE" / "amd-run.yml").read_text()
    assert form.startswith("name: A run on an AMD card\n") and "scripts/amd_check.sh" in form
    assert "amd-check.md" in form and "amd-check.json" in form
    assert "bash scripts/amd_check.sh" in (ROOT / ".github" / "workflows" / "rocm.yml").read_text()
