"""The script that compares ComfyUI's own suites with and without the pack, on a small stand-in for ComfyUI. The real
suites take ten minutes: see the script.
"""

import json
import sys

import pytest

import comfyui_suites

SAME = """
import pytest
def test_passes(): pass
def test_fails(): assert False
@pytest.mark.skip
def test_skipped(): pass
class TestInside:
    @pytest.mark.parametrize("n", [1, 2])
    def test_in_a_class(self, n): pass
"""
SEES_THE_PACK = """
from pathlib import Path
def test_no_other_node(): assert not list(Path("custom_nodes").iterdir())
"""
ONCE = """
from pathlib import Path
def test_only_the_second_time():
    seen = Path("seen")
    again = seen.exists() or not list(Path("custom_nodes").iterdir())
    seen.touch()
    assert again
"""
SLOW_SERVER = """
import socket, sys, time
time.sleep(1)
server = socket.create_server(("127.0.0.1", int(sys.argv[2])))
while True:
    server.accept()[0].close()
"""
USES_A_SERVER = """
import socket, subprocess, sys
def test_server_twice_on_one_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "main.py", "--port", str(port)])
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        process.kill()
"""


@pytest.fixture
def source(tmp_path):
    """A folder that looks like ComfyUI's, with a large model, history and another custom node, which are not copied."""
    root = tmp_path / "ComfyUI"
    for folder in ("comfy", "tests-unit/inner", "models/vae", "custom_nodes/other", ".git"):
        (root / folder).mkdir(parents=True)
    (root / "comfy" / "sd.py").touch()
    (root / "models" / "vae" / "put_vae_here").touch()
    (root / "models" / "vae" / "large.safetensors").write_bytes(b"\0" * (comfyui_suites.LARGEST_FILE + 1))
    (root / "tests-unit" / "test_same.py").write_text(SAME)
    (root / "main.py").write_text(SLOW_SERVER)
    return root


def compare(source, tmp_path, **files):
    for name, text in files.items():
        (source / "tests-unit" / "inner" / f"test_{name}.py").write_text(text)
    copies = {side: tmp_path / side for side in comfyui_suites.SIDES}
    for side, pack in comfyui_suites.SIDES.items():
        comfyui_suites.copy_comfyui(source, copies[side])
        if pack:
            (copies[side] / "custom_nodes" / comfyui_suites.PACK).symlink_to(comfyui_suites.ROOT)
    return comfyui_suites.compare("tests-unit", copies, None), copies


def test_suites_that_end_alike(source, tmp_path):
    (source / "tests-unit" / "test_server.py").write_text(USES_A_SERVER)
    before = sorted(source.rglob("*"))
    result, copies = compare(source, tmp_path)
    assert (
        result["without"] == result["with"] == {"passed": 4, "failure": 1, "skipped": 1} and result["differences"] == {}
    )
    assert result["failed_without"] == [
        "tests-unit.test_same::test_fails"
    ] and "every test ends alike" in comfyui_suites.as_text(result)
    assert sorted(source.rglob("*")) == before, "ComfyUI's own folder is only read"
    copied = {str(file.relative_to(copies["with"])) for file in copies["with"].rglob("*")}
    assert (
        "models/vae/put_vae_here" in copied
        and not {"models/vae/large.safetensors", "custom_nodes/other", ".git"} & copied
    )


def test_a_test_that_the_pack_changes_is_named(source, tmp_path):
    result, _ = compare(source, tmp_path, sees=SEES_THE_PACK)
    assert result["differences"] == {"tests-unit.inner.test_sees::test_no_other_node": ["passed", "failure"]}
    assert "test_no_other_node (passed -> failure)" in comfyui_suites.as_text(result)


def test_a_test_that_depends_on_chance_is_run_again(source, tmp_path):
    result, _ = compare(source, tmp_path, once=ONCE)
    assert result["differences"] == {}


def test_a_suite_that_cannot_run_says_why(source, tmp_path):
    (source / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")
    with pytest.raises(SystemExit, match="no-such-option"):
        compare(source, tmp_path)


def test_the_main_program_writes_the_result(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COMFYUI_PATH", str(source))
    monkeypatch.setattr(
        sys, "argv", ["comfyui_suites.py", "--suite", "tests-unit", "--json", str(tmp_path / "result.json")]
    )
    (source / "tests-unit" / "test_sees.py").write_text(SEES_THE_PACK)
    assert comfyui_suites.main() == 1 and "differ" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "result.json").read_text())[0]["differences"]) == 1
