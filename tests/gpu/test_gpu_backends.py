"""Attention backends on the GPU that is here: each that can run, by the tables of test_attention_backends.py; what auto
measures; and the text encoder with grouped heads and a mask.
"""

import pytest
import torch

from devices import TOLERANCE
from flux2_pack.attention import autotune, reference, registry
from flux2_pack.attention.call import AttentionRefused, call_of
from flux2_pack.attention.dispatch import AttentionDispatcher
from test_attention_backends import (
    DEVICE,
    RUNNABLE,
    tensors,
    test_grouped_heads,
    test_log_sum_exp_is_natural_and_in_batch_head_query_order,
    test_masks_on_the_kernels_that_take_them,
    test_output_against_float32,
    test_scale_is_used,
    test_tensors_with_heads_first_give_the_same,
)

pytestmark = pytest.mark.gpu
EXACT = [slug for slug in RUNNABLE if registry.row(slug).exact]


def drawn(length):
    """q, k, v of `length` tokens with FLUX.2's heads of 128, in the dtype that the device computes in."""
    dtype = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
    return tensors(b=1, q_len=length, kv_len=length, heads=8, kv_heads=8, d=128, dtype=dtype)


def test_auto_takes_the_fastest_of_what_it_measured_and_remembers_it(tmp_path):
    q, k, v = drawn(4608 if DEVICE.type == "cuda" else 256)
    call, file = call_of(q, k, v), tmp_path / "auto.json"
    slug, table = autotune.Tuner(file).choose(call, q, k, v)
    if DEVICE.type == "cpu":
        assert not table.timed and "fixed order" in table.why
        return
    ms = {row.backend: row.ms for row in table.candidates if row.ms is not None}
    assert "sdpa" in ms and min(ms, key=ms.get) == slug and min(ms.values()) > 0
    assert set(ms) | {row.backend for row in table.candidates if row.reason} == set(autotune.candidates(call.device))
    assert all(row.error < 2 * TOLERANCE["bfloat16"] for row in table.candidates if row.ms is not None)
    again, remembered = autotune.Tuner(file).choose(call, q, k, v)
    assert again == slug and remembered.why == "measured earlier on this machine"


@pytest.mark.gpu(cpu=False)
def test_what_auto_took_is_still_among_the_fastest_when_measured_again():
    """Times of one process; a quarter for the clocks, which move with the temperature."""
    q, k, v = drawn(4608)
    call = call_of(q, k, v)
    slug, table = autotune.Tuner().choose(call, q, k, v)
    kept = [row.backend for row in table.candidates if row.ms is not None]
    ms = autotune.race({s: autotune.bound(registry.adapter(s, call.device), q, k, v, None, None, None) for s in kept})
    assert ms[slug] <= 1.25 * min(ms.values()), ms


def test_auto_computes_and_says_what_it_took():
    q, k, v = drawn(1024 if DEVICE.type == "cuda" else 128)
    dispatcher = AttentionDispatcher("auto", tuner=autotune.Tuner())
    out, _ = dispatcher.attend(q, k, v)
    assert reference.relative_error(out, reference.attend(q, k, v)[0]) <= TOLERANCE["bfloat16"]
    assert dispatcher.log.current.calls == 1


# 30 layers, each with roundings of its own
@pytest.mark.parametrize("precision, most", [("float32", 1e-4), ("bf16", 4 * TOLERANCE["bfloat16"])])
@pytest.mark.parametrize("backend", ["auto", *EXACT])
def test_the_text_encoders_conditioning_is_cores(comfy, small_models, backend, precision, most):
    """Grouped heads under a causal mask, heads first: some kernels take one of the three and not all."""
    from flux2_pack.flux2.loading import load
    from flux2_pack.nodes import attention

    def encode(clip):
        return clip.encode_from_tokens_scheduled(clip.tokenize("a cat with a hat"))[0][0]

    def clip():
        return load.load_text_encoder(str(small_models["text_encoder"]), precision=precision)

    expected = encode(clip())
    try:
        chosen = attention.choose_encoder_attention(clip(), backend)
        out = encode(chosen)
    except (AttentionRefused, ValueError) as error:
        pytest.skip(str(error).replace("\n", " ")[:300])
    run = chosen.patcher.attachments["flux2_attention"].log.current
    assert run.calls == 30 and reference.relative_error(out, expected) <= most
