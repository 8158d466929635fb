"""The text encoder's own attention choice: the same conditioning, only on this CLIP, kept when ComfyUI loads the
weights again.
"""

import pytest
import torch


@pytest.fixture(scope="module")
def nodes(comfy):
    from flux2_pack.nodes import attention

    return attention


def load(small_models):
    from flux2_pack.flux2.loading import load

    return load.load_text_encoder(str(small_models["text_encoder"]))


def encode(clip, text="a cat with a hat"):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0]


@pytest.mark.parametrize("backend", ["auto", "sdpa", "sdpa-math"])
def test_the_conditioning_is_cores(nodes, small_models, backend):
    expected = encode(load(small_models))
    clip = nodes.choose_encoder_attention(load(small_models), backend)
    assert "No prompt has been encoded" in nodes.encoder_report(clip)
    out = encode(clip)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    run = clip.patcher.attachments["flux2_attention"].log.current
    assert run.calls == 30 and f"30 calls: {backend if backend != 'auto' else 'sdpa'}" in nodes.encoder_report(clip)
    encode(clip.clone(), "another prompt")
    assert clip.patcher.attachments["flux2_attention"].log.current.calls == 30, "each prompt is a run of its own"


def test_default_leaves_the_encoder_alone(nodes, small_models):
    clip = nodes.choose_encoder_attention(load(small_models), "default")
    assert "ComfyUI's own" in nodes.encoder_report(clip) and not any(
        m._forward_pre_hooks for m in clip.cond_stage_model.modules()
    )


def test_weights_that_are_loaded_again_keep_the_choice(nodes, small_models):
    clip = nodes.choose_encoder_attention(load(small_models), "sdpa-math")
    factory, arguments = clip.patcher.cached_patcher_init[:2]
    again = clip.clone()
    again.patcher = factory(*arguments, disable_dynamic=True)
    again.cond_stage_model = again.patcher.model
    torch.testing.assert_close(encode(again), encode(clip))
    assert clip.patcher.attachments["flux2_attention"].log.current.calls == 30


def test_a_backend_that_cannot_run_here_is_refused(nodes, small_models):
    with pytest.raises(ValueError, match="'sdpa-efficient' cannot run here"):
        nodes.choose_encoder_attention(load(small_models), "sdpa-efficient")


def test_an_encoder_whose_layers_do_not_take_attention_is_explained(nodes):
    from flux2_pack.flux2.loading import encoder_attention

    clip = type("Clip", (), {"cond_stage_model": torch.nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="cannot be chosen"):
        encoder_attention.install(clip, None)
