"""Ranks of a gloo group on this machine: one process imports what they need once, and forks them.

  python tests/ranks.py FILE FOLDER SIZES...     e.g. python tests/ranks.py attention_ranks /tmp/there 2 3

FILE, a module in tests/, has prepare() -> anything, called once before there are ranks, and run(prepared, rank, size)
-> a result that torch.save takes, called in every rank of each size with torch.distributed initialised. `results` does
it from a test. Linux and macOS only, as fork is.
"""

from datetime import timedelta
import importlib
import os
from pathlib import Path
import signal
import subprocess
import sys
import time
import traceback

import pack  # noqa: F401  (the pack as flux2_pack, for whatever FILE imports)
import torch
import torch.distributed as dist

LIMIT_S = 1200  # for all sizes together, on a machine that does other things too
EXCHANGE_S = 60  # that one rank waits for another
GRACE_S = 5  # for the others to see that a rank failed


def results(file, folder, sizes, limit_s=LIMIT_S):
    """{size: [what run returned in rank 0, 1, ...]}. AssertionError with the ranks' tracebacks when one failed."""
    command = [sys.executable, str(Path(__file__).resolve()), file, str(folder), *map(str, sizes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return {size: [torch.load(saved(folder, size, rank), weights_only=True) for rank in range(size)] for size in sizes}


def saved(folder, size, rank):
    return Path(folder) / f"{size}-{rank}.pt"


def one_rank(module, prepared, folder, rank, size):
    """The life of a rank. Returns its exit code."""
    try:
        store = dist.FileStore(str(Path(folder) / f"{size}.store"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=EXCHANGE_S))
        torch.save(module.run(prepared, rank, size), saved(folder, size, rank))
        return 0
    except BaseException:
        print(f"rank {rank} of {size}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return 1


def fork(function, *args):
    """Process id of a child that runs function(*args) and exits with what it returns."""
    child = os.fork()
    if child == 0:
        os._exit(function(*args))
    return child


def together(module, prepared, folder, size):
    """Run all ranks of one size. True when all of them ended well; the others are ended soon after one fails."""
    running = {fork(one_rank, module, prepared, folder, rank, size) for rank in range(size)}
    failed_at, well = None, True
    while running:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended:
            running.discard(ended)
            well &= status == 0
            failed_at = failed_at or (None if status == 0 else time.monotonic())
        elif failed_at and time.monotonic() - failed_at > GRACE_S:
            for child in running:
                os.kill(child, signal.SIGKILL)
            failed_at = None
        else:
            time.sleep(0.02)
    return well


def main(file, folder, *sizes):
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    module = importlib.import_module(file)
    prepared = module.prepare()
    return 0 if all([together(module, prepared, folder, int(size)) for size in sizes]) else 1


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
