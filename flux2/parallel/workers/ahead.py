"""Worker processes before there is a model for them: importing PyTorch and ComfyUI takes them seconds, in which rank 0
loads models and encodes text. A session takes them (session.py), or they end after PREPARED_S.
"""

import threading
import time

from .pool import WorkerPool

PREPARED_S = 300  # that processes wait for the sampler they were started for: a large text encoder may come before it
waiting, _turn = [], threading.Lock()  # at most one WorkerPool that no session has yet


def start_ahead(plan, there):
    """Start the processes of a ParallelPlan. there: plans whose processes run already; nothing is started for one with
    the same processes, nor for other hosts. Raises OSError or ValueError when rank 0 cannot listen.
    """
    with _turn:
        there = [*there, *(pool.plan for pool in waiting if pool.started)]
        if plan.elsewhere or any(one.processes() == plan.processes() for one in there):
            return
        for pool in waiting:
            pool.stopping.set()
        since = time.perf_counter()
        pool = WorkerPool(plan)
        pool.look_after = lambda: time.perf_counter() - since > PREPARED_S and pool.stopping.set()
        pool.start()
        waiting[:] = [pool]


def taken_ahead(plan):
    """The WorkerPool that was started for such a plan, or None. It is the caller's from then on."""
    with _turn:
        fitting = [pool for pool in waiting if pool.started and pool.plan.processes() == plan.processes()]
        if fitting:
            waiting.clear()
        return fitting[0] if fitting else None
