"""The prompt nodes in a running ComfyUI: pictures as with CLIP Text Encode, hits across runs, the clear button's
address, and the page's widgets.
"""

import json
import urllib.request

import pytest
import torch

import browser
import prompt_models
from api_workflow import PictureSettings, fill, nodes_of
from comfy_client import ExecutionFailed, PromptRefused
from server_fixture import run
from test_server import NODE, SIZE, latents, names, node, with_latents  # noqa: F401


@pytest.fixture
def clear(server):
    """A function that presses the clear button's address; called before and after each test."""

    def press():
        with urllib.request.urlopen(
            urllib.request.Request(f"{server.url}/flux2_attention/prompt_cache/clear", method="POST"), timeout=30
        ) as answer:
            return json.load(answer)

    press()
    yield press
    press()


def reports(result):
    """What the nodes named show... showed, in order."""
    return [text for key in sorted(result.outputs) if key.startswith("show") for text in result.outputs[key]["text"]]


def encoding(names, number):
    """A workflow of loader, prompt and preview. Each number gives another size of the cache, or ComfyUI would take the
    outputs of the last run.
    """
    return {
        "load": node(
            "Flux2LoadTextEncoder", text_encoder_name=names["text_encoders"], device="default", load="when needed"
        ),
        "encode": node("Flux2EncodePrompt", clip=["load", 0], text="A red fox", cache_gib=1.0 + number / 4),
        "show": node("PreviewAny", source=["encode", 1]),
    }


def test_latents_equal_those_of_clip_text_encode(server, names, clear):
    plain = fill(PictureSettings("A red fox", models=names, **SIZE))
    (expected,) = latents(server, run(server, with_latents(plain, (NODE["sampler"], 0))))
    for size in (1.0, 1.5):  # a miss, then a hit
        ours = fill(PictureSettings("A red fox", models=names, **SIZE))
        (entry,) = nodes_of(ours, "CLIPTextEncode")
        entry["class_type"], entry["inputs"]["cache_gib"] = "Flux2EncodePrompt", size
        (result,) = latents(server, run(server, with_latents(ours, (NODE["sampler"], 0))))
        assert torch.equal(result, expected)


def test_a_second_run_hits_and_clearing_makes_it_miss(server, names, clear):
    texts = [reports(run(server, encoding(names, number)))[0] for number in (1, 2)]
    assert texts[0].startswith("Miss: encoded in") and texts[1].startswith("Hit: read from disk")
    folder = server.base / "user" / "flux2_attention" / "prompts"
    assert len(list(folder.iterdir())) == 1
    assert clear()["entries"] == 1 and not list(folder.iterdir())
    assert reports(run(server, encoding(names, 3)))[0].startswith("Miss")


def loads(server):
    """How many text encoders this server has loaded so far, by ComfyUI's own line in its log."""
    return server.log.read_text(errors="replace").count("CLIP/text encoder model load device")


def test_a_prompt_on_disk_loads_no_encoder(server, names, clear):
    """ComfyUI's executor and its RAM cache look at every output between two nodes; looking must not load."""

    def step(number, memory, text="A red fox"):
        workflow = encoding(names, number)
        workflow["load"]["inputs"] |= {"memory": memory, "padding": "reference"}  # new inputs: the loader runs again
        workflow["encode"]["inputs"]["text"] = text
        return reports(run(server, workflow))[0].split(":")[0]

    before = loads(server)
    assert step(30, "auto") == "Miss" and loads(server) == before + 1
    assert [step(31, "keep on GPU"), step(32, "CPU when idle")] == ["Hit", "Hit"]
    assert loads(server) == before + 1, "a prompt that is on disk loaded the text encoder"
    assert step(33, "CPU when idle", "A blue fox") == "Miss" and loads(server) == before + 2


def test_a_list_makes_as_many_outputs(server, names, clear):
    workflow = {
        "load": node("Flux2LoadTextEncoder", text_encoder_name=names["text_encoders"], device="default"),
        "list": node("Flux2EncodePrompts", clip=["load", 0], prompts="a cat\na dog\n\na tree"),
        "show-1": node("PreviewAny", source=["list", 1]),
        "show-2": node("PreviewAny", source=["list", 2]),
    }
    shown = reports(run(server, workflow))
    assert shown[:3] == ["a cat", "a dog", "a tree"] and shown[3].startswith("3 prompts: 0 from disk, 3 encoded.")


def test_an_edited_prompt_file_is_read_by_the_next_run(server, names, clear):
    """The workflow stays the same, and ComfyUI would show the outputs of the first run."""
    file = server.base / "input" / "prompts-of-a-test.txt"
    workflow = {
        "load": node("Flux2LoadTextEncoder", text_encoder_name=names["text_encoders"], device="default"),
        "list": node("Flux2EncodePrompts", clip=["load", 0], prompts="", file=file.name),
        "show": node("PreviewAny", source=["list", 1]),
    }
    try:
        shown = [(file.write_text(text), reports(run(server, workflow)))[1] for text in ("a cat\n", "a dog\na fox\n")]
    finally:
        file.unlink(missing_ok=True)
    assert shown == [["a cat"], ["a dog", "a fox"]]


def test_a_prompt_file_is_chosen_from_those_that_are_there_and_a_name_may_be_linked(server, names, clear, shared_page):
    """Saved graphs have any name as their value, and may have a text connected there."""
    file = server.base / "input" / "prompts-to-choose.txt"
    file.write_text("a cat\na dog\n")
    try:
        (page := shared_page).load({"nodes": [], "links": [], "version": 0.4}, "prompt file")
        page.js("await app.refreshComboInNodes()")
        found = page.js("""
            const node = LiteGraph.createNode('Flux2EncodePrompts'), text = LiteGraph.createNode('PrimitiveString');
            [node, text].forEach(one => app.graph.add(one));
            const widget = node.widgets.find(({name}) => name === 'file');
            const {type, value, options: {values, getOptionLabel}} = widget;
            widget.value = 'an-old-name.txt';
            const sent = (await app.graphToPrompt()).output[node.id].inputs.file;
            const slot = node.inputs.findIndex(({name}) => name === 'file');
            const linked = !!text.connect(0, node, slot);
            return {type, value, values: [...values], none: getOptionLabel(''), sent, linked};
        """)
        workflow = {
            "load": node("Flux2LoadTextEncoder", text_encoder_name=names["text_encoders"], device="default"),
            "name": node("PrimitiveString", value=file.name),
            "list": node("Flux2EncodePrompts", clip=["load", 0], prompts="", file=["name", 0]),
            "show": node("PreviewAny", source=["list", 1]),
        }
        shown = reports(run(server, workflow))
    finally:
        file.unlink(missing_ok=True)
    assert found["type"] == "combo" and found["value"] == "" and found["none"] == "no file"
    assert found["values"][0] == "" and file.name in found["values"]
    assert found["sent"] == "an-old-name.txt" and found["linked"]
    assert shown == ["a cat", "a dog"]


@pytest.mark.parametrize(
    "inputs, said",
    [
        ({"prompts": " ", "file": ""}, "There is no prompt to encode"),
        ({"prompts": "", "file": "none.txt"}, "There is no 'none.txt'"),
    ],
)
def test_bad_lists_are_said(server, names, inputs, said):
    workflow = {
        "load": node("Flux2LoadTextEncoder", text_encoder_name=names["text_encoders"], device="default"),
        "list": node("Flux2EncodePrompts", clip=["load", 0], **inputs),
        "show": node("PreviewAny", source=["list", 2]),
    }
    with pytest.raises((ExecutionFailed, PromptRefused), match=said):
        run(server, workflow)


def writing(name, **inputs):
    return {
        "load": node("Flux2LoadTextEncoder", text_encoder_name=name, device="default", load="when needed"),
        "write": node(
            "Flux2UpsamplePrompt",
            clip=["load", 0],
            **{"text": "a cat", "seed": 1, "temperature": 0.5, "max_tokens": 8, **inputs},
        ),
        "show-1": node("PreviewAny", source=["write", 0]),
        "show-2": node("PreviewAny", source=["write", 1]),
    }


def test_a_prompt_is_improved_with_a_picture(server, clear):
    file = server.base / "models" / "text_encoders" / "writes.safetensors"
    prompt_models.single_file(file, prompt_models.mistral3(prompt_models.PUBLISHED))
    try:
        workflow = {
            "image": node("EmptyImage", width=64, height=48, batch_size=1, color=255),
            **writing("writes.safetensors", image_2=["image", 0]),
        }
        written, report = reports(run(server, workflow))
    finally:
        file.unlink()
    assert written and report.startswith("Wrote 8 tokens")


def test_an_encoder_without_lm_head_is_said(server, names):
    with pytest.raises(ExecutionFailed, match="has 30 layers and no lm_head"):
        run(server, writing(names["text_encoders"]))


@pytest.mark.skipif(browser.missing() is not None, reason=f"no browser: {browser.missing()}")
def test_the_page_has_a_button_and_the_report(server, names, clear):
    run(server, encoding(names, 10))
    with browser.Page(server.url) as page:
        page.js("""
            for (const [index, type] of ['Flux2EncodePrompt', 'Flux2EncodePrompts', 'Flux2UpsamplePrompt'].entries()) {
              const node = LiteGraph.createNode(type); node.pos = [100 + 500 * index, 200]; app.graph.add(node);
            }""")
        saved = {entry["type"]: [widget["name"] for widget in entry["widgets"]] for entry in page.nodes()}
        assert saved["Flux2EncodePrompt"] == ["text", "long_prompts", "cache_gib"]
        assert saved["Flux2EncodePrompts"] == ["prompts", "file", "split", "long_prompts", "cache_gib"]
        assert saved["Flux2UpsamplePrompt"][:4] == ["text", "seed", "control_after_generate", "temperature"]
        page.js("""
            const node = app.graph.nodes.find(({type}) => type === 'Flux2EncodePrompt');
            node.widgets.find(({type}) => type === 'button').callback();
            node.onExecuted({text: ['Hit: this is a report']});""")
        report = (
            "app.graph.nodes.find(({type}) => type === 'Flux2EncodePrompt').widgets.find(({name}) => name === "
            "'report').value"
        )
        # all prompts of all graphs go: the page asks first
        page.wait_for("document.querySelector('.flux2-dialog')?.innerText.includes('prompts')")
        assert page.js(f"return {report}") == "Hit: this is a report"
        page.js("""
            const buttons = [...document.querySelectorAll('.flux2-dialog button')];
            buttons.find(({innerText}) => innerText === 'Delete').click();""")
        page.wait_for(f"{report}.startsWith('Cleared: 1 prompts')")
