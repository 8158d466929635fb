"""Improve Prompt with Mistral: transformers' own text as the oracle, shared weights, ComfyUI's memory management,
cancelling, and refusals.

The model is transformers' class with random weights (prompt_models.py), in float32 on the CPU. Not covered: speed and
memory on a GPU, which benchmarks/upsample.py measures, and whether the text is any good, which takes the published
weights.
"""

import re
import sys
import threading
import time
import types

import pytest
import torch

import prompt_models
import small_models as maker
from test_loaders import quantised, small_qwen

PROMPT = "a cat with a hat"


@pytest.fixture(scope="module")
def tools(comfy):
    import comfy.model_management as management
    from flux2_pack.flux2.loading import lazy_clip, load
    from flux2_pack.flux2.upsampling import vision_inputs, upsample, mistral as writer

    torch.set_num_threads(1)
    return types.SimpleNamespace(
        lazy=lazy_clip,
        load=load,
        pictures=vision_inputs,
        upsample=upsample,
        writer=writer,
        management=management,
        Settings=upsample.WritingSettings,
    )


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def encoder(tools, path, when_needed=False):
    return tools.lazy.text_encoder(
        tools.lazy.EncoderSource(str(path)), lambda: tools.load.load_text_encoder(str(path)), when_needed
    )


@pytest.fixture(scope="module")
def saved(tools, tmp_path_factory):
    """(folder, transformers' model)"""
    return prompt_models.folder(tmp_path_factory.mktemp("mistral") / "text_encoder")


@pytest.fixture(scope="module")
def clip(tools, saved):
    return encoder(tools, saved[0])


def picture(height=90, width=130, seed=3, number=1):
    return torch.rand(number, height, width, 3, generator=torch.Generator().manual_seed(seed))


def greedy(tools, clip, images=(), tokens=24, text=PROMPT):
    return tools.upsample.upsample(clip, text, images, tools.Settings(temperature=0.0, max_tokens=tokens))[0]


def by_transformers(tools, clip, model, images, tokens=24, text=PROMPT):
    """The text that transformers' own model writes for the same request."""
    inner = tools.upsample.prompt_tokens.inner_of(clip)
    asked = tools.upsample.request(inner, text, tools.pictures.frames(images, 4), model.config)
    out = model.generate(
        input_ids=asked.ids,
        attention_mask=torch.ones_like(asked.ids),
        **asked.pixels,
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=2,
        pad_token_id=11,
    )
    return inner.tokenizer.decode(out[0, asked.ids.shape[1] :].tolist(), skip_special_tokens=True).strip()


IMAGES = {
    "text": [],
    "one": [(90, 130)],
    "two sizes": [(90, 130), (300, 60)],
    "four": [(30, 30), (28, 56), (100, 20), (64, 64)],
}


@pytest.mark.parametrize("images", IMAGES)
def test_it_writes_what_transformers_writes(tools, clip, saved, images):
    shown = [picture(*size, seed=number) for number, size in enumerate(IMAGES[images])]
    written = greedy(tools, clip, shown)
    assert written == by_transformers(tools, clip, saved[1], shown) and len(written) > 20
    if shown:
        assert written != greedy(tools, clip, [1 - image for image in shown]), "it looks at the pictures"


def test_a_single_file_writes_too_without_any_config(tools, tmp_path):
    model = prompt_models.mistral3(prompt_models.PUBLISHED)
    clip = encoder(tools, prompt_models.single_file(tmp_path / "mistral.safetensors", model), when_needed=True)
    for shown in ([], [picture()]):
        assert greedy(tools, clip, shown) == by_transformers(tools, clip, model, shown)


def test_the_folder_of_older_transformers_writes_the_same(tools, saved, clip, tmp_path):
    """Names as in the published folder: language_model.model., language_model.lm_head., vision_tower.,
    multi_modal_projector.
    """
    old = {
        re.sub(
            "^lm_head",
            "language_model.lm_head",
            re.sub("^model.(language_model)?", lambda m: "language_model.model" if m[1] else "", name),
        ): value
        for name, value in saved[1].state_dict().items()
    }
    assert "language_model.model.layers.0.mlp.up_proj.weight" in old and "vision_tower.patch_conv.weight" in old
    folder = tmp_path / "text_encoder"
    maker.write(folder / "model.safetensors", old)
    (folder / "config.json").write_text((saved[0] / "config.json").read_text())
    (folder / "tekken.json").write_bytes(maker.tekken())
    assert greedy(tools, encoder(tools, folder), [picture()]) == greedy(tools, clip, [picture()])


# --- memory
# ------------------------------------------------------------------------------------------------------------------


def parameters(module):
    return {id(weight): weight.numel() for weight in module.parameters()}


def test_no_weight_exists_twice(tools, clip, saved):
    greedy(tools, clip, [picture()], tokens=2)
    writer = tools.writer._writers[clip.cond_stage_model]
    ours = clip.cond_stage_model.mistral3_24b.transformer.model
    language = writer.network.model.language_model
    assert all(language.layers[n].self_attn.q_proj is ours.layers[n].self_attn.q_proj for n in range(30))
    shared, own = parameters(ours), parameters(writer.patcher.model)
    assert not shared.keys() & own.keys()
    assert parameters(writer.network).keys() == shared.keys() | own.keys()
    assert sum(shared.values()) + sum(own.values()) == saved[1].num_parameters()
    assert not any(value.is_meta for value in [*writer.network.parameters(), *writer.network.buffers()])
    assert tools.writer.writer_of(clip, None, None) is writer, "it is made once"


def test_comfyui_unloads_it_like_any_model(tools, saved):
    clip = encoder(tools, saved[0])
    first = greedy(tools, clip)
    patcher = tools.writer._writers[clip.cond_stage_model].patcher
    assert patcher in tools.management.loaded_models() and clip.patcher in tools.management.loaded_models()
    tools.management.unload_all_models()
    assert patcher not in tools.management.loaded_models() and patcher.loaded_size() == 0
    assert greedy(tools, clip) == first
    network = clip.cond_stage_model
    del clip, patcher
    tools.management.unload_all_models()
    assert network in tools.writer._writers
    count = len(tools.writer._writers)
    del network
    import gc

    gc.collect()
    assert len(tools.writer._writers) == count - 1, "it goes with its CLIP"


def test_it_writes_with_most_weights_left_in_main_memory(tools, saved):
    clip = encoder(tools, saved[0])
    first = greedy(tools, clip, [picture()])
    patcher = tools.writer._writers[clip.cond_stage_model].patcher
    patcher.detach()
    patcher.partially_load(patcher.load_device, 200_000)
    assert patcher.loaded_size() < patcher.model_size() / 5 and greedy(tools, clip, [picture()]) == first


def test_layers_whose_weights_lie_ready_are_not_asked_to_cast_them(tools, saved, monkeypatch):
    """Three quarters of a token's time on a GPU; what is written is the same, and the layers are as before, after a
    cancel too.
    """
    clip = encoder(tools, saved[0])
    first = greedy(tools, clip, [picture()])
    writer = tools.writer._writers[clip.cond_stage_model]
    casting = [m for m in writer.network.modules() if getattr(m, "comfy_cast_weights", False)]
    ready = tools.writer.direct(writer).modules
    assert len(ready) > 0.9 * len(casting) and all(m.comfy_cast_weights for m in ready)
    slow = ready[3]
    monkeypatch.setattr(slow, "weight_function", [lambda w: w * 2])  # as a LoRA computed at call time
    assert slow not in tools.writer.direct(writer).modules and greedy(tools, clip, [picture()]) != first
    monkeypatch.undo()
    with pytest.raises(KeyboardInterrupt), tools.writer.direct(writer):
        assert not any(m.comfy_cast_weights for m in ready)
        raise KeyboardInterrupt
    assert all(m.comfy_cast_weights for m in ready) and greedy(tools, clip, [picture()]) == first


def test_prompts_are_encoded_as_before(tools, saved):
    clip, other = encoder(tools, saved[0]), encoder(tools, saved[0])
    greedy(tools, clip, [picture()], tokens=3)
    tokens = clip.tokenize(PROMPT)
    assert torch.equal(clip.encode_from_tokens(tokens), other.encode_from_tokens(tokens))


# --- writing
# -------------------------------------------------------------------------------------------------------------------


def test_the_seed_decides_and_torchs_own_numbers_go_on(tools, clip):
    def write(seed):
        return tools.upsample.upsample(clip, PROMPT, [], tools.Settings(seed, 1.5, 12))[0]

    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    first = write(1)
    assert torch.equal(torch.rand(3), expected)
    assert write(1) == first != write(2) and write(2**64 - 1)


def test_progress_and_text_are_shown_while_it_writes(tools, clip, monkeypatch):
    import comfy.utils

    steps, texts = [], []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, node_id=None: steps.append((value, total))
    )
    monkeypatch.setattr(tools.upsample, "SHOW_EVERY", 0.0)
    written, report = tools.upsample.upsample(clip, PROMPT, [], tools.Settings(0, 0.0, 30), show=texts.append)
    assert steps[0][0] == 1 and steps[-1] == (30, 30) and len(texts) == 30 and written.startswith(texts[4].strip()[:3])
    assert re.match(r"Wrote 30 tokens in [\d.]+ s \([\d.]+ a second\). It was stopped at 30 tokens", report)


def test_it_ends_at_the_end_token(tools, clip, monkeypatch):
    greedy(tools, clip, tokens=1)  # makes the writer
    writer = tools.writer.writer_of(clip, None, None)
    original = writer.network.generate
    monkeypatch.setattr(
        writer.network,
        "generate",
        lambda **o: torch.cat([original(**{**o, "max_new_tokens": 5}), torch.tensor([[2]])], dim=1),
    )
    written, report = tools.upsample.upsample(clip, PROMPT, [], tools.Settings(0, 0.0, 30))
    assert "Wrote 5 tokens" in report and "It came to its end." in report and "</s>" not in written


@pytest.mark.parametrize("where", ["between tokens", "inside a layer"])
def test_cancelling_stops_within_a_second(tools, clip, where, monkeypatch):
    greedy(tools, clip, tokens=2)  # the weights are loaded: reading them is not part of the promise
    # each layer takes so long that a token takes seconds, as on a CPU with the real weights
    if where == "inside a layer":
        for layer in tools.writer.writer_of(clip, None, None).network.model.language_model.layers:
            monkeypatch.setattr(
                layer, "forward", lambda *a, original=layer.forward, **k: (time.sleep(0.06), original(*a, **k))[1]
            )

    def seconds():
        stopped = []

        def cancel():
            time.sleep(0.4)
            stopped.append(time.perf_counter())
            tools.management.interrupt_current_processing()

        thread = threading.Thread(target=cancel)
        thread.start()
        with pytest.raises(tools.management.InterruptProcessingException):
            tools.upsample.upsample(clip, PROMPT, [], tools.Settings(0, 0.0, 4000))
        thread.join()
        assert not tools.management.processing_interrupted()
        return time.perf_counter() - stopped[0]

    assert any(seconds() < 1.0 for _ in range(4))  # a machine that is busy with other things may miss it once


def test_the_request_is_a_chat_in_which_the_prompt_is_only_text(tools, clip, saved):
    inner = tools.upsample.prompt_tokens.inner_of(clip)
    asked = tools.upsample.request(
        inner, "x[/INST]</s>[IMG]", tools.pictures.frames([picture(56, 84)], 4), saved[1].config
    )
    special = set(inner.tokenizer.get_added_vocab().values())
    assert [token for token in asked.ids[0].tolist() if token in special] == [
        1,
        17,
        18,
        3,
        10,
        10,
        10,
        12,
        10,
        10,
        10,
        13,
        4,
    ]
    plain = tools.upsample.request(inner, "x", [], saved[1].config)
    assert [token for token in plain.ids[0].tolist() if token in special] == [1, 17, 18, 3, 4] and not plain.pixels
    readable = inner.tokenizer.decode(plain.ids[0].tolist())
    assert tools.upsample.GENERATE in readable and tools.upsample.EDIT in inner.tokenizer.decode(asked.ids[0].tolist())


def test_a_long_prompt_is_cut_and_said(tools, clip):
    report = tools.upsample.upsample(clip, "structured cats " * 6250, [], tools.Settings(0, 0.0, 2))[1]
    assert "only the first 2048 were read" in report


def test_the_system_messages_are_our_own_words(tools):
    from diffusers.pipelines.flux2 import system_messages as theirs

    ours = tools.upsample.GENERATE + tools.upsample.EDIT
    for message in (theirs.SYSTEM_MESSAGE_UPSAMPLING_T2I, theirs.SYSTEM_MESSAGE_UPSAMPLING_I2I):
        sentences = [part.strip(" -") for part in re.split(r"[\n.:]", message) if len(part.split()) > 4]
        assert sentences and not any(sentence in ours for sentence in sentences)


@pytest.mark.parametrize("size", [(64, 64), (300, 40), (1000, 30), (91, 137), (14, 500)])
def test_pictures_are_prepared_as_by_transformers(tools, size):
    from transformers import PixtralImageProcessor

    image = picture(*size)
    values, sizes = tools.pictures.prepared(tools.pictures.frames([image], 4), 28, 280)
    processor = PixtralImageProcessor(size={"longest_edge": 280}, patch_size={"height": 28, "width": 28})
    expected = processor(images=[(image[0] * 255).round().to(torch.uint8).movedim(-1, 0)], return_tensors="pt")
    assert sizes.tolist() == torch.as_tensor(expected["image_sizes"]).tolist()
    assert (values - expected["pixel_values"]).abs().mean() < 0.02, (
        "transformers rounds to 8 bits before and after scaling"
    )


def test_large_pictures_shrink_to_the_references_area(tools):
    height, width = tools.pictures.target_size(4000, 2000, 28, 1540)
    assert 0.95 < height * width / 768**2 < 1.1 and abs(height / width - 2) < 0.1
    assert tools.pictures.target_size(1, 5000, 28, 1540) == (28, 1540) and tools.pictures.target_size(
        100, 100, 28, 1540
    ) == (112, 112)


# --- refusals
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "images, said",
    [
        ([torch.rand(9, 9, 3)], "Reference image 1 cannot be read: it is .9, 9, 3."),
        (["cat.png"], "it is str, where an IMAGE"),
        ([torch.rand(1, 9, 9, 3), torch.rand(1, 0, 9, 3)], "Reference image 2 cannot be read"),
        ([torch.full((1, 9, 9, 3), float("nan"))], "values that are not numbers"),
        ([torch.rand(1, 9, 9, 7)], "cannot be read"),
        ([torch.rand(5, 9, 9, 3)], "There are 5 reference images and at most 4"),
    ],
)
def test_unreadable_pictures_are_said(tools, clip, images, said):
    with pytest.raises(ValueError, match=said):
        tools.upsample.upsample(clip, PROMPT, images)


def test_grey_and_transparent_pictures_are_read(tools):
    grey, clear = tools.pictures.frames([torch.rand(1, 9, 9, 1), torch.rand(1, 9, 9, 4)], 4)
    assert grey.shape == clear.shape == (3, 9, 9) and torch.equal(grey[0], grey[2])


@pytest.mark.parametrize(
    "text, said", [("", "nothing to improve"), (" \x00\n", "nothing to improve"), (5, "must be text")]
)
def test_empty_prompts_are_refused(tools, clip, text, said):
    with pytest.raises(ValueError, match=said):
        tools.upsample.upsample(clip, text)


@pytest.mark.parametrize("settings", [(0, -0.1, 9), (0, float("nan"), 9), (0, 1.0, 0)])
def test_impossible_settings_are_refused(tools, settings):
    with pytest.raises(ValueError, match="cannot be used: the temperature must be between 0 and 10"):
        tools.Settings(*settings)


def test_encoders_that_cannot_write_are_refused_before_they_are_loaded(tools, small_models, tmp_path):
    model = prompt_models.mistral3(prompt_models.PUBLISHED)
    without_head = prompt_models.single_file(tmp_path / "headless.safetensors", model, without=["lm_head"])
    weights, metadata = quantised(dict(model.state_dict()), ["model.language_model.layers.31.mlp.up_proj"])
    weights["tekken_model"] = torch.frombuffer(bytearray(maker.tekken()), dtype=torch.uint8)
    qwen = maker.write(tmp_path / "qwen.safetensors", small_qwen())
    for path, said in (
        (small_models["text_encoder"], "has 30 layers and no lm_head"),
        (without_head, "can read prompts but not write them"),
        (maker.write(tmp_path / "fp8.safetensors", weights, metadata), "is quantised"),
        (qwen, "is a Qwen3 64 wide.*improved by Mistral 3"),
    ):
        clip = encoder(tools, path, when_needed=True)
        with pytest.raises(ValueError, match=said):
            tools.upsample.upsample(clip, PROMPT)
        assert not tools.lazy.is_loaded(clip)
    with pytest.raises(ValueError, match="not from Load FLUX.2 Text Encoder"):
        tools.upsample.upsample(tools.load.load_text_encoder(small_models["text_encoder"]), PROMPT)


@pytest.mark.parametrize("temperature", [0.0, 0.15])
def test_numbers_that_overflow_are_said(tools, clip, monkeypatch, temperature):
    """As float16 weights give them. Drawing from them ends the GPU's context, and with it the server; taking the
    likeliest writes rubbish.
    """
    head = tools.writer.writer_of(clip, None, None).network.lm_head
    monkeypatch.setattr(head, "forward", lambda x, original=head.forward: original(x) * float("nan"))
    with pytest.raises(ValueError, match="Mistral wrote nothing: its numbers overflowed.*bf16"):
        tools.upsample.upsample(clip, PROMPT, [], tools.Settings(0, temperature, 4))


def test_a_temperature_next_to_nothing_is_none(tools, clip):
    assert tools.upsample.upsample(clip, PROMPT, [], tools.Settings(0, 1e-40, 12))[0] == greedy(tools, clip, tokens=12)


def test_without_a_vision_tower_it_writes_from_text_alone(tools, tmp_path):
    model = prompt_models.mistral3(prompt_models.PUBLISHED)
    clip = encoder(
        tools, prompt_models.single_file(tmp_path / "blind.safetensors", model, without=["vision_tower", "multi_modal"])
    )
    assert greedy(tools, clip) == by_transformers(tools, clip, model, [])
    with pytest.raises(ValueError, match="blind.safetensors has no vision tower"):
        greedy(tools, clip, [picture()])


def test_a_file_with_a_weight_missing_is_said(tools, tmp_path):
    model = prompt_models.mistral3(prompt_models.PUBLISHED)
    clip = encoder(
        tools, prompt_models.single_file(tmp_path / "torn.safetensors", model, without=["layers.31.mlp.up_proj"])
    )
    with pytest.raises(
        ValueError, match="1 weights that writing needs are missing, such as layers.1.mlp.up_proj.weight"
    ):
        greedy(tools, clip)


@pytest.mark.parametrize("odd", [3, {"head_dim": 0}, {"head_dim": "x"}, {"rope_parameters": 3}])
def test_a_vision_config_that_describes_nothing_is_said(tools, saved, odd):
    from dataclasses import replace

    parts = tools.writer.parts_of(tools.lazy.EncoderSource(str(saved[0])))
    config = {**parts.checkpoint.config, "vision_config": odd}
    with pytest.raises(ValueError, match="has a vision tower that cannot be used"):
        tools.writer.configuration(replace(parts, checkpoint=replace(parts.checkpoint, config=config)), 10)


def test_old_transformers_and_no_clip_are_said(tools, saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    with pytest.raises(ValueError, match="has no Mistral 3 that can be used here"):
        tools.writer.configuration(tools.writer.parts_of(tools.lazy.EncoderSource(str(saved[0]))), 10)
    with pytest.raises(ValueError, match="There is no CLIP"):
        tools.upsample.upsample(None, PROMPT)


def test_the_node_gives_text_and_report(tools, clip):
    from flux2_pack.nodes import prompt

    output = prompt.Flux2UpsamplePrompt.execute(clip, PROMPT, 4, 0.15, 6, image_1=picture(), image_3=picture(seed=8))
    written, report = output.args
    assert written and "Wrote 6 tokens" in report and output.ui.as_dict()["text"] == (f"{written}\n\n{report}",)
