"""Attention over several ranks equals attention on one, and faults do not pass: 2, 3 and 4 gloo ranks, started once
(attention_ranks.py).
"""

import ast
import importlib.util
import sys

import pytest
import torch

import attention_ranks
from attention_ranks import CASES, FAULTS, HEAD, HEADS, RING_FAULTS, UNEVEN
from flux2_pack.attention import reference
from flux2_pack.attention.parallel import Mesh, degrees, usp
from flux2_pack.attention.parallel.mesh import RanksLost, pairs
from flux2_pack.attention.parallel.lse_merge import merge, start
from flux2_pack.attention.parallel.timing import Stats
from pack import ROOT
import ranks

SIZES = (2, 3, 4)
EXACT = 1e-6  # relative, float32
ARRANGED = [(size, str(d)) for size in SIZES for d in pairs(size, HEADS)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return ranks.results("attention_ranks", tmp_path_factory.mktemp("ranks"), SIZES)


@pytest.mark.parametrize("size, name", ARRANGED)
def test_every_rank_gets_what_one_rank_computes(found, size, name):
    for rank in found[size]:
        errors = rank[name]["errors"]
        assert set(errors) == {case for case, row in CASES.items() if row.rings or "ring 1" in name}
        allowed = {case: 5e-3 if row.dtype == torch.bfloat16 else EXACT for case, row in CASES.items()}
        assert {case: value for case, value in errors.items() if not value <= allowed[case]} == {}


@pytest.mark.parametrize("size, name", ARRANGED)
def test_faults_are_far_above_the_tolerance(found, size, name):
    seen = found[size][0][name]["faults"]
    assert set(seen) == {*FAULTS, *(() if "ring 1" in name else RING_FAULTS)}
    assert min(seen.values()) > 1000 * EXACT


@pytest.mark.parametrize("size, name", ARRANGED)
def test_refusals_are_sentences_and_leave_the_ranks_in_step(found, size, name):
    """Every case above and below ran in the same groups as these refusals."""
    said = found[size][0][name]["refusals"]
    rings, shares = "ring 1" not in name, "Ulysses 1" not in name
    assert "should hold 4 queries and 4 keys, and has 3" in said["length"]
    assert "4 key/value heads for 12" in said["grouped heads"]
    assert ("does not divide 1 attention heads" in said["heads"]) == shares
    assert ("takes no attention mask" in said["mask"]) == rings
    assert ("needs the log-sum-exp" in said["no lse"]) == rings


@pytest.mark.parametrize("size, name", ARRANGED)
def test_a_kernel_that_fails_on_one_rank_raises_there_and_nowhere_else(found, size, name):
    for number, rank in enumerate(found[size]):
        said, intact, after = rank[name]["failing"]
        assert said == ("MemoryError: out of memory on this rank" if number == size - 1 else "")
        assert intact and after <= EXACT


@pytest.mark.parametrize("size, name", ARRANGED)
def test_stop_is_heard_before_an_exchange(found, size, name):
    first, second = found[size][0][name]["stopped"]
    assert first == "Interrupted: The work of the GPUs was stopped." and second.startswith("RanksLost: ")


def bytes_sent(size, ulysses):
    """What rank 0 sends for UNEVEN tokens of float32, with the gathering of the result."""
    row, lengths = HEADS * HEAD * 4, UNEVEN[:size]
    ring, group = size // ulysses, lengths[:ulysses]
    leaving = 3 * lengths[0] * row * (ulysses - 1) // ulysses + (sum(group) - lengths[0]) * row // ulysses
    # rank 0 passes on its group's keys, then those that it got, except the last
    groups = [sum(lengths[r * ulysses : (r + 1) * ulysses]) for r in range(ring)]
    passed = sum(2 * groups[-step % ring] * row // ulysses for step in range(ring - 1))
    return leaving + passed + lengths[0] * row * (size - 1)


@pytest.mark.parametrize("size, name", ARRANGED)
def test_one_exchange_for_q_k_and_v_and_no_byte_of_padding(found, size, name):
    ulysses, ring = int(name.split()[1]), int(name.split()[-1])
    times = found[size][0][name]["times"]
    assert times["collectives"] == 2 * (ulysses > 1) + (ring - 1) + 1 and times["forwards"] == 1
    assert times["sent"] == bytes_sent(size, ulysses)
    assert 0 < times["collective_seconds"] < times["forward_seconds"]


@pytest.mark.parametrize("size", SIZES)
def test_ranks_are_numbered_ring_by_ring(found, size):
    for number, rank in enumerate(found[size]):
        for d in pairs(size, HEADS):
            assert rank[str(d)]["place"] == [number, number % d.ulysses, number // d.ulysses]


@pytest.mark.parametrize("size", SIZES)
def test_process_groups_of_ones_own(found, size):
    for rank in found[size]:
        assert all(error <= EXACT and broadcast == [1.0, 1.0, 1.0] for error, broadcast in rank["own groups"])


@pytest.mark.parametrize("size", SIZES)
def test_a_rank_that_is_gone_is_noticed_and_said(found, size):
    first, second = found[size][0]["left alone"]
    assert first.startswith(f"RanksLost: Rank 0 of {size} could not exchange")
    assert second.startswith("RanksLost: The GPUs cannot exchange anything any more")


def test_where_weights_are_split_a_failure_names_the_process():
    """Both hold the same tokens, as rank 0 of 1 that share them."""
    mesh = Mesh(tensor=2, tensor_rank=1)
    with pytest.raises(RanksLost, match="Rank 1 of 2 could not exchange"):
        mesh.add(torch.ones(2))  # torch.distributed was never started here


def test_alone_is_the_kernel_itself(found):
    assert found[2][0]["alone"] <= EXACT
    calls = []

    def local(q, k, v, *, mask, scale, need_lse):
        calls.append((q.shape, scale, need_lse))
        return q, None

    q = torch.randn(1, 5, 3, 8)
    assert usp.attend(local, q, q, q, Mesh(), (5,), scale=0.5) is q and calls == [(q.shape, 0.5, False)]
    assert Mesh().gather(q.flatten(2), (5,)).shape == (1, 5, 24)


# --- degrees ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gpus, heads, expected",
    [
        (1, 48, (1, 1)),
        (2, 48, (2, 1)),
        (8, 48, (8, 1)),
        (8, 24, (8, 1)),
        (8, 32, (8, 1)),
        (6, 32, (2, 3)),
        (3, 32, (1, 3)),
        (7, 48, (1, 7)),
        (16, 24, (8, 2)),
    ],
)
def test_auto_takes_the_largest_ulysses_degree(gpus, heads, expected):
    chosen = degrees(gpus, heads)
    assert (chosen.ulysses, chosen.ring) == expected and chosen.size == gpus and chosen.why.endswith(".")


@pytest.mark.parametrize("asked, expected", [((0, 2), (2, 2)), ((2, 0), (2, 2)), ((1, 4), (1, 4)), ((0, 1), (4, 1))])
def test_what_is_asked_for_is_what_is_taken(asked, expected):
    chosen = degrees(4, 48, *asked)
    assert (chosen.ulysses, chosen.ring) == expected and "asked for" in chosen.why


@pytest.mark.parametrize(
    "gpus, heads, ulysses, ring, why",
    [
        (4, 48, 2, 1, "makes 2 GPUs, and 4 are used"),
        (4, 48, 3, 0, "Ulysses degree 3 does not divide 4 GPUs"),
        (4, 48, 0, 8, "Ring degree 8 does not divide 4 GPUs"),
        (4, 6, 4, 1, "Ulysses degree 4 does not divide the 6 attention heads"),
        (4, 6, 0, 1, "Ulysses degree 4 does not divide the 6 attention heads"),
        (4, 48, -1, 0, "Degrees are 0 (chosen automatically) or positive"),
    ],
)
def test_degrees_that_do_not_work_are_refused_with_those_that_do(gpus, heads, ulysses, ring, why):
    with pytest.raises(ValueError) as said:
        degrees(gpus, heads, ulysses, ring)
    assert why in str(said.value) and "Ulysses 2 x ring 2" in str(said.value)


# --- merge -----------------------------------------------------------------------------------------------------------


def merged(parts):
    """The attention of several parts joined one by one, as ring does."""
    first, *rest = parts
    out, lse = start(*first)
    for part, part_lse in rest:
        out, lse = merge(out, lse, part, part_lse)
    return out, lse


def wanted(parts):
    """The same in float64, all at once: the weighted mean, zero weight for a part without keys."""
    lses = torch.stack([lse.double() for _, lse in parts])
    outs = torch.stack(
        [torch.where(lse.transpose(1, 2).unsqueeze(-1) == float("-inf"), 0, out.double()) for out, lse in parts]
    )
    total = torch.logsumexp(lses, 0)
    weights = torch.exp(lses - total).nan_to_num(0.0)
    return (outs * weights.transpose(2, 3).unsqueeze(-1)).sum(0), total


def parts(number, spread, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return [(torch.randn(2, 6, 3, 8).to(dtype), torch.randn(2, 3, 6) * spread) for _ in range(number)]


@pytest.mark.parametrize("spread", [0.1, 3.0, 50.0, 300.0, 1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_against_float64_for_any_size_of_lse(spread, dtype):
    given = parts(4, spread, dtype)
    out, lse = merged(given)
    expected, total = wanted(given)
    assert reference.relative_error(out, expected) < 5e-7 and out.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), total, rtol=2e-7, atol=2e-6)


def test_merge_keeps_rows_that_one_side_saw_no_key_for():
    """Kernels leave zeros or NaN in a row without keys, and -inf as its lse."""
    given = parts(3, 2.0)
    nothing = float("-inf")
    given[0][0][:, 0], given[0][1][..., 0] = float("nan"), nothing  # the first part has no keys for row 0
    given[1][0][:, 1], given[1][1][..., 1] = float("nan"), nothing  # the second none for row 1
    for out, lse in given[1:]:
        out[:, 2], lse[..., 2] = float("nan"), nothing  # only the first has some for row 2
    out, lse = merged(given)
    expected, total = wanted(given)
    assert out.isfinite().all() and reference.relative_error(out, expected) < 5e-7
    torch.testing.assert_close(lse.double(), total, rtol=2e-7, atol=2e-6)


def test_what_was_given_to_a_merge_is_not_written_to():
    given = parts(3, 2.0)
    before = [(out.clone(), lse.clone()) for out, lse in given]
    merged(given)
    assert all(torch.equal(a, b) for part, kept in zip(given, before) for a, b in zip(part, kept))


def test_merge_of_rows_without_any_key_stays_without_weight():
    given = [(torch.full((1, 2, 1, 4), float("nan")), torch.full((1, 1, 2), float("-inf"))) for _ in range(2)]
    out, lse = merged(given)
    assert (out == 0).all() and (lse == float("-inf")).all()
    later, later_lse = merge(out, lse, torch.ones(1, 2, 1, 4), torch.zeros(1, 1, 2))
    assert (later == 1).all() and (later_lse == 0).all()


def test_merge_of_the_parts_of_a_real_attention():
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, n, 3, 16) for n in (9, 40, 40))
    expected, total = reference.attend(q, k, v, dtype=torch.float64)
    out, lse = merged([reference.attend(q, k[:, a:b], v[:, a:b]) for a, b in ((0, 1), (1, 25), (25, 40))])
    assert reference.relative_error(out, expected) < 5e-7
    torch.testing.assert_close(lse.double(), total, rtol=1e-6, atol=1e-6)


# --- the cost model of benchmarks/parallel_model.py
# --------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    spec = importlib.util.spec_from_file_location("parallel_model", ROOT / "benchmarks" / "parallel_model.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("size, name", ARRANGED)
def test_the_cost_model_counts_the_bytes_that_are_sent(found, model, size, name):
    tokens = sum(UNEVEN[:size])
    work = model.Work(1.0, 0.1, tokens=tokens, width=HEADS * HEAD, heads=HEADS, blocks=1, item_bytes=4)
    layout = model.Layout(int(name.split()[1]), int(name.split()[-1]))
    gathered = tokens * HEADS * HEAD * 4 * (size - 1)
    sent = sum(rank[name]["times"]["sent"] for rank in found[size]) - gathered
    assert sent == pytest.approx(size * (model.ulysses_bytes(work, layout)[0] + model.ring_bytes(work, layout)))


def test_the_cost_model_adds_up(model):
    work, links = model.Work(400.0, 52.0, fixed_ms=4.0), model.Links(host_us=0.0, network_us=0.0)
    four = model.predict(work, model.Layout(4, 1), links)
    assert four["compute_ms"] == pytest.approx(4 + 396 / 4) and four["ring_ms"] == 0
    assert four["ulysses_ms"] == pytest.approx(56 * 4 * 1152 * 6144 * 2 * 3 / 4 / 330e6)
    assert four["ms"] == pytest.approx(sum(four[part] for part in ("compute_ms", "ulysses_ms", "ring_ms", "gather_ms")))
    assert four["speedup"] == pytest.approx(400 / four["ms"])
    assert model.predict(work, model.Layout(4, 1), model.Links(hidden=1.0))["ulysses_ms"] == 0
    one_host, two_hosts = (model.predict(work, model.Layout(8, 1, hosts), links)["ulysses_ms"] for hosts in (1, 2))
    assert two_hosts == pytest.approx(one_host * (4 / 7) * 330 / 45), "four of seven peers are behind the network"


def test_the_cost_model_takes_every_part_from_two_gpus(model):
    """A step whose parts the model made itself is predicted on four GPUs from its two-GPU case alone."""
    true, links = model.Work(440.0, 52.0, fixed_ms=14.0, waiting_ms=5.0), model.Links(host_gbs=180.0)
    two = model.predict(true, model.Layout(2, 1), links)
    sent = model.ulysses_bytes(true, model.Layout(2, 1))[0] / 1e6
    case = {"gpus": 2, "ulysses": 2, "one_gpu_ms": 440.0, "sent_mb": sent, "tokens": [2304, 2304]}
    case |= {"ms": two["ms"] - two["gather_ms"], "exchange_ms": two["ulysses_ms"], "compute_ms": two["compute_ms"]}
    found = model.predict(
        *model.from_two_gpus(model.Work(0.0, 52.0), model.Links(), case)[:1], model.Layout(4, 1), links
    )
    assert found == pytest.approx(model.predict(true, model.Layout(4, 1), links))
    assert model.from_two_gpus(model.Work(0.0, 52.0), model.Links(), case)[1].host_gbs == pytest.approx(180.0)
    with pytest.raises(ValueError, match="compute_ms"):
        model.from_two_gpus(true, links, {name: case[name] for name in case if name != "compute_ms"})


def test_the_cost_model_takes_the_fixed_part_from_measurements(model):
    links, true = model.Links(), model.Work(400.0, 52.0, fixed_ms=6.0)
    measured = [
        (layout, model.predict(true, layout, links)["ms"])
        for layout in (model.Layout(1, 1), model.Layout(2, 1), model.Layout(4, 1))
    ]
    assert model.fitted(model.Work(400.0, 52.0), links, measured).fixed_ms == pytest.approx(6.0)
    assert [str(layout) for layout in model.layouts(model.Work(1, 1, heads=6))] == [
        "1 GPU, 1 host, Ulysses 1 x ring 1",
        "2 GPUs, 1 host, Ulysses 2 x ring 1",
        "8 GPUs, 1 host, Ulysses 1 x ring 8",
        "2 GPUs, 1 host, Ulysses 1 x ring 1, weights over 2",
        "16 GPUs, 2 hosts, Ulysses 1 x ring 16",
    ]


def test_the_cost_model_knows_what_split_weights_exchange(model):
    """FLUX.2-dev at 1024x1024: 64 all-reduces of 57 MB on two GPUs, 12 ms at 300 GB/s."""
    work, links = model.Work(438.0, 52.0), model.Links(host_gbs=300.0, host_us=0.0)
    assert model.addition_bytes(work, model.Layout(1, 1, parts=2)) == 64 * 4608 * 6144 * 2
    found = model.predict(work, model.Layout(1, 1, parts=2), links)
    assert found["weights_ms"] == pytest.approx(12.1, abs=0.1) and found["ms"] == pytest.approx(
        219 + found["weights_ms"]
    )
    assert model.addition_bytes(work, model.Layout(2, 1, parts=2)) == 32 * 4608 * 6144 * 2, "half of the tokens"
    assert model.addition_bytes(work, model.Layout(4, 1)) == model.addition_ms(work, model.Layout(4, 1), links) == 0
    assert "2 x 5 parts does not divide 48 heads" in model.impossible(work, model.Layout(2, 1, parts=5))


# --- the rest --------------------------------------------------------------------------------------------------------


def test_times_add_up_and_begin_again():
    stats = Stats("cpu")
    with stats.forward():
        with stats.collective(12):
            pass
        with stats.collective(None):
            pass
    times = stats.read()
    assert (times.forwards, times.collectives, times.sent) == (
        1,
        1,
        12,
    ) and 0 < times.collective_seconds < times.forward_seconds
    assert times.as_data()["compute_seconds"] == pytest.approx(times.forward_seconds - times.collective_seconds)
    stats.reset()
    assert stats.read().forwards == 0


def test_the_package_knows_torch_alone_and_no_backend():
    from flux2_pack.attention import registry

    for file in (ROOT / "attention" / "parallel").glob("*.py"):
        tree = ast.parse(file.read_text())
        named = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
        named |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0}
        # imported when symmetric memory is used: see test_symmetric_memory.py
        kernels = {"triton"} if file.name == "symmetric_kernels.py" else set()
        assert {name.split(".")[0] for name in named} <= {"torch", *kernels, *sys.stdlib_module_names}, file.name
        of_attention = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level > 1}
        assert of_attention <= {"errors", "tiles"}, file.name
        words = {
            value for node in ast.walk(tree) if isinstance(node, ast.Constant) for value in str(node.value).split()
        }
        assert not words & set(registry.ROWS), file.name


def test_the_reference_itself_sees_the_cases():
    """The tensors of the cases are such that a mask, a scale and the additional keys matter."""
    for name in ("key mask", "full mask, one per head", "a scale"):
        case = CASES[name]
        q, k, v, mask, _, _ = attention_ranks.whole(case, 4)
        with_it, without = (
            reference.attend(q, k, v, **options)[0] for options in ({"mask": mask, "scale": case.scale}, {})
        )
        assert reference.relative_error(with_it, without) > 0.05, name
