"""ComfyUI's override contract over every combination of its arguments; selections, schedules, the log; compiled
graphs.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from flux2_pack.attention import registry
from flux2_pack.attention.call import AttentionRefused
from flux2_pack.attention.override import AttentionOverride, Observer
from flux2_pack.attention.dispatch import Schedule, AttentionDispatcher

B, S, H, D = 2, 40, 4, 16
CPU_BACKENDS = ["auto", "sdpa", "sdpa-flash", "sdpa-math"]


def core(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs):
    """Core's attention_pytorch, from its contract: what an override must reproduce."""
    if not skip_reshape:
        d = q.shape[-1] // heads
        q, k, v = (t.unflatten(-1, (-1, d)).transpose(1, 2) for t in (q, k, v))
    if mask is not None:
        mask = mask[None] if mask.ndim == 2 else mask
        mask = mask[:, None] if mask.ndim == 3 else mask
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=kwargs.get("scale"), enable_gqa=kwargs.get("enable_gqa", False)
    )
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def qkv(skip_reshape, kv_heads=H):
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(B, S, h, D, generator=g) for h in (H, kv_heads, kv_heads))
    return [t.transpose(1, 2) if skip_reshape else t.flatten(2) for t in (q, k, v)]


def masks():
    keep = torch.ones(B, S, dtype=torch.bool)
    keep[0, :5] = False
    causal = torch.ones(S, S, dtype=torch.bool).tril()
    return {
        "none": None,
        "keys": keep[:, None, None],
        "causal 2d": causal,
        "causal 3d": causal[None].expand(B, S, S),
        "additive": torch.randn(1, 1, S, S),
    }


def refuse_to_be_called(*args, **kwargs):
    raise AssertionError("core's function must not be called")


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("mask", masks())
def test_every_combination_of_cores_arguments(backend, mask):
    override = AttentionOverride(AttentionDispatcher(backend))
    for skip_reshape, skip_output, gqa, scale in itertools.product(
        [False, True], [False, True], [False, True], [None, 0.2]
    ):
        options = {
            "mask": masks()[mask],
            "skip_reshape": skip_reshape,
            "skip_output_reshape": skip_output,
            "some_future_argument": 1,
            "attn_precision": None,
        }
        options |= {"scale": scale} if scale else {}
        options |= {"enable_gqa": True} if gqa else {}
        q, k, v = qkv(skip_reshape, kv_heads=2 if gqa else H)
        expected = core(q, k, v, H, **options)
        out = override(refuse_to_be_called, q, k, v, H, **options, transformer_options={}, _inside_attn_wrapper=True)
        assert out.shape == expected.shape
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)


def test_a_refused_call_stops_with_every_reason(monkeypatch):
    only_keys(monkeypatch)
    override = AttentionOverride(AttentionDispatcher("sdpa-flash"))
    with pytest.raises(AttentionRefused, match="takes no attention mask") as caught:
        override(refuse_to_be_called, *qkv(True), H, mask=masks()["causal 2d"], skip_reshape=True)
    assert "use SDPA and report" in str(caught.value)


def test_or_is_computed_by_pytorch_and_reported(monkeypatch):
    only_keys(monkeypatch)
    dispatcher = AttentionDispatcher("sdpa-flash", unsupported="use SDPA and report")
    q, k, v = qkv(True)
    out = AttentionOverride(dispatcher)(refuse_to_be_called, q, k, v, H, mask=masks()["causal 2d"], skip_reshape=True)
    torch.testing.assert_close(out, core(q, k, v, H, mask=masks()["causal 2d"], skip_reshape=True))
    (entry,) = dispatcher.log.current.as_data()["entries"]
    assert entry["backend"] == "sdpa" and "takes no attention mask" in entry["why"] and entry["calls"] == 1


def only_keys(monkeypatch):
    """Make sdpa-flash a kernel without masks, as it is on a GPU."""
    adapter = registry._module("sdpa")[0].ADAPTERS["sdpa-flash"]
    from flux2_pack.attention.call import Limits

    monkeypatch.setattr(type(adapter), "unsupported", lambda self, call: Limits(dtypes=(torch.float32,)).reasons(call))


def quantised(monkeypatch):
    import dataclasses

    monkeypatch.setitem(registry.ROWS, "sdpa-math", dataclasses.replace(registry.ROWS["sdpa-math"], exact=False))


def test_calls_that_ask_for_full_precision_go_back_to_whoever_was_there(monkeypatch):
    quantised(monkeypatch)
    seen = []

    def previous(func, *args, **kwargs):
        seen.append(kwargs)
        return func(*args, **kwargs)

    dispatcher = AttentionDispatcher("sdpa-math")
    override = AttentionOverride(dispatcher, previous)
    q, k, v = qkv(False)
    out = override(core, q, k, v, H, low_precision_attention=False, scale=0.3)
    torch.testing.assert_close(out, core(q, k, v, H, scale=0.3))
    assert seen[0]["low_precision_attention"] is False and seen[0]["scale"] == 0.3
    AttentionOverride(dispatcher)(core, q, k, v, H, low_precision_attention=False)
    entries = dispatcher.log.current.as_data()["entries"]
    assert [(e["backend"], e["calls"]) for e in entries] == [("delegated", 1)] * 2
    assert all("full precision" in e["why"] for e in entries)
    assert entries[0]["kernel"].endswith("previous") and entries[1]["kernel"].endswith(".core")


def selected_after(override, dispatcher):
    """What is in the slot after Select Attention found `override` there."""
    from flux2_pack.flux2 import attention_slot

    model = SimpleNamespace(
        model_options={"transformer_options": {attention_slot.SLOT: override}},
        remove_wrappers_with_key=lambda *_: None,
        add_wrapper_with_key=lambda *_: None,
        set_attachments=lambda *_: None,
    )
    attention_slot.select(model, dispatcher)
    return attention_slot.override_of(model)


def test_a_previous_override_is_kept_and_named_and_ours_is_replaced(comfy):
    def foreign_override(func, *args, **kwargs):
        raise AssertionError

    first, second = AttentionDispatcher("sdpa"), AttentionDispatcher("sdpa-math")
    override = selected_after(AttentionOverride(first, foreign_override), second)
    assert override.previous is foreign_override
    looked_through = selected_after(Observer(AttentionOverride(first, foreign_override)), second)
    assert looked_through.previous is foreign_override
    assert selected_after(Observer(foreign_override), AttentionDispatcher("sdpa")).previous is foreign_override
    override(refuse_to_be_called, *qkv(False), H)
    assert first.log.current is None and second.log.current.calls == 1
    assert "foreign_override" in second.log.current.previous and "foreign_override" in second.log.current.as_text()


def test_an_unknown_backend_or_policy_is_refused_when_it_is_chosen():
    for make in (
        lambda: AttentionDispatcher("flash5"),
        lambda: AttentionDispatcher("sdpa", schedule=Schedule("flash5")),
    ):
        with pytest.raises(ValueError, match="no attention backend 'flash5'"):
            make()
    with pytest.raises(ValueError, match="'error' or 'use SDPA and report'"):
        AttentionDispatcher("sdpa", unsupported="ignore")


def backends_used(schedule, steps, blocks=(("double", 2), ("single", 3)), counted=False):
    """Which backend computes each block of each step: a list of strings per step, 1 for the edge backend."""
    dispatcher = AttentionDispatcher("sdpa", schedule=schedule)
    dispatcher.begin_run(steps)
    q, k, v = (torch.zeros(1, 4, 1, 8) for _ in range(3))
    used = []
    for step in range(steps):
        line = ""
        with dispatcher.forward(step, steps):
            for kind, number in ((kind, i) for kind, n in blocks for i in range(n)):
                before = {e.backend: e.calls for e in dispatcher.log.current.kinds()}
                dispatcher.attend(q, k, v, block=None if counted else (kind, number))
                after = {e.backend: e.calls for e in dispatcher.log.current.kinds()}
                line += "1" if after.get("sdpa-math", 0) > before.get("sdpa-math", 0) else "0"
        used.append(line)
    return used


@pytest.mark.parametrize("counted", [False, True])
def test_schedules_of_steps_and_blocks(counted):
    blocks = (("double", 2), ("single", 3))
    assert backends_used(Schedule("sdpa-math", 1, 2, blocks=blocks), 5, counted=counted) == [
        "11111",
        "00000",
        "00000",
        "11111",
        "11111",
    ]
    assert backends_used(Schedule("sdpa-math", 0, 1, 1, 2, blocks), 3, counted=counted) == ["10011", "10011", "11111"]
    assert backends_used(Schedule("sdpa-math", first_blocks=3, blocks=blocks), 2, counted=counted) == ["11100", "11100"]


def test_a_schedule_says_what_it_cannot_do():
    with pytest.raises(ValueError, match="does not say how many blocks"):
        Schedule("sdpa", first_blocks=1)
    with pytest.raises(ValueError, match="cannot be negative"):
        Schedule("sdpa", first_steps=-1)


def test_the_log_counts_kinds_of_calls_and_keeps_runs_apart():
    dispatcher = AttentionDispatcher("sdpa")
    override = AttentionOverride(dispatcher)
    for steps in (2, 3):
        run = dispatcher.begin_run(steps)
        with dispatcher.forward(0, steps):
            for _ in range(steps):
                override(refuse_to_be_called, *qkv(True), H, skip_reshape=True)
            override(refuse_to_be_called, *qkv(True), H, skip_reshape=True, mask=masks()["causal 2d"])
        dispatcher.log.end(run, torch.full((1, 2, 3), float(steps)))
    data = dispatcher.log.current.as_data()
    assert (
        data["backend"] == "sdpa"
        and data["calls"] == 4
        and data["steps"] == 3
        and sorted(e["calls"] for e in data["entries"]) == [1, 3]
    )
    assert data["seconds_per_step"] > 0 and "PyTorch" in data["entries"][0]["library"]
    earlier, found = dispatcher.log.find(fingerprint_of(2.0))
    assert found and earlier.steps == 2
    newest, found = dispatcher.log.find(fingerprint_of(7.0))
    assert not found and newest.steps == 3
    assert "4 calls" not in dispatcher.log.current.as_text() and "3 calls: sdpa" in dispatcher.log.current.as_text()


def test_a_model_that_never_asks_is_said_loudly(caplog):
    dispatcher = AttentionDispatcher("sdpa-math")
    run = dispatcher.begin_run(2)
    with dispatcher.forward(0, 2):
        pass
    assert "No attention call has been seen yet" in run.as_text()
    dispatcher.log.end(run, torch.zeros(1))
    assert (
        "computed nothing" in run.as_text()
        and "compile node after Select Attention" in caplog.text
        and run.as_data()["calls"] == 0
    )


def fingerprint_of(value):
    from flux2_pack.attention.run_log import latent_fingerprint

    return latent_fingerprint(torch.full((1, 2, 3), value))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_graph_breaks_and_still_counted(backend, dynamic):
    torch._dynamo.reset()
    dispatcher = AttentionDispatcher(backend)
    override = AttentionOverride(dispatcher)

    def block(q, k, v, index):
        options = {"block_type": "double", "block_index": index}
        return override(refuse_to_be_called, q * 2, k, v, H, skip_reshape=True, transformer_options=options) + 1

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (40, 56):
        q, k, v = (torch.randn(B, length, H, D).transpose(1, 2) for _ in range(3))
        torch.testing.assert_close(
            compiled(q, k, v, 1), core(q * 2, k, v, H, skip_reshape=True) + 1, rtol=1e-5, atol=2e-6
        )
    assert dispatcher.log.current.calls == 2


def test_a_graph_computes_for_the_selection_of_the_running_model(monkeypatch):
    """Core's compile node drops the guards on transformer_options, so one graph serves selections that came later, and
    none.
    """
    torch._dynamo.reset()
    first, second = AttentionDispatcher("sdpa-math"), AttentionDispatcher("sdpa-flash")
    overrides = {"x": AttentionOverride(first)}

    def block(q, k, v, transformer_options):
        return transformer_options["x"](refuse_to_be_called, q, k, v, H, skip_reshape=True)

    compiled = torch.compile(
        block,
        fullgraph=True,
        backend="aot_eager",
        options={"guard_filter_fn": lambda entries: ["transformer_options" not in e.name for e in entries]},
    )
    for chosen in (first, second, first):
        with chosen.forward(None, 0):
            torch.testing.assert_close(compiled(*qkv(True), overrides), core(*qkv(True), H, skip_reshape=True))
        overrides["x"] = AttentionOverride(second)
    assert (first.log.current.calls, second.log.current.calls) == (2, 1)
    compiled(*qkv(True), overrides)  # the node was removed: nobody's forward pass
    assert (first.log.current.calls, second.log.current.calls) == (2, 1)


def test_the_fake_of_the_operator_tells_the_truth():
    from flux2_pack.attention import ops

    dispatcher = AttentionDispatcher("sdpa-math")
    mask = masks()["keys"]
    for need_lse in (False, True):
        for q in (torch.randn(B, S, H, D), torch.randn(B, H, S, D).transpose(1, 2)):
            torch.library.opcheck(
                ops._attend,
                (q, q.clone(), q.clone(), mask, 0.25, need_lse, False, dispatcher.number),
                test_utils=("test_schema", "test_faketensor"),
            )


def test_a_compiled_call_for_full_precision_is_exact(monkeypatch):
    quantised(monkeypatch)
    torch._dynamo.reset()
    dispatcher = AttentionDispatcher("sdpa-math")
    override = AttentionOverride(dispatcher)
    compiled = torch.compile(
        lambda q, k, v: override(core, q, k, v, H, low_precision_attention=False), fullgraph=True, backend="aot_eager"
    )
    q, k, v = qkv(False)
    torch.testing.assert_close(compiled(q, k, v), core(q, k, v, H))
    (entry,) = dispatcher.log.current.as_data()["entries"]
    assert entry["backend"] == "sdpa" and "cannot be delegated" in entry["why"], "PyTorch computed, and that is said"
