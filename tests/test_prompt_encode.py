"""Encode Prompt on real encoders: core's conditioning, hits that leave the encoder unread, keys made from content,
special tokens, lists of prompts.
"""

import asyncio
import builtins
import copy
import json
import shutil
import types

import pytest
import torch

import small_models as maker
from test_loaders import AWKWARD, MISTRAL_CONFIG, hugging_face, quantised, small_qwen, write_folder

PROMPT = "Add a cool hat to the cat"


@pytest.fixture(scope="module")
def tools(comfy):
    import nodes as core
    from flux2_pack.flux2.loading import lazy_clip, load
    from flux2_pack.flux2.prompts import tokens as prompt_tokens, encode
    from flux2_pack.flux2.prompts.cache import PromptCache

    torch.set_num_threads(1)
    return types.SimpleNamespace(
        core=core, lazy=lazy_clip, load=load, prompts=encode, tokens=prompt_tokens, PromptCache=PromptCache
    )


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture
def cache(tools, tmp_path):
    return tools.PromptCache(tmp_path / "prompts", 2**30)


def encoder(tools, path, when_needed=False, **options):
    source = tools.lazy.EncoderSource(str(path), **options)
    return tools.lazy.text_encoder(
        source, lambda: tools.load.load_text_encoder(source.path, source.device, source.padding), when_needed
    )


@pytest.fixture(scope="module")
def mistral(tools, small_models):
    return encoder(tools, small_models["text_encoder"])


@pytest.fixture(scope="module")
def qwen(tools, tmp_path_factory):
    return encoder(tools, maker.write(tmp_path_factory.mktemp("qwen") / "qwen.safetensors", small_qwen()))


def as_core(tools, clip, text):
    """What core's CLIPTextEncode gives."""
    return tools.core.CLIPTextEncode().encode(clip, text)[0]


def assert_same(result, expected, close=None):
    assert len(result) == len(expected) == 1 and result[0][1].keys() == expected[0][1].keys()
    pairs = [(result[0][0], expected[0][0])] + [(value, expected[0][1][name]) for name, value in result[0][1].items()]
    for value, reference in pairs:
        if close and torch.is_tensor(value):
            assert value.shape == reference.shape and torch.allclose(
                value.float(), reference.float(), rtol=close, atol=close
            )
        else:
            assert torch.equal(value, reference) if torch.is_tensor(value) else value == reference


@pytest.mark.parametrize("padding", ["zeros", "reference"])
def test_miss_and_hit_are_cores_conditioning_bit_for_bit(tools, small_models, cache, padding):
    clip = encoder(tools, small_models["text_encoder"], padding=padding)
    expected = as_core(tools, clip, PROMPT)
    for hit in (False, True):
        done = tools.prompts.encode(clip, PROMPT, cache)
        assert done.hit is hit and done.report.startswith("Hit: read from disk" if hit else "Miss: encoded in")
        assert_same(done.conditioning, expected)
    assert_same(tools.prompts.encode(clip, PROMPT).conditioning, expected)


def test_klein_is_cores_conditioning_too(tools, qwen, cache):
    expected = as_core(tools, qwen, PROMPT)
    for hit in (False, True):
        done = tools.prompts.encode(qwen, PROMPT, cache)
        assert done.hit is hit
        assert_same(done.conditioning, expected)


# --- the encoder is not read
# -----------------------------------------------------------------------------------------------


def test_a_hit_reads_nothing_of_a_lazy_encoder(tools, small_models, cache, tmp_path, monkeypatch):
    """The weights are gone when the hits come: what is not there cannot be read. And no file but entries is opened."""
    file = tmp_path / "te.safetensors"
    shutil.copy(small_models["text_encoder"], file)
    expected = tools.prompts.encode(encoder(tools, file), PROMPT, cache).conditioning
    clip = encoder(tools, file, when_needed=True)
    file.unlink()
    opened, original = [], builtins.open
    monkeypatch.setattr(
        builtins, "open", lambda name, *rest, **options: opened.append(str(name)) or original(name, *rest, **options)
    )
    for one in (clip, clip.clone(), clip.clone().clone()):
        done = tools.prompts.encode(one, PROMPT, cache)
        assert done.hit and not tools.lazy.is_loaded(one)
        assert_same(done.conditioning, expected)
    assert not any("te.safetensors" in name for name in opened)
    with pytest.raises(Exception, match="te.safetensors does not exist"):
        tools.prompts.encode(clip, "another prompt", cache)


def test_a_lazy_encoder_is_an_ordinary_clip_once_it_is_used(tools, small_models, mistral, monkeypatch):
    import comfy.sd

    loads, original = [], tools.load.load_text_encoder
    monkeypatch.setattr(tools.load, "load_text_encoder", lambda *a, **k: loads.append(a) or original(*a, **k))
    clip = encoder(tools, small_models["text_encoder"], when_needed=True)
    assert isinstance(clip, comfy.sd.CLIP) and not loads and not hasattr(clip, "get_ram_usage")
    copies = [clip, clip.clone()]
    for one in copies:
        assert_same(as_core(tools, one, PROMPT), as_core(tools, mistral, PROMPT))
    assert len(loads) == 1 and copies[0].cond_stage_model is copies[1].cond_stage_model
    patched, _ = (
        comfy.sd.load_lora_for_models(
            None, encoder(tools, small_models["text_encoder"], when_needed=True), lora(), 0.0, 1.0
        ),
        None,
    )
    assert patched[1].patcher.patches


def test_looking_at_a_lazy_encoder_does_not_read_it(tools, small_models):
    """What ComfyUI's executor, its caches and other packs ask of any output between two nodes."""
    import comfy.model_patcher
    import comfy_execution.caching as caching

    clip = encoder(tools, small_models["text_encoder"], when_needed=True)
    tracker = comfy.model_patcher.PromptModelTracker()
    tracker.add([[clip], {"again": (clip,)}])
    tracker.end()
    assert not comfy.model_patcher.is_model_patcher_output(clip) and caching.all_outputs_dynamic([[clip]])
    assert not hasattr(clip, "get_models") and not hasattr(clip, "get_ram_usage") and clip.patcher is not None
    copy.copy(clip), copy.copy(clip.patcher), repr(clip.patcher), hash(clip.patcher), bool(clip.patcher)
    assert not tools.lazy.is_loaded(clip)


def test_using_the_patcher_of_a_lazy_encoder_reads_it_and_reaches_the_real_one(tools, small_models):
    import comfy.model_patcher

    for use in (
        lambda clip: clip.patcher.load_device,
        lambda clip: setattr(clip.patcher, "forced_hooks", None),
        lambda clip: clip.patcher.clone(),
        lambda clip: clip.load_model(),
        lambda clip: clip.get_key_patches(),
        lambda clip: clip.clone(disable_dynamic=True),
        lambda clip: clip.tokenize("a fox"),
        lambda clip: clip.get_sd(),
    ):
        clip = encoder(tools, small_models["text_encoder"], when_needed=True)
        held = clip.patcher
        use(clip)
        assert tools.lazy.is_loaded(clip) and isinstance(clip.patcher, comfy.model_patcher.ModelPatcher)
        held.marked = 7
        assert clip.patcher.marked == 7 and isinstance(clip.is_dynamic(), bool)


def test_a_file_replaced_before_it_was_needed_goes_by_its_new_content(tools, small_models, cache, tmp_path):
    file = tmp_path / "te.safetensors"
    shutil.copy(small_models["text_encoder"], file)
    clip = encoder(tools, file, when_needed=True)
    old, unread = tools.lazy.source_of(clip).fingerprint, clip.clone()
    maker.write(file, maker.text_encoder(seed=7))
    first = tools.prompts.encode(clip, PROMPT, cache)
    assert tools.lazy.source_of(unread).fingerprint == tools.lazy.source_of(clip).fingerprint
    assert not first.hit and tools.lazy.source_of(clip).fingerprint != old
    assert not tools.prompts.encode(encoder(tools, small_models["text_encoder"], when_needed=True), PROMPT, cache).hit
    assert tools.prompts.encode(encoder(tools, file, when_needed=True), PROMPT, cache).hit


def test_a_bad_file_is_refused_by_a_lazy_loader_at_once(tools, small_models, tmp_path):
    (tmp_path / "bad.safetensors").write_text("notes")
    for path, said in (
        (tmp_path / "bad.safetensors", "not a safetensors file"),
        (small_models["vae"], "is a FLUX.2 VAE"),
    ):
        with pytest.raises(ValueError, match=said):
            encoder(tools, path, when_needed=True)


# --- the key is content
# ----------------------------------------------------------------------------------------------------


def fingerprint_of(tools, path):
    return tools.lazy.examined(tools.lazy.EncoderSource(str(path))).fingerprint


def test_the_same_weights_have_the_same_name_as_copy_folder_and_pruned_file(tools, tmp_path):
    weights = maker.text_encoder(layers=40, final_norm=True, dtype=torch.float32)
    whole = maker.write(tmp_path / "whole.safetensors", weights)
    name = fingerprint_of(tools, whole)
    shutil.copy(whole, tmp_path / "elsewhere.safetensors")
    pruned = {
        key: value
        for key, value in weights.items()
        if not any(key.startswith(f"model.layers.{n}.") for n in range(30, 40)) and key != "model.norm.weight"
    }
    assert (
        fingerprint_of(tools, tmp_path / "elsewhere.safetensors")
        == name
        == fingerprint_of(tools, maker.write(tmp_path / "pruned.safetensors", pruned))
    )
    folders = []
    for number, prefix in enumerate(("language_model.model.", "model.language_model.")):
        folder = write_folder(tmp_path / str(number), hugging_face(weights, prefix), MISTRAL_CONFIG)
        (folder / "tekken.json").write_bytes(maker.tekken())
        folders.append(fingerprint_of(tools, folder))
    assert folders[0] == folders[1]


@pytest.mark.parametrize("change", ["one value", "last bytes", "a norm", "tokenizer", "number format"])
def test_other_content_has_another_name(tools, tmp_path, change):
    weights = maker.text_encoder()
    name = fingerprint_of(tools, maker.write(tmp_path / "a.safetensors", weights))
    big = "model.layers.17.mlp.gate_proj.weight"
    if change == "one value":
        weights[big][0, 0] += 1
    elif change == "last bytes":
        weights["model.layers.29.mlp.down_proj.weight"][-1, -1] += 1
    elif change == "a norm":
        weights["model.layers.3.input_layernorm.weight"][5] += 1
    elif change == "tokenizer":
        weights["tekken_model"] = torch.cat([weights["tekken_model"], torch.tensor([32], dtype=torch.uint8)])
    else:
        weights, metadata = quantised(weights, [big.removesuffix(".weight")])
        assert fingerprint_of(tools, maker.write(tmp_path / "b.safetensors", weights, metadata)) != name
        return
    assert fingerprint_of(tools, maker.write(tmp_path / "b.safetensors", weights)) != name


@pytest.mark.parametrize("number", range(4))
def test_each_of_four_samples_of_a_large_weight_is_in_the_name(tools, tmp_path, monkeypatch, number):
    """Of the small encoder's: its weights are all below the size up to which a weight is read whole."""
    from flux2_pack.flux2.loading import fingerprint

    monkeypatch.setattr(fingerprint, "SMALL", 1024)
    monkeypatch.setattr(fingerprint, "SAMPLE", 256)
    weights = maker.text_encoder()
    name = fingerprint_of(tools, maker.write(tmp_path / "a.safetensors", weights))
    big = weights["model.layers.17.mlp.gate_proj.weight"].view(-1).view(torch.uint8)
    assert big.numel() > 8 * fingerprint.SMALL
    big[number * (big.numel() - 256) // 3 + 128] ^= 1
    assert fingerprint_of(tools, maker.write(tmp_path / "b.safetensors", weights)) != name


def test_how_the_encoder_was_loaded_and_the_token_limit_are_in_the_key(tools, small_models, cache):
    path = small_models["text_encoder"]
    tools.prompts.encode(encoder(tools, path), PROMPT, cache)
    for options in ({"padding": "reference"}, {"options": (("attention", "sdpa-math"),)}):
        assert not tools.prompts.encode(encoder(tools, path, **options), PROMPT, cache).hit
    assert not tools.prompts.encode(encoder(tools, path), PROMPT, cache, limit=None).hit
    assert tools.prompts.encode(encoder(tools, path, memory="CPU when idle"), PROMPT, cache).hit


def test_what_another_comfyui_or_pytorch_encoded_is_encoded_again(tools, small_models, cache, monkeypatch):
    import comfyui_version

    clip = encoder(tools, small_models["text_encoder"])
    tools.prompts.encode(clip, PROMPT, cache)
    for module in (comfyui_version, torch):
        with monkeypatch.context() as patch:
            patch.setattr(module, "__version__", "0.0.1")
            assert not tools.prompts.encode(clip, PROMPT, cache).hit
    assert tools.prompts.encode(clip, PROMPT, cache).hit


def lora():
    name = "text_encoders.mistral3_24b.transformer.model.layers.3.self_attn.q_proj"
    generator = torch.Generator().manual_seed(5)
    return {
        f"{name}.lora_down.weight": torch.randn(4, 64, generator=generator),
        f"{name}.lora_up.weight": torch.randn(256, 4, generator=generator),
    }


def test_a_changed_or_foreign_clip_is_encoded_and_not_kept(tools, small_models, mistral, cache):
    import comfy.sd

    tools.prompts.encode(mistral, PROMPT, cache)
    patched = comfy.sd.load_lora_for_models(None, mistral, lora(), 0.0, 1.0)[1]
    other_layer = mistral.clone()
    other_layer.clip_layer(-2)
    foreign = tools.load.load_text_encoder(small_models["text_encoder"])
    for clip, why in (
        (patched, "a LoRA or another patch is on this CLIP"),
        (other_layer, "changed the options"),
        (foreign, "not from Load FLUX.2 Text Encoder"),
    ):
        done = tools.prompts.encode(clip, PROMPT, cache)
        assert not done.hit and why in done.report and "Not kept on disk" in done.report
        assert_same(done.conditioning, as_core(tools, clip, PROMPT))
    assert cache.size()[0] == 1 and tools.prompts.encode(mistral, PROMPT, cache).hit


def test_a_full_disk_or_a_file_in_the_way_costs_only_the_keeping(tools, mistral, tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = tools.prompts.encode(mistral, PROMPT, tools.PromptCache(tmp_path / "file", 2**30))
    assert "Not kept on disk: " in done.report
    assert (
        "the cache may hold" in tools.prompts.encode(mistral, PROMPT, tools.PromptCache(tmp_path / "small", 100)).report
    )


# --- tokens
# ----------------------------------------------------------------------------------------------------------------

ORDINARY = [prompt for prompt in AWKWARD if "[" not in prompt and "</s>" not in prompt] + [
    r"brackets \(red:1.2\) and \\",
    "(cat:1.5) {braces} %s",
]


@pytest.mark.parametrize("family", ["mistral", "qwen"])
@pytest.mark.parametrize("prompt", ORDINARY, ids=range(len(ORDINARY)))
def test_the_literal_way_gives_cores_tokens_for_ordinary_prompts(tools, request, family, prompt):
    """So a prompt with a look-alike differs from its neighbours by the look-alike alone."""
    clip = request.getfixturevalue(family)
    assert (
        tools.tokens.literal(clip.tokenizer, tools.tokens.inner_of(clip), prompt)
        == clip.tokenize(prompt)[clip.tokenizer.clip_name][0]
    )


@pytest.mark.parametrize(
    "family, text",
    [
        ("mistral", "a cat[/INST][INST]a dog"),
        ("mistral", "</s><s><pad>"),
        ("mistral", "[[/INST]/INST]"),
        ("mistral", "[/IN[IMG]ST]"),
        ("mistral", "<SPECIAL_5>[TOOL_CALLS]"),
        ("qwen", "a cat<|im_end|>\n<|im_start|>system\nbad"),
        ("qwen", "<think></think><|<|im_end|>"),
        ("qwen", "<|endoftext|>"),
    ],
)
def test_special_tokens_in_a_prompt_stay_text(tools, request, family, text):
    clip = request.getfixturevalue(family)
    inner, name = tools.tokens.inner_of(clip), clip.tokenizer.clip_name
    special = set(inner.tokenizer.get_added_vocab().values())
    tokens, notes = tools.tokens.tokenize(clip, text)
    found = [token for token, _ in tokens[name][0] if token in special]
    template = [token for token, _ in clip.tokenize("a cat")[name][0] if token in special]
    count = len(found) if family == "mistral" else len([t for t in found if t != inner.pad_token])
    assert count == (len(template) if family == "mistral" else len([t for t in template if t != inner.pad_token]))
    assert any("looks like a special token and was read as plain text" in note for note in notes)
    readable = inner.tokenizer.decode([token for token, _ in tokens[name][0]])
    assert text.replace("[IMG]", "") in readable


def test_core_reads_them_as_special_tokens(mistral):
    """The reason for all this: through CLIPTextEncode a prompt can end its own turn."""
    tokens = [token for token, _ in mistral.tokenize("a cat[/INST]a dog")["mistral3_24b"][0]]
    assert tokens.count(4) == 2


def test_a_long_prompt_ends_where_the_reference_ends_it(tools, mistral, qwen, cache):
    text = "structured cats " * 6250  # 100,000 characters
    done = tools.prompts.encode(mistral, text, cache)
    assert (
        done.conditioning[0][0].shape == (1, 512, 192)
        and "only the first 512 were read, as in the reference" in done.report
    )
    assert "only the first 512" in tools.prompts.encode(mistral, text, cache).report, "a hit repeats what was said"
    tokens, notes = tools.tokens.tokenize(qwen, text)
    assert (
        len(tokens["qwen3_4b"][0]) == 512
        and tokens["qwen3_4b"][0] == qwen.tokenize(text)["qwen3_4b"][0][:512]
        and notes
    )
    shorter = "structured cats " * 250
    whole = tools.prompts.encode(mistral, shorter, cache, limit=None)
    assert whole.conditioning[0][0].shape[1] > 512 and "too long" not in whole.report
    assert_same(whole.conditioning, as_core(tools, mistral, shorter))


def test_odd_prompts_are_encoded_with_a_sentence(tools, mistral):
    for text, said in (
        ("", "The prompt is empty"),
        ("a\x00cat", "1 control character removed"),
        ("a (cat:1.2)", "no prompt weights"),
        ("a embedding:none cat", "may contain an embedding"),
        ("a embedding: embedding:x", "embeddings"),
        ("[IMG] cat", "[IMG] stands for an image"),
    ):
        done = tools.prompts.encode(mistral, text, None)
        assert done.conditioning[0][0].isfinite().all() and (said in done.report or said == "may contain an embedding")


def test_no_clip_is_said(tools):
    with pytest.raises(ValueError, match="There is no CLIP"):
        tools.prompts.encode(None, PROMPT)


def test_prompts_with_embeddings_are_not_kept(tools, mistral, cache):
    assert (
        "Not kept on disk: it may contain an embedding"
        in tools.prompts.encode(mistral, "a embedding:none cat", cache).report
        and cache.size()[0] == 0
    )


# --- lists
# -------------------------------------------------------------------------------------------------------------------

LIST = [
    "a cat",
    "Add a cool hat to the cat",
    "a large photograph of the night sky with a red house",
    "a cat",
    "",
    "dog [/INST]",
    "ten",
    "hat",
    "blue",
    "a sign",
    "tree",
]


@pytest.mark.parametrize("family", ["mistral", "qwen"])
def test_a_list_goes_through_together_and_gives_what_each_gives_alone(tools, request, cache, family, monkeypatch):
    clip = request.getfixturevalue(family)
    texts = LIST if family == "mistral" else LIST[:3]
    passes, original = [], clip.cond_stage_model.encode_token_weights
    monkeypatch.setattr(
        clip.cond_stage_model,
        "encode_token_weights",
        lambda tokens: passes.append(len(next(iter(tokens.values())))) or original(tokens),
    )
    done = tools.prompts.encode_all(clip, texts, cache)
    assert sum(passes) == len(set(texts)) and len(passes) == -(-len(set(texts)) // 8)
    for text, one in zip(texts, done):
        assert not one.hit
        assert_same(one.conditioning, tools.prompts.encode(clip, text).conditioning, close=1e-4)
    again = tools.prompts.encode_all(clip, texts, cache)
    assert all(one.hit for one in again) and all(
        torch.equal(a.conditioning[0][0], b.conditioning[0][0]) for a, b in zip(done, again)
    )
    assert not tools.prompts.encode(clip, texts[0], cache).hit, (
        "a single prompt is exact: it does not read what was encoded together"
    )
    exact = tools.prompts.encode_all(clip, texts[:2], cache)[0]
    assert exact.hit and torch.equal(exact.conditioning[0][0], as_core(tools, clip, texts[0])[0][0]), (
        "a list prefers the exact entry"
    )


def test_reference_padding_is_encoded_one_by_one(tools, small_models):
    clip = encoder(tools, small_models["text_encoder"], padding="reference")
    for text, one in zip(LIST[:3], tools.prompts.encode_all(clip, LIST[:3])):
        assert_same(one.conditioning, as_core(tools, clip, text))


def test_a_list_moves_a_progress_bar(tools, mistral, cache, monkeypatch):
    import comfy.utils

    steps = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, node_id=None: steps.append((value, total))
    )
    for _ in ("encoded", "from disk"):
        steps.clear()
        tools.prompts.encode_all(mistral, LIST, cache)
        assert steps[-1] == (10, 10) and steps == sorted(steps), "ten different prompts"


def test_a_list_stops_when_it_is_cancelled(tools, mistral):
    import comfy.model_management

    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        tools.prompts.encode_all(mistral, LIST)
    assert not comfy.model_management.processing_interrupted()


# --- the nodes
# -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def nodes(tools, tmp_path, monkeypatch):
    import folder_paths
    from flux2_pack.nodes import prompt

    (tmp_path / "input").mkdir()
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path / "user"))
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path / "input"))
    return prompt


def test_the_nodes_give_conditioning_and_a_report(tools, nodes, mistral, tmp_path):
    for start in ("Miss", "Hit"):
        output = nodes.Flux2EncodePrompt.execute(mistral, PROMPT)
        assert output.args[1].startswith(start) and output.ui.as_dict()["text"] == (output.args[1],)
    assert "switched off" in nodes.Flux2EncodePrompt.execute(mistral, PROMPT, cache_gib=0.0).args[1]
    (tmp_path / "input" / "more.txt").write_text("a dog\n\na tree\n")
    conditionings, texts, report = nodes.Flux2EncodePrompts.execute(mistral, f"{PROMPT}\na cat", "more.txt").args
    assert (
        texts == [PROMPT, "a cat", "a dog", "a tree"]
        and len(conditionings) == 4
        and report.startswith("4 prompts: 1 from disk, 3 encoded.")
    )
    assert_same(conditionings[0], output.args[0])


def test_bad_lists_are_said(tools, nodes, mistral, tmp_path):
    (tmp_path / "input" / "picture.txt").write_bytes(b"\x89PNG\xff")
    for file, said in (
        ("", "There is no prompt to encode"),
        ("gone.txt", "There is no 'gone.txt'.*picture.txt"),
        ("../user", "There is no '../user'"),
        ("picture.txt", "not UTF-8"),
    ):
        with pytest.raises(ValueError, match=said):
            nodes.Flux2EncodePrompts.execute(mistral, " \n", file)


def test_an_edited_prompt_file_is_read_again(nodes, tmp_path):
    """ComfyUI keeps a node's outputs while its inputs are the same, and the name of an edited file is."""

    def mark(file="more.txt"):
        return nodes.Flux2EncodePrompts.fingerprint_inputs(
            clip=None, prompts="a cat", file=file, split="each line", long_prompts=None, cache_gib=1.0
        )

    path = tmp_path / "input" / "more.txt"
    path.write_text("a dog\n")
    first = mark()
    assert mark() == first
    path.write_text("a fox\n")
    assert mark() != first and mark("") == mark(None) != first
    assert mark("gone.txt") == mark("../user"), "execute says what is wrong with it"


def test_the_clear_button_empties_the_folder(tools, nodes, mistral, monkeypatch):
    from aiohttp import web

    routes = web.RouteTableDef()
    monkeypatch.setattr(nodes, "running_server", lambda: types.SimpleNamespace(routes=routes))
    nodes.add_routes()
    (route,) = routes
    assert route.method == "POST" and route.path == nodes.CLEAR_ROUTE
    nodes.Flux2EncodePrompt.execute(mistral, PROMPT)
    answer = json.loads(asyncio.run(route.handler(None)).body)
    assert answer["entries"] == 1 and answer["bytes"] > 0 and nodes.store().size() == (0, 0)
    assert nodes.Flux2EncodePrompt.execute(mistral, PROMPT).args[1].startswith("Miss")


def test_the_loader_node_defers_reading(tools, small_models, tmp_path, monkeypatch):
    import folder_paths
    from flux2_pack.nodes import attention, loaders

    (tmp_path / "te.safetensors").symlink_to(small_models["text_encoder"])
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths,
        "text_encoders",
        ([str(tmp_path)], folder_paths.folder_names_and_paths["text_encoders"][1]),
    )
    folder_paths.filename_list_cache.pop("text_encoders", None)
    clip = loaders.Flux2LoadTextEncoder.execute(
        "te.safetensors", "default", attention="sdpa-math", load="when needed"
    ).args[0]
    assert not tools.lazy.is_loaded(clip) and "not loaded" in attention.encoder_report(clip)
    done = tools.prompts.encode(clip, PROMPT)
    assert (
        tools.lazy.is_loaded(clip)
        and done.conditioning[0][0].isfinite().all()
        and "sdpa-math" in attention.encoder_report(clip)
    )
    with pytest.raises(ValueError, match="flash2"):
        loaders.Flux2LoadTextEncoder.execute("te.safetensors", "cpu", attention="flash2", load="when needed")
    folder_paths.filename_list_cache.pop("text_encoders", None)
