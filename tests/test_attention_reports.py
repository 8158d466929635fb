"""A report says what ran and nothing else: counted once it is computed, in the sampling it belongs to, by the kernel
that computed; calls left to others are said to be theirs.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from flux2_pack.attention import registry
from flux2_pack.attention.call import AttentionRefused
from flux2_pack.attention.dispatch import AttentionDispatcher, Decision
from flux2_pack.attention.override import AttentionOverride
from flux2_pack.attention.run_log import RunLog

H = 4


def qkv(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 24, H * 16, generator=generator) for _ in range(3)]


def bshd():
    return [t.unflatten(-1, (H, 16)) for t in qkv()]


def core_attention(q, k, v, heads, mask=None, skip_reshape=False, **kwargs):
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def entries(dispatcher):
    return [(e["backend"], e["kernel"], e["calls"]) for e in dispatcher.log.current.as_data()["entries"]]


def test_a_call_is_counted_when_it_has_been_computed(monkeypatch):
    dispatcher = AttentionDispatcher("sdpa-math")
    adapter = registry._module("sdpa")[0].ADAPTERS["sdpa-math"]
    real, calls = type(adapter).run, []

    def fails_in_the_third(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return real(self, *arguments)

    monkeypatch.setattr(type(adapter), "run", fails_in_the_third)
    run = dispatcher.begin_run(1)
    with pytest.raises(RuntimeError):
        for _ in range(5):
            dispatcher.attend(*bshd())
    dispatcher.log.end(run, error="RuntimeError: CUDA error")
    assert run.calls == 2


def test_calls_after_a_sampling_are_not_counted_into_it():
    dispatcher = AttentionDispatcher("sdpa")
    run = dispatcher.begin_run(1)
    dispatcher.attend(*bshd())
    dispatcher.log.end(run, torch.ones(1))
    before, forwards = run.as_text(), run.forwards
    with dispatcher.forward(None, 0):
        dispatcher.attend(*bshd())
    assert run.calls == 1 and run.as_text() == before and run.forwards == forwards
    assert dispatcher.log.current is run and dispatcher.log.outside.calls == 1


def test_a_backend_that_leaves_attention_to_comfyui_counts_it_and_names_what_computed():
    dispatcher = AttentionDispatcher("comfyui")
    q, k, v = qkv()
    out = AttentionOverride(dispatcher)(core_attention, q, k, v, H)
    torch.testing.assert_close(out, core_attention(q, k, v, H))
    assert entries(dispatcher) == [("comfyui", "test_attention_reports.core_attention", 1)]
    assert "comfyui (test_attention_reports.core_attention) \u00b7 1 attention call" in dispatcher.log.current.as_text()


def test_what_was_in_the_slot_before_is_comfyuis_own_too():
    def other_pack(func, *args, **kwargs):
        return func(*args, **kwargs)

    dispatcher = AttentionDispatcher("comfyui")
    AttentionOverride(dispatcher, other_pack)(core_attention, *qkv(), H)
    ((_, kernel, _),) = entries(dispatcher)
    assert (
        kernel.endswith("other_pack") and "It computed 1 calls that were left to it" in dispatcher.log.current.as_text()
    )


def test_a_delegated_call_that_fails_is_not_counted():
    def fails(*args, **kwargs):
        raise RuntimeError("no kernel")

    dispatcher = AttentionDispatcher("comfyui")
    with pytest.raises(RuntimeError):
        AttentionOverride(dispatcher)(fails, *qkv(), H)
    assert dispatcher.log.current is None


def test_comfyuis_own_attention_gives_no_log_sum_exp_and_says_so():
    with pytest.raises(
        AttentionRefused, match="A ring over several GPUs needs the log-sum-exp.*ComfyUI's own"
    ) as caught:
        AttentionDispatcher("comfyui").attend(*bshd(), need_lse=True)
    assert "ring degree of 1" in str(caught.value)
    assert isinstance(AttentionDispatcher("comfyui").attend(*bshd()), Decision)


def test_a_compiled_graph_computes_comfyuis_own_by_pytorch_and_says_so():
    torch._dynamo.reset()
    dispatcher = AttentionDispatcher("comfyui")
    override = AttentionOverride(dispatcher)
    q, k, v = qkv()
    compiled = torch.compile(lambda q, k, v: override(core_attention, q, k, v, H), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), core_attention(q, k, v, H))
    ((backend, _, calls),) = entries(dispatcher)
    assert (backend, calls) == ("sdpa", 1) and "cannot be delegated" in dispatcher.log.current.as_text()


# --- the name of the kernel ------------------------------------------------------------------------------------------


def test_the_kernel_is_the_one_that_pytorch_takes_in_this_very_call():
    """Another pack may restrict PyTorch for a while; the name follows."""
    dispatcher = AttentionDispatcher("sdpa")
    dispatcher.attend(*bshd())
    with sdpa_kernel(SDPBackend.MATH):
        dispatcher.attend(*bshd())
    dispatcher.attend(*bshd())
    assert entries(dispatcher) == [("sdpa", "PyTorch flash", 2), ("sdpa", "PyTorch math", 1)]


def test_a_narrower_v_and_a_mask_with_a_gradient_are_other_calls():
    dispatcher, (q, k, v) = AttentionDispatcher("sdpa"), bshd()
    dispatcher.attend(q, k, v)
    with torch.no_grad():
        narrow = v[..., :8]
        out, _ = dispatcher.attend(q, k, narrow)
    assert out.shape[-1] == 8
    kernels = {kernel for _, kernel, _ in entries(dispatcher)}
    assert kernels == {"PyTorch flash", "PyTorch math"}, kernels


# --- a mask that hides nothing ---------------------------------------------------------------------------------------


def test_a_mask_in_which_nothing_is_hidden_costs_nothing(monkeypatch):
    from flux2_pack.attention import dispatch

    monkeypatch.setattr(dispatch, "attend_kept", lambda *_, **__: pytest.fail("keys were copied"))
    dispatcher = AttentionDispatcher("sdpa")
    for mask in (torch.ones(1, 24, dtype=torch.bool), torch.zeros(1, 1, 1, 24)):
        torch.testing.assert_close(dispatcher.attend(*bshd(), mask=mask)[0], dispatcher.attend(*bshd())[0])
    (entry,) = dispatcher.log.current.as_data()["entries"]
    assert "mask" not in entry["call"] and entry["calls"] == 4


# --- the end of a sampling -------------------------------------------------------------------------------------------


def sampled(dispatcher, output, slot=None, calls=1):
    """What `during_sampling` returns around a sampler that gives `output`."""
    from flux2_pack.flux2 import attention_slot

    class Executor:
        class_obj = SimpleNamespace(model_options={"transformer_options": {attention_slot.SLOT: slot}})

        def __call__(self, *args):
            for _ in range(calls):
                dispatcher.attend(*bshd())
            return output

    return attention_slot.during_sampling(dispatcher)(Executor(), None, None, None, [1, 0])


def test_a_log_that_fails_after_the_last_step_costs_no_image(comfy, monkeypatch, caplog):
    monkeypatch.setattr(RunLog, "end", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    image = torch.ones(1, 4)
    assert sampled(AttentionDispatcher("sdpa"), image) is image and "could not be noted" in caplog.text


def test_a_latent_that_cannot_be_summed_is_still_an_image(comfy):
    """A tensor type of somebody else."""

    class Strange:
        device = torch.device("cpu")

        def detach(self):
            raise TypeError("not here")

    dispatcher, latent = AttentionDispatcher("sdpa"), Strange()
    assert sampled(dispatcher, latent) is latent and dispatcher.log.current.seconds is not None


def test_another_pack_in_front_is_named(comfy):
    def wrapping(func, *args, **kwargs):
        pass

    dispatcher = AttentionDispatcher("sdpa")
    sampled(dispatcher, torch.ones(1), slot=wrapping)
    text = dispatcher.log.current.as_text()
    assert "stood in front of this one during the sampling: " in text and "wrapping" in text
    sampled(dispatcher, torch.ones(1), slot=wrapping, calls=0)
    text = dispatcher.log.current.as_text()
    assert "took its place" in text and "wrapping" in text and "compiled" not in text
    sampled(dispatcher, torch.ones(1), slot=AttentionOverride(dispatcher))
    assert dispatcher.log.current.in_front is None


@pytest.mark.parametrize("options", [{}, {"model_options": None}])
def test_a_guider_of_another_pack_without_options_costs_no_image(comfy, options):
    from flux2_pack.flux2 import attention_slot

    dispatcher, image = AttentionDispatcher("sdpa"), torch.ones(1)

    class Executor:
        class_obj = SimpleNamespace(**options)

        def __call__(self, *args, **kwargs):
            return image

    out = attention_slot.during_sampling(dispatcher)(Executor(), image, image, None, [1.0, 0.0])
    assert out is image and dispatcher.log.current.error is None


def test_a_wrapped_selector_is_found_by_the_report(comfy, small_models):
    """Another pack wraps our override and calls it: the calls are counted, and the report is not 'no node is there'."""
    import comfy.sd
    from flux2_pack.flux2 import attention_slot
    from flux2_pack.flux2.measuring import capture, sampling
    from flux2_pack.flux2.select_attention import select
    from flux2_pack.nodes.attention import report

    model = comfy.sd.load_diffusion_model(str(small_models["model"]))
    clone, _ = select(model, "sdpa")
    ours = attention_slot.override_of(clone)

    def wrapper_of_another_pack(func, *args, **kwargs):
        return ours(func, *args, **kwargs)

    clone = clone.clone()
    clone.model_options["transformer_options"][attention_slot.SLOT] = wrapper_of_another_pack
    with torch.inference_mode():
        job = capture.sampling_job(clone, capture.Size(64, 64), capture.random_conditioning(clone), 1)
        latent = sampling.run(clone, job, None)
    text, data = report(clone, latent)
    assert data["calls"] == 6 and "wrapper_of_another_pack" in text and data["override_in_front"]


# --- a second kernel -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"edge_backend": "sdpa-math"}, "it would compute nothing"),
        ({"first_steps": 5}, "no second kernel is chosen"),
        ({"last_blocks": 1}, "no second kernel is chosen"),
    ],
)
def test_a_second_kernel_without_a_place_and_a_place_without_a_kernel_are_refused(comfy, inputs, words):
    from flux2_pack.flux2.select_attention import select

    with pytest.raises(ValueError, match=words) as caught:
        select(None, "sdpa", **inputs)
    assert caught.value.topic == "first-and-last-steps-and-blocks"


def test_compare_refuses_it_too(comfy):
    from flux2_pack.nodes.compare import Flux2CompareAttention

    with pytest.raises(ValueError, match="it would compute nothing"):
        Flux2CompareAttention.execute(None, None, None, None, 0, positive=[], edge_backend="sdpa")
