"""Two hosts: network namespaces of this machine, which share nothing but a cable between them. Rank 0 in one,
torchrun's worker in the other.

Needs root and Debian's iproute2 (scripts/test.sh installs it). What is checked inside stands in two_hosts.py. Not
covered: NCCL, different machines.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from pack import ROOT

HERE = Path(__file__).parent
ADDRESSES, PORT, SECRET = ("10.213.7.1", "10.213.7.2"), 29511, "a secret of some length"


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)


@pytest.fixture
def hosts():
    """Names of two namespaces whose interfaces `cable` are connected."""
    if not shutil.which("ip"):
        pytest.skip("the program ip is missing (Debian: iproute2)")
    names = [f"flux2-{uuid.uuid4().hex[:6]}" for _ in ADDRESSES]
    with contextlib.ExitStack() as stack:
        try:
            for name in names:
                ip("netns", "add", name)
                stack.callback(ip, "netns", "del", name)
            ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine makes no network namespaces: {error.stderr.strip()}")
        for name, address in zip(names, ADDRESSES):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield names


@pytest.fixture
def worker(hosts, comfyui):
    """torchrun on the second host, by the line of docs/several-gpus.md."""
    command = [
        "ip",
        "netns",
        "exec",
        hosts[1],
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "1",
        ROOT / "flux2/ranks/worker.py",
        "--join",
        f"{ADDRESSES[0]}:{PORT}",
        "--comfyui",
        comfyui,
    ]
    process = subprocess.Popen(
        command,
        env={**os.environ, "FLUX2_RANKS_SECRET": SECRET},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=60)


def test_one_picture_on_two_hosts_and_a_cable_that_is_pulled(hosts, worker, small_models):
    environment = {
        **os.environ,
        "FLUX2_RANKS_LISTEN": f"{ADDRESSES[0]}:{PORT}",
        "FLUX2_RANKS_SECRET": SECRET,
        "FLUX2_CPU_RANKS": "1",
        "FLUX2_OTHER_HOST": ADDRESSES[1],
    }
    command = [
        "ip",
        "netns",
        "exec",
        hosts[0],
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        HERE / "two_hosts.py",
    ]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "2 passed" in done.stdout
