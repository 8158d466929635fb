"""Weights split over the GPUs, on two and four CPU ranks: the latents of one process, a share of the weights on each.

Rank 0 is this process, the others are started from flux2/parallel/workers/worker.py and talk gloo. Not covered: NCCL and
GPU memory (`python benchmarks/parallel.py --weights split`); one workflow through a server is in test_parallel_nodes.py.
"""

import json
import os

import pytest
import torch

import small_models as files
from test_ranks import difference, lora, model, our_lora, ranks_on_cpu, sample, selected, tools  # noqa: F401
from test_ranks import CASES, kv_cached, easy_cached

SAME = 1e-6  # relative, float32


@pytest.fixture(scope="module")
def two(tools, model):
    """The model with its weights on two ranks. Every process is gone afterwards."""
    with ranks_on_cpu(2):
        made = tools.parallel.parallel(model, weights=tools.parallel.SPLIT)
        yield made
        tools.session.existing(made.model).stop()


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_with_half_of_the_weights_give_the_latents_of_one(tools, model, two, case):
    assert difference(sample(tools, two, **CASES[case]), sample(tools, model, **CASES[case])) < SAME
