"""Which tests run on what (devices.py), with a PyTorch that says it sees two GPUs unless they are hidden; the part of
scripts/test.sh in it; and the summary of a run (summary.py).
"""

import json
import os
from pathlib import Path
import subprocess
import sys
import textwrap

import pytest

import devices
from pack import ROOT
import summary

HERE = Path(__file__).parent
TORCH = """
import os
__version__ = "9"
class version:
    cuda, hip = "13.0", None
class cuda:
    is_initialized = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 0 if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else 2)
    is_available = staticmethod(lambda: cuda.device_count() > 0)
    get_device_properties = staticmethod(lambda index: Properties)
class Properties:
    name, total_memory, gcnArchName, major, minor = "A card", 2**34, "sm90", 9, 0
class backends:
    class cudnn:
        allow_tf32 = True
        version = staticmethod(lambda: 91900)
    class cuda:
        class matmul:
            allow_tf32 = True
"""
TESTS = """
import os, subprocess, sys
import pytest, torch
COUNT = "import torch; print(torch.cuda.device_count())"
def test_the_cpu():
    assert not torch.cuda.is_available() and torch.backends.cudnn.allow_tf32
def test_what_is_started():
    assert subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True).stdout == "0\\n"
@pytest.mark.gpu
def test_a_gpu():
    assert torch.cuda.is_available() and not torch.backends.cudnn.allow_tf32
@pytest.mark.gpu(gpus=2)
def test_two_gpus():
    assert torch.cuda.device_count() == 2
@pytest.mark.gpu(gpus=4, cpu=False)
def test_four_gpus():
    pass
"""


@pytest.mark.parametrize(
    "expression, asked",
    [
        ("", False),
        ("quick", False),
        ("gpu", True),
        ("not gpu", False),
        ("gpu and not alone", True),
        ("quick or gpu", False),
        ("not (gpu or alone)", False),
        ("gpus", False),
    ],
)
def test_what_m_asks_for(expression, asked):
    assert devices.gpu_asked(expression) is asked


def test_gpus_are_hidden_before_anybody_looks(monkeypatch):
    import torch

    environment = {}
    devices.hide_gpus(environment)
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available(), "of this process too"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="cannot be kept to the CPU"):
        devices.hide_gpus(environment)


@pytest.fixture
def machine(tmp_path):
    """run(*words, gpus, **environment) of pytest in a folder of five tests and a PyTorch that sees two GPUs."""
    (tmp_path / "torch.py").write_text(TORCH)
    (tmp_path / "test_some.py").write_text(textwrap.dedent(TESTS))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    inherited = {name: value for name, value in os.environ.items() if name not in (*devices.HIDDEN, devices.ON)}

    def run(*words, **environment):
        command = [sys.executable, "-m", "pytest", "-p", "devices", "-p", "summary", "-p", "no:cacheprovider", "-rsf"]
        return subprocess.run(
            [*command, *words, "test_some.py"],
            cwd=tmp_path,
            env={**inherited, "PYTHONPATH": f"{tmp_path}{os.pathsep}{HERE}", **environment},
            capture_output=True,
            text=True,
            timeout=300,
        ).stdout

    return run


def test_tests_of_the_cpu_see_no_gpu_and_nothing_that_they_start_does(machine):
    said = machine()
    assert "2 passed, 3 skipped" in said and devices.ELSEWHERE in said, said


def test_tests_of_gpus_run_on_those_that_are_there(machine):
    said = machine("-m", "gpu")
    assert "2 passed, 1 skipped, 2 deselected" in said and "it needs 4 GPUs, and there is 2" in said, said


def test_without_a_gpu_its_tests_are_skipped_with_the_reason(machine):
    said = machine("-m", "gpu", CUDA_VISIBLE_DEVICES="")
    assert "3 skipped, 2 deselected" in said and "no NVIDIA GPU: PyTorch sees none" in said, said


def test_gpu_tests_can_be_tried_on_a_cpu(machine):
    said = machine("-m", "gpu", **{devices.ON: "cpu"})
    assert "2 failed, 1 skipped" in said and "there is nothing to try of it on a CPU" in said, said


def test_every_file_can_be_collected_for_a_gpu_that_is_not_here(tmp_path):
    """All files are read, whichever test is chosen. Names of files are unique, in tests/gpu too: pytest asks for it."""
    names = [file.stem for folder in (HERE, HERE / "gpu") for file in folder.glob("*.py")]
    assert len(names) == len(set(names))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-m", "gpu", "--collect-only"]
    files = ["tests/gpu", "tests/test_attention_backends.py", "tests/test_imports.py"]
    done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "gpu/test_gpu_fused.py" in done.stdout, done.stdout[-3000:]


# --- the summary


def test_the_summary_has_a_part_for_each_device(machine, tmp_path):
    file = tmp_path / "made" / "tests.json"
    machine(f"--summary={file}")
    machine(f"--summary={file}", "-m", "gpu")
    made = json.loads(file.read_text())
    cpu, gpu = made["cpu"], made["gpu"]
    assert (cpu["passed"], cpu["failed"], cpu["skipped"]) == (2, 0, 3) == (gpu["passed"], 0, 2 + gpu["skipped"])
    assert cpu["machine"]["gpus"] == 0 and gpu["machine"] == {
        "device": "A card",
        "gpus": 2,
        "memory_gib": 16.0,
        "arch": "sm90",
    }
    assert cpu["skipped_because"] == {devices.ELSEWHERE: 3} and gpu["versions"]["pytest"] == pytest.__version__
    machine(f"--summary={file}", "-m", "gpu", **{devices.ON: "cpu"})
    cpu = json.loads(file.read_text())["cpu"]
    assert cpu["failed"] == 2 and cpu["exit_status"] == 1 and json.loads(file.read_text())["gpu"] == gpu
    assert list(cpu["failures"]) == ["test_some.py::test_a_gpu (call)", "test_some.py::test_two_gpus (call)"]
    assert "is_available" in cpu["failures"]["test_some.py::test_a_gpu (call)"]


def test_what_cannot_be_collected_or_torn_down_is_a_failure(machine, tmp_path):
    file = tmp_path / "tests.json"
    file.write_text("[1]")
    with open(tmp_path / "test_some.py", "a") as tests:
        tests.write("@pytest.fixture\ndef broken():\n    yield\n    raise OSError('gone')\n")
        tests.write("def test_with_it(broken):\n    pass\n")
    machine("--summary", str(file))
    cpu = json.loads(file.read_text())["cpu"]
    assert cpu["failures"] == {"test_some.py::test_with_it (teardown)": "OSError: gone"}
    assert (cpu["passed"], cpu["failed"]) == (2, 1), "a test that passed and cannot be torn down has failed"
    (tmp_path / "test_some.py").write_text("import no_such_module\n")
    machine("--summary", str(file))
    cpu = json.loads(file.read_text())["cpu"]
    assert list(cpu["failures"]) == ["test_some.py (collect)"]
    assert "No module named 'no_such_module'" in cpu["failures"]["test_some.py (collect)"]


def test_a_summary_names_no_folder_of_this_machine():
    assert summary.plain(f"{ROOT}/tests/x {Path.home()}/y") == "/tests/x ~/y"


# --- scripts/test.sh


@pytest.fixture
def script(tmp_path):
    """runs(*words, gpu): the words of each run of pytest that scripts/test.sh makes, in a checkout of its own."""
    root = tmp_path / "checkout"
    (root / "scripts").mkdir(parents=True)
    (root / "tests").mkdir()
    (root / "tests" / "test_x.py").write_text("")
    (root / "made.json").write_text("{}")
    (root / "scripts" / "test.sh").write_text((ROOT / "scripts" / "test.sh").read_text())
    python = tmp_path / "python"
    (root / "scripts" / "environment.py").write_text(f"print('PYTHON={python}')\nprint('COMFYUI=/none')\n")
    python.write_text(
        f'#!/bin/sh\nif [ "$1" = -c ]; then case "$2" in *torch*) exit $NO_GPU ;; *) exit 0 ;; esac; fi\n'
        f'echo "$@" >> {tmp_path}/runs\nexit ${{STATUS:-0}}\n'
    )
    python.chmod(0o755)
    programs = tmp_path / "programs"  # so that nothing is installed
    programs.mkdir()
    for name in ("chromium", "chromedriver", "ip"):
        (programs / name).write_text("#!/bin/sh\n")
        (programs / name).chmod(0o755)

    def runs(*words, gpu=True, status=0, workers=""):
        (tmp_path / "runs").unlink(missing_ok=True)
        environment = {
            **os.environ,
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "NO_GPU": "0" if gpu else "1",
            "STATUS": str(status),
            "FLUX2_TEST_WORKERS": workers,
        }
        done = subprocess.run(["bash", "scripts/test.sh", *words], cwd=root, env=environment, timeout=60)
        assert done.returncode == status
        return (tmp_path / "runs").read_text().splitlines()

    return runs


def test_everything_is_two_runs_where_there_is_a_gpu(script):
    on_cpu, on_gpu = script(workers="2")
    assert on_cpu.startswith("-m pytest tests ") and "-n 2" in on_cpu and "gpu" not in on_cpu
    assert on_gpu.startswith("-m pytest tests ") and "-n" not in on_gpu.split() and on_gpu.endswith(" -m gpu")
    assert len(script(gpu=False)) == 1 and len(script(status=1)) == 2, "also after failures, which are not forgotten"


def test_what_is_chosen_is_one_run(script):
    for words in (["-m", "quick"], ["-m", "gpu"], ["-mgpu"], ["tests/test_x.py"], ["tests/test_x.py::test_y", "-x"]):
        (run,) = script(*words)
        assert run.endswith(" ".join(words)) and ("tests " in run) == ("test_x" not in run), words
        assert ("-n" in run.split()) is False or words == ["-m", "quick"]


def test_the_file_of_a_summary_is_no_test_file(script):
    for words in (["--summary", "made.json"], ["--summary=made.json"]):
        on_cpu, on_gpu = script(*words)
        assert " ".join(words) in on_cpu and " ".join(words) in on_gpu and on_cpu.startswith("-m pytest tests ")
