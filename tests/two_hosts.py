"""Rank 0 on the first of two hosts. Run by test_two_hosts.py inside a network namespace; a worker waits in the other
one.
"""

import os
import subprocess
import time
from pathlib import Path

import pytest

from test_ranks import LARGE, SAME, difference, in_a_step, model, sample, tools  # noqa: F401

OTHER = os.environ.get("FLUX2_OTHER_HOST", "")


@pytest.fixture(scope="module")
def two(tools, model):  # noqa: F811
    fresh = tools.load.load_model(model.cached_patcher_init[1][0])
    yield tools.parallel.parallel(fresh, 2)
    tools.session.existing(fresh.model).stop()


def connections():
    """How many TCP connections to the other host are established."""
    number = "".join(f"{int(part):02X}" for part in reversed(OTHER.split(".")))
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(remote.startswith(number) and state == "01" for _, _, remote, state, *_ in rows)


def cable(state):
    subprocess.run(["ip", "link", "set", "cable", state], check=True, timeout=30)


def test_the_other_host_computes_its_part(tools, model, two):  # noqa: F811
    assert difference(sample(tools, two), sample(tools, model)) < SAME
    assert connections() >= 2, "orders and exchanges go over the cable"
    assert "GPU 0" in tools.report.report(two)[0]


def test_a_cable_that_is_pulled_fails_the_prompt_with_a_sentence_and_the_next_one_works_once_it_is_back(
    tools, model, two
):  # noqa: F811
    session = tools.session.existing(two.model)
    sample(tools, two)
    thread, moment = in_a_step(session, lambda: cable("down"))
    try:
        with pytest.raises(tools.pool.RanksFailed) as caught:
            sample(tools, two, **LARGE)
        seconds = time.perf_counter() - moment[0]
    finally:
        thread.join()
        cable("up")
    assert "Rank 1" in str(caught.value) and "connection" in str(caught.value) and "next" in str(caught.value), str(
        caught.value
    )
    assert seconds < 20, seconds  # ten until the system gives the connection up
    assert difference(sample(tools, two), sample(tools, model)) < SAME
