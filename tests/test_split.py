"""ComfyUI's own FLUX.2 on several ranks predicts what it predicts on one: 2, 3 and 4 gloo ranks, each group started
once (split_ranks.py).
"""

import ast
import types

import pytest
import torch

import split_ranks
from flux2_pack.attention.parallel.mesh import pairs
from pack import ROOT
import ranks

SIZES = (2, 3, 4)
EXACT = 1e-6  # relative, float32
ARRANGED = [(size, str(d)) for size in SIZES for d in pairs(size, split_ranks.HEADS)]


@pytest.fixture(scope="module")
def found(comfy, tmp_path_factory):
    return ranks.results("split_ranks", tmp_path_factory.mktemp("ranks"), SIZES)


@pytest.mark.parametrize("size, name", ARRANGED)
def test_every_rank_predicts_what_one_rank_does(found, size, name):
    for rank in found[size]:
        errors = rank[name]["errors"]
        assert set(errors) == {case for case, row in split_ranks.CASES.items() if not row.mask or "ring 1" in name}
        assert {case: value for case, value in errors.items() if not value <= EXACT} == {}


@pytest.mark.parametrize("size, name", ARRANGED)
def test_bfloat16_stays_within_the_noise_of_two_exact_backends(found, size, name):
    for shared, control in found[size][0][name]["half"].values():
        assert shared <= 2 * control


@pytest.mark.parametrize("size", SIZES)
def test_faults_are_far_above_the_tolerance(found, size):
    seen = found[size][0][f"Ulysses {size} x ring 1"]["faults"]
    assert set(seen) == set(split_ranks.FAULTS) and min(seen.values()) > 1000 * EXACT


@pytest.mark.parametrize("size, name", ARRANGED)
def test_work_is_shared_evenly_and_exchanged_once_per_block(found, size, name):
    ulysses, ring = int(name.split()[1]), int(name.split()[-1])
    blocks, tokens = 5, 37 + 9 * 7 + 6 * 5 + 3 * 9
    for rank in found[size]:
        times = rank[name]["times"]
        assert sum(times["tokens"]) == tokens and max(times["tokens"]) - min(times["tokens"]) <= 1
        assert times["collectives"] == blocks * (2 * (ulysses > 1) + ring - 1) + 1 and times["forwards"] == 1
        assert 0 < times["collective_seconds"] < times["forward_seconds"]


@pytest.mark.parametrize("size, name", ARRANGED)
def test_select_attention_may_come_in_front_behind_or_not_at_all(found, size, name):
    rings, orders = "ring 1" not in name, found[size][0][name]["orders"]
    assert max(orders["behind"], orders["flash"], orders["fallback"]) <= EXACT
    assert orders["fallback used"] == rings
    if rings:
        assert "Put Select Attention on this model, or use a ring degree of 1." in orders["none"]
    else:
        assert orders["none"] <= EXACT


@pytest.mark.parametrize("size, name", ARRANGED)
def test_the_report_counts_what_this_rank_computed(found, size, name):
    report, ring = found[size][1][name]["orders"]["report"], int(name.split()[-1])
    assert report["backend"] == "sdpa-math" and report["calls"] == 5 * ring
    heads = split_ranks.HEADS // int(name.split()[1])
    assert all(f"{heads} heads of 16" in entry["call"] for entry in report["entries"])


@pytest.mark.parametrize("size, name", ARRANGED)
def test_nothing_is_left_on_the_model(found, size, name):
    assert all(rank[name]["left behind"] == [False, False, False] for rank in found[size])


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, name", ARRANGED)
@pytest.mark.parametrize(
    "kind, where, said",
    [
        ("out_of_memory", 1, "OutOfMemoryError"),
        *(
            (kind, 0, "InterruptProcessingException")
            for kind in ("cancelled", "cancelled_at_once", "cancelled_on_the_way")
        ),
    ],
)
def test_a_rank_that_stops_does_not_hold_up_the_others(found, size, name, kind, where, said):
    for number, rank in enumerate(found[size]):
        seen = rank[name]["failures"][kind]
        assert seen["said"].startswith(said) if number == where else seen["said"] == "" and seen["nan"]
        assert seen["intact"] and seen["after"] <= EXACT


@pytest.mark.parametrize("size, name", ARRANGED)
def test_a_block_that_is_skipped_on_one_rank_alone_is_said(found, size, name):
    for number, rank in enumerate(found[size]):
        seen = rank[name]["failures"]["skipped"]
        assert ("attention was called 4 times" in seen["said"]) if number == 0 else (seen["said"] == "" and seen["nan"])
        assert seen["intact"] and seen["after"] <= EXACT


@pytest.mark.parametrize("size, name", ARRANGED)
def test_too_few_tokens_are_refused_by_every_rank(found, size, name):
    for rank in found[size]:
        seen = rank[name]["failures"]["too_few_tokens"]
        assert (
            f"{size} GPUs cannot share 1 tokens of text" in seen["said"] and seen["intact"] and seen["after"] <= EXACT
        )


# --- shards --------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(comfy):
    from flux2_pack.flux2.parallel import shards

    return shards


@pytest.mark.parametrize(
    "text, picture, references",
    [(512, 4096, 0), (512, 4096, 4096), (37, 63, 57), (5, 7, 6), (7, 5, 5), (8, 8, 0), (0, 9, 0)],
)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_every_token_has_one_rank_and_none_more_than_one_more(shards, text, picture, references, size):
    made = shards.TokenShards.of(text, picture, references, size)
    assert sorted(made.order()) == list(range(text + picture + references))
    assert sum(made.lengths()) == text + picture + references and max(made.lengths()) - min(made.lengths()) <= 1
    assert made.order() == [at for rank in range(size) for at in rank_order(made, rank, text)]
    cached = shards.TokenShards.of(text, picture, references, size, attended=False)
    assert sorted(cached.order()) == list(range(text + picture)) and cached.order(references=True) == made.order()


def rank_order(made, rank, text):
    picture = [text + at for begin, end in made.image_ranges(rank) for at in range(begin, end)]
    return [*range(*made.text[rank]), *picture]


@pytest.mark.parametrize(
    "tokens, said",
    [
        ((2, 9, 0), "2 tokens of text"),
        ((9, 2, 0), "2 tokens of the image"),
        ((9, 0, 0), "0 tokens of the image"),
        ((9, 9, 2), "2 tokens of the reference images"),
    ],
)
def test_a_rank_without_a_share_is_refused(shards, tokens, said):
    with pytest.raises(ValueError, match=f"3 GPUs cannot share {said}"):
        shards.TokenShards.of(*tokens, 3)


# --- what is refused -------------------------------------------------------------------------------------------------


class NotFlux(torch.nn.Module):
    """A diffusion model of another shape."""

    num_heads = 4


def test_other_models_are_refused_with_what_they_lack(comfy):
    from flux2_pack.flux2.parallel.forward import shard, sharded_forward, unsupported

    assert "NotFlux) lacks forward_orig, double_blocks" in unsupported(NotFlux())[0]
    with (
        pytest.raises(ValueError, match="Several GPUs can share models of FLUX.2's shape"),
        sharded_forward(NotFlux(), types.SimpleNamespace(ulysses=2, tensor=1)),
    ):
        pass
    with pytest.raises(ValueError, match="lacks"):
        shard(
            types.SimpleNamespace(model=types.SimpleNamespace(diffusion_model=NotFlux())),
            types.SimpleNamespace(ulysses=2, tensor=1),
        )


def test_heads_that_do_not_divide_are_refused(comfy):
    from flux2_pack.flux2.parallel.forward import unsupported

    network = split_ranks.patcher().model.diffusion_model
    assert (
        unsupported(network, 4) == []
        and "Ulysses degree 5 does not divide the 12 attention heads" in unsupported(network, 5)[0]
    )
