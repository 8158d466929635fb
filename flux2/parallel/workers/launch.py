"""Starting worker processes on this machine: which GPUs there are, the command line and environment of a worker, and
what became of it.
"""

import os
from pathlib import Path
import signal
import socket
import subprocess
import sys
import time

from ....attention.errors import UserError

WORKER = Path(__file__).with_name("worker.py")
SECRET, LISTEN, CPU_RANKS = "FLUX2_RANKS_SECRET", "FLUX2_RANKS_LISTEN", "FLUX2_CPU_RANKS"
CUSTOM_NODES = "FLUX2_RANKS_CUSTOM_NODES"  # rank 0's folders of packs: one of them may be ComfyUI-GGUF
VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
LOOPBACK = "127.0.0.1"


def visible(index):
    """What to make visible to a process that shall see only GPU `index` of this one, which may itself see a
    selection.
    """
    shown = os.environ.get(VISIBLE[0], "") or os.environ.get(VISIBLE[1], "")
    tokens = [token.strip() for token in shown.split(",") if token.strip()]
    return tokens[index] if index < len(tokens) else str(index)


def environment_of(rank, size, gpu, address, secret, ranks_here):
    """The environment of a worker: torchrun's variables, the secret, and one visible GPU (gpu: its index here, None for
    the CPU).
    """
    import folder_paths  # ComfyUI's, which a worker that imports this module has not got yet

    host, port = address
    host = LOOPBACK if host in ("0.0.0.0", "::") else host
    values = {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        SECRET: secret,
        CUSTOM_NODES: os.pathsep.join(folder_paths.get_folder_paths("custom_nodes")),
    }
    if gpu is None:
        values["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or str(
            max(1, (os.cpu_count() or 1) // ranks_here)
        )
    else:
        values.update(dict.fromkeys(VISIBLE, visible(gpu)))
    return values


def start(rank, size, gpu, address, secret, ranks_here):
    """Popen of one worker; its output comes through .stdout as lines. Call it from a thread that outlives the worker:
    Linux ends the worker with it.
    """
    return subprocess.Popen(
        [sys.executable, "-u", str(WORKER)],
        env=environment_of(rank, size, gpu, address, secret, ranks_here),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def listening_at():
    """(host, port, whether other hosts may join). FLUX2_RANKS_LISTEN=host:port in ComfyUI's environment opens it to
    other hosts; a workflow cannot.
    """
    where = os.environ.get(LISTEN)
    if not where:
        return LOOPBACK, 0, False
    host, _, port = where.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(
            f"{LISTEN} is '{where}'. It should be an address of this machine and a port, such as 10.0.0.1:29511.",
            "several-gpus",
        )
    if len(os.environ.get(SECRET, "")) < 16:
        raise UserError(
            f"{LISTEN} is set, so other hosts may join, and {SECRET} is missing or shorter than 16 characters. Set "
            "the same long random text "
            "for ComfyUI and for the workers on the other hosts.",
            "several-gpus",
        )
    return host, int(port), True


def listen(host, port):
    """A listening socket. OSError with a sentence when the port is taken or the address is not this machine's."""
    try:
        return socket.create_server(
            (host, port), backlog=128, family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
    except OSError as error:
        raise OSError(
            error.errno,
            f"Rank 0 cannot listen at {host}:{port}: {error.strerror}. Another program has that port, or the address "
            f"is not this machine's: set {LISTEN} to another one.",
        ) from error


def ending_of(process):
    """How a process ended, for a sentence; "" while it runs."""
    code = process.poll()
    if code is None:
        return ""
    if code >= 0:
        return f"it ended with status {code}"
    name = signal.Signals(-code).name if -code in [s.value for s in signal.Signals] else f"signal {-code}"
    return f"it was killed ({name})" + (
        ", by hand or by the system when host memory ran out" if name == "SIGKILL" else ""
    )


def end(processes, patience=2.0):
    """End processes that were asked to stop: wait a little for all of them together, then kill. Returns when they are
    gone.
    """
    deadline = time.monotonic() + patience
    for process in processes:
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
    for process in processes:
        process.wait()
