"""Ulysses through symmetric memory: the decision, and the kernels in Triton's interpreter."""

import os
from pathlib import Path
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import pack  # noqa: F401
from flux2_pack.attention.parallel import symmetric_memory
from flux2_pack.attention.parallel.mesh import Mesh, transport_text


def test_the_kernels_in_the_interpreter():
    pytest.importorskip("triton", exc_type=ImportError)
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(here / "symmetric_interpreted.py")],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=here,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def group(reasons):
    """What SymmetricMemory.agree answers on ranks with these reasons, asked at the same time."""
    store = torch.distributed.HashStore()
    with ThreadPoolExecutor(len(reasons)) as pool:
        ranks = [symmetric_memory.SymmetricMemory(store, rank, len(reasons), "cpu") for rank in range(len(reasons))]
        return list(pool.map(lambda one, reason: one.agree(reason), ranks, reasons))


def test_all_ranks_decide_alike():
    assert group([None, None]) == [None, None]
    answers = group([None, "no peer access.", None])
    assert answers == ["rank 1 of the group: no peer access."] * 3


def test_cpus_and_a_switch_leave_heads_to_all_to_all(monkeypatch):
    store = torch.distributed.HashStore()
    memory, reason = symmetric_memory.connect(store, 0, 1, torch.device("cpu"))
    assert memory is None and "computes on 'cpu'" in reason
    assert "all-to-all" in transport_text(memory, reason) and reason in transport_text(memory, reason)
    monkeypatch.delenv(symmetric_memory.SWITCH, raising=False)
    assert f"{symmetric_memory.SWITCH}=1" in symmetric_memory.unavailable(torch.device("cuda"))
    monkeypatch.setenv(symmetric_memory.SWITCH, "1")
    assert symmetric_memory.SWITCH not in (symmetric_memory.unavailable(torch.device("cuda")) or "")


def test_settings_of_pytorch_hold_while_they_are_needed_and_the_users_stay(monkeypatch):
    name, other = symmetric_memory.SETTINGS
    monkeypatch.setenv(name, "0")
    monkeypatch.delenv(other, raising=False)
    with symmetric_memory.settings():
        assert os.environ[name] == "0" and os.environ[other] == symmetric_memory.SETTINGS[other]
    assert os.environ[name] == "0" and other not in os.environ


def test_the_end_of_a_mesh_ends_waits():
    ended = []

    class Memory:
        def abort(self):
            ended.append(True)

    mesh = Mesh(symmetric=Memory())
    mesh.end()
    assert ended and mesh.abort()


def test_a_wait_that_began_in_a_forward_pass_is_ended_from_outside():
    """The buffer grows inside a pass, which runs in inference mode; whoever ends the mesh does not."""
    memory = symmetric_memory.SymmetricMemory(None, 0, 2, "cpu")
    with torch.inference_mode():
        memory._abort = symmetric_memory.abort_word()
    memory.abort()
    assert memory._abort.item() == 1
