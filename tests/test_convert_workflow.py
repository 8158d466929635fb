"""scripts/convert_workflow.py on ComfyUI's own FLUX.2 graphs and on hand-made ones: what it replaces, what it leaves,
the way back, the same picture.

  bash scripts/test.sh -k test_convert_workflow

The official graphs come from the installed package comfyui-workflow-templates-json and from ComfyUI's folder
blueprints. They run on small models under the official file names. ComfyUI's CLIPLoader builds full-size encoders only,
so there the reference shares our text encoder (test_loaders checks that against transformers); its model, sampling,
LoRA and VAE are ComfyUI's. Not covered: the published weights.
"""

import copy
import hashlib
import json
import os
import random
import subprocess
import sys
import time
import urllib.request

import numpy
import pytest
from PIL import Image
from safetensors.torch import load_file

import convert_workflow
from flux2_pack.flux2.workflows import api_format as convert_api, layout as convert_layout, page_format as convert_gui
from flux2_pack.flux2.workflows.rules import LOADERS, OURS, NotConvertible, decide
from page_fixture import unknown_nodes
from server_fixture import SCRIPTS, run
from template_models import nodes_in, official_files, official_folder

# those of one encoder together
OFFICIAL = sorted(official_files(), key=lambda name: ("klein" in name or "9b" in name, "9b" in name))
ALSO_FLUX2 = {"gsl_starter_1_3", "templates-all_in_one-image_edit_models"}  # they hold the same subgraphs
BLUEPRINTS = {"Image Edit (Flux.2 Dev)", "Image Edit (Flux.2 Klein 4B)", "Text to Image (Flux.2 Dev)"}
TIGHT = {"image_flux2", "image_flux2_klein_text_to_image", "image_flux2_text_to_image_9b"}
PAIRS = {old: row.new for old, row in LOADERS.items()}
# What differs is the kernel: ours measures and takes one of PyTorch's, ComfyUI on a CPU its sub-quadratic one. 1e-7 to
# 1e-6 was measured.
SAME = 1e-5


def official(name):
    return json.loads(official_files()[name].read_text())


# --- there and back, on files ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def all_files(comfyui):
    """{name: path} of every template and blueprint of the installed ComfyUI."""
    paths = [*official_folder().glob("*.json"), *(comfyui / "blueprints").glob("*.json")]
    found = {path.stem: path for path in paths if not path.stem.startswith(("index", "fuse"))}
    assert len(found) > 500
    return found


def test_of_all_templates_those_of_flux2_are_converted_and_nothing_else(all_files):
    converted, sentences = set(), {}
    for name, path in all_files.items():
        try:
            convert_workflow.convert(json.loads(path.read_text()))
            converted.add(name)
        except NotConvertible as error:
            sentences[name] = str(error)
    types = {
        name: {entry["type"] for entry in nodes_in(json.loads(path.read_text()))} for name, path in all_files.items()
    }
    assert (
        converted
        == {name for name, found in types.items() if {"UNETLoader", "Flux2Scheduler"} <= found}
        >= {*OFFICIAL, *BLUEPRINTS}
    )
    assert all(
        sentence.startswith("Nothing to replace: expected were ComfyUI's loaders") for sentence in sentences.values()
    )
    # same VAE, encoder type and latent node
    assert "ernie-image.safetensors nor its connections say FLUX.2" in sentences["image_ernie_image"]
    assert "flux1-dev.safetensors is named as another model" in sentences["flux_dev_full_text_to_image"]


@pytest.mark.parametrize("name", [*OFFICIAL, *sorted(ALSO_FLUX2 | BLUEPRINTS)])
def test_the_way_back_gives_the_same_bytes(all_files, name):
    if name not in all_files:
        pytest.skip(f"this ComfyUI has no {name}")
    text = all_files[name].read_text()
    there, _ = convert_workflow.convert(json.loads(text))
    back, _ = convert_workflow.undo(json.loads(json.dumps(there)))
    assert convert_workflow.in_the_style_of(text, back) == text


def without_origin(link):
    return (
        [link[0], *link[3:]]
        if isinstance(link, list)
        else {key: value for key, value in link.items() if not key.startswith("origin")}
    )


@pytest.mark.parametrize("name", OFFICIAL)
def test_everything_else_stays(name):
    before = official(name)
    after, report = convert_workflow.convert(before)
    for (_, old), (_, new) in zip(convert_gui.scopes(before), convert_gui.scopes(after)):
        assert (
            old.get("groups") == new.get("groups")
            and old.get("inputs") == new.get("inputs")
            and old.get("outputs") == new.get("outputs")
        )
        assert list(map(without_origin, old["links"])) == list(map(without_origin, new["links"]))[: len(old["links"])]
        for one, other in zip(old["nodes"], new["nodes"]):
            moved = name in TIGHT and one["type"] in LOADERS  # too tight for our widgets
            assert one["pos"] == other["pos"] or moved
            assert other["type"] == PAIRS.get(one["type"], one["type"]) and (one["id"], one.get("title")) == (
                other["id"],
                other.get("title"),
            )
            assert one == other or one["type"] in LOADERS or "proxyWidgets" in one["properties"]
    replaced = [node for node in nodes_in(before) if node["type"] in LOADERS]
    assert len([line for line in report if line.startswith("replaced")]) == len(replaced)
    assert not [line for line in report if line.startswith("left")]


def test_a_graph_of_two_families_is_converted_in_part(all_files):
    data = json.loads(all_files["templates-all_in_one-image_edit_models"].read_text())
    after, report = convert_workflow.convert(data)
    assert sorted(entry["widgets_values"][0] for entry in nodes_in(after) if entry["type"] in LOADERS) == [
        "qwen_2.5_vl_7b_fp8_scaled.safetensors",
        "qwen_image_edit_2511_bf16.safetensors",
        "qwen_image_vae.safetensors",
    ]
    assert [line for line in report if "CLIPLoader 149" in line and "its type is qwen_image, not flux2" in line]


# --- rules, on hand-made API workflows -------------------------------------------------------------------------------


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs, "_meta": {"title": class_type}}


def api(
    unet="flux2_dev.safetensors",
    clip="mistral.safetensors",
    vae="flux2-vae.safetensors",
    scheduler="Flux2Scheduler",
    **changes,
):
    made = {
        "1": node("UNETLoader", unet_name=unet, weight_dtype="default"),
        "2": node("CLIPLoader", clip_name=clip, type="flux2", device="cpu"),
        "3": node("VAELoader", vae_name=vae),
        "4": node("CLIPTextEncode", clip=["2", 0], text="a cat"),
        "5": node("BasicGuider", model=["1", 0], conditioning=["4", 0]),
        "6": node(scheduler, steps=4, width=64, height=64),
        "7": node("SamplerCustomAdvanced", guider=["5", 0], sigmas=["6", 0]),
        "8": node("VAEDecode", samples=["7", 0], vae=["3", 0]),
    }
    for key, inputs in changes.items():
        made[key.strip("_")]["inputs"].update(inputs)
    return made


def test_the_pages_command_gets_the_workflow_or_the_reason_why_there_is_none(comfy):
    from flux2_pack.nodes import workflows

    before = api()
    after, report = convert_workflow.convert(before)
    assert workflows.answer(before) == {"changed": True, "workflow": after, "text": "\n".join(report)}
    refused = workflows.answer(after)
    assert not refused["changed"] and "workflow" not in refused and refused["text"].endswith(".")


def test_an_api_workflow_there_and_back():
    before = api()
    after, report = convert_workflow.convert(before, "flash4")
    assert [after[key]["class_type"] for key in "123"] == ["Flux2LoadModel", "Flux2LoadTextEncoder", "Flux2LoadVAE"]
    assert after["1"]["inputs"] == {"model_name": "flux2_dev.safetensors", "weight_dtype": "as stored"}
    assert after["2"]["inputs"] == {"text_encoder_name": "mistral.safetensors", "device": "cpu"}
    assert after["3"]["inputs"] == {"vae_name": "flux2-vae.safetensors", "precision": "auto"}
    assert after["9"]["class_type"] == "Flux2SelectAttention" and after["9"]["inputs"] == {
        "model": ["1", 0],
        "backend": "flash4",
    }
    assert after["5"]["inputs"]["model"] == ["9", 0]
    assert report == [
        "replaced UNETLoader 1 by Flux2LoadModel",
        "replaced CLIPLoader 2 by Flux2LoadTextEncoder",
        "replaced VAELoader 3 by Flux2LoadVAE",
        "added Flux2SelectAttention 9 with backend flash4",
    ]
    assert convert_workflow.undo(after)[0] == before


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        (dict(unet="mine.safetensors"), {}),  # the scheduler says it
        (dict(unet="mine.safetensors", vae="mine.safetensors"), {}),  # the only VAE beside the only model
        (
            dict(unet="mine.safetensors", scheduler="BasicScheduler"),
            {"1": "neither its file mine", "2": "no FLUX.2 diffusion model", "3": "no FLUX.2"},
        ),
        (
            dict(unet="flux1-dev.safetensors", vae="ae.safetensors"),
            {"1": "another model of the FLUX family", "2": "no FLUX.2", "3": "other models"},
        ),
        (
            dict(unet="flux3-image-klein-4b.safetensors"),
            {"1": "another model of the FLUX family", "2": "no FLUX.2", "3": "no FLUX.2"},
        ),
        (dict(_2={"type": "sd3"}), {"2": "its type is sd3, not flux2"}),
        (dict(clip="ministral-3-3b.safetensors"), {"2": "text encoder of another model"}),
        (dict(vae="taef1"), {"3": "not a VAE file"}),
        (dict(_1={"weight_dtype": "fp8_e5m2"}), {"1": "weight_dtype is 'fp8_e5m2'"}),
        (dict(_1={"weight_dtype": ["4", 0]}), {"1": "input weight_dtype comes from another node"}),
        # of a newer ComfyUI, say
        (dict(_1={"compute_dtype": "fp16"}), {"1": "an input that is not known here (compute_dtype)"}),
        (dict(_3={"tiles": ["4", 0]}), {"3": "an input that is not known here (tiles)"}),
    ],
)
def test_what_stays_and_why(changes, left):
    graph = convert_api.graph(api(**changes))
    plan = decide(graph)
    assert {key for _, key in plan.left} == set(left)
    assert all(why in plan.left["", key] for key, why in left.items())


def test_an_encoder_that_also_writes_text_stays():
    """Generate Text needs the layers above the last that FLUX.2 reads, which this pack's loader leaves out."""
    before = api() | {"20": node("TextGenerate", clip=["2", 0], prompt="a cat")}
    plan = decide(convert_api.graph(before))
    assert set(plan.left) == {("", "2")} and "TextGenerate 20 reads it too" in plan.left["", "2"]


def test_a_model_that_stays_for_its_number_format_gets_a_selector_all_the_same():
    before = api(_1={"weight_dtype": "fp8_e4m3fn_fast"})
    after, report = convert_workflow.convert(before)
    assert after["1"] == before["1"] and after["5"]["inputs"]["model"] == ["9", 0] and "left UNETLoader 1" in report[-1]
    assert convert_workflow.undo(after)[0] == before


def test_the_user_can_say_which_loaders_are_flux2s():
    before = api(unet="mine.safetensors", scheduler="BasicScheduler")
    with pytest.raises(NotConvertible, match="Found: UNETLoader 1: neither its file mine.*say --node"):
        convert_workflow.convert(before)
    after, _ = convert_workflow.convert(before, wanted=["1"])
    # the others follow from the first
    assert after["1"]["class_type"] == "Flux2LoadModel" and after["2"]["class_type"] == "Flux2LoadTextEncoder"
    with pytest.raises(NotConvertible, match="no loader 77. The loaders that can be replaced are: 1, 2, 3"):
        convert_workflow.convert(before, wanted=["77"])


def test_a_gguf_model_of_another_pack_stays_and_a_selector_comes_behind_it():
    """FLUX.2's scheduler says that the only model here is FLUX.2's. Its encoder and VAE are ComfyUI's own."""
    before = api()
    before["1"] = node("UnetLoaderGGUF", unet_name="some.gguf")
    after, report = convert_workflow.convert(before)
    assert after["1"] == before["1"] and {after[key]["class_type"] for key in "23"} == {
        "Flux2LoadTextEncoder",
        "Flux2LoadVAE",
    }
    assert after["9"]["class_type"] == "Flux2SelectAttention" and after["9"]["inputs"]["model"] == ["1", 0]
    assert after["5"]["inputs"]["model"] == ["9", 0]
    assert "added Flux2SelectAttention 9 with backend auto behind UnetLoaderGGUF 1" in report
    assert convert_workflow.undo(after)[0] == before


def test_a_gguf_encoder_stays_with_its_loader():
    before = api(**{"2": node("CLIPLoaderGGUF", clip_name="mistral.gguf", type="flux2")})
    after, _ = convert_workflow.convert(before)
    assert after["2"] == before["2"] and after["1"]["class_type"] == "Flux2LoadModel"
    before = api()
    before["2"]["inputs"]["clip_name"] = "mistral.gguf"
    _, report = convert_workflow.convert(before)
    assert "left CLIPLoader 2: mistral.gguf is a GGUF file, which stays with its loader" in report


def test_one_of_several_models_of_other_loaders_stays_with_a_line():
    before = api()
    before["1"] = node("UnetLoaderGGUF", unet_name="some.gguf")
    before["20"] = node("SomebodysLoader", file="other")
    before["21"] = node("ModelMergeSimple", model1=["1", 0], model=["20", 1])
    _, report = convert_workflow.convert(before)
    line = "it gives one of several models here, and neither its file nor its connections say FLUX.2"
    assert f"left UnetLoaderGGUF 1: {line}" in report and f"left SomebodysLoader 20: {line}" in report
    before["1"]["inputs"]["unet_name"] = "flux2-dev-Q4_K_S.gguf"
    after, report = convert_workflow.convert(before)
    assert after["21"]["inputs"]["model"] == ["20", 1] and any("behind UnetLoaderGGUF 1" in line for line in report)
    before["20"]["inputs"]["file"] = "flux1-dev.gguf"
    _, report = convert_workflow.convert(before)
    assert "left SomebodysLoader 20: flux1-dev.gguf is named as another model of the FLUX family" in report


def test_a_model_that_is_not_the_first_output_keeps_its_place():
    before = api()
    before["1"] = node("SomebodysLoader", file="flux2.bin")
    before["5"]["inputs"]["model"] = ["1", 2]
    after, _ = convert_workflow.convert(before)
    assert after["9"]["inputs"]["model"] == ["1", 2] and after["5"]["inputs"]["model"] == ["9", 0]
    assert convert_workflow.undo(after)[0] == before


def test_loaders_without_links_are_judged_by_the_whole_file():
    """Packs such as Use Everywhere connect by name."""
    data = api()
    for key in ("4", "8"):
        data[key]["inputs"] = {"text": "a cat"}
    after, _ = convert_workflow.convert(data)
    assert {after[key]["class_type"] for key in "123"} == set(OURS)


def test_file_names_from_other_nodes_stay_connected():
    before = api()
    before["10"] = node("PrimitiveString", value="flux2_dev.safetensors")
    before["1"]["inputs"]["unet_name"] = ["10", 0]
    after, _ = convert_workflow.convert(before)
    assert after["1"]["inputs"]["model_name"] == ["10", 0]
    assert convert_workflow.undo(after)[0] == before


def test_a_selector_that_is_there_is_enough():
    before = api()
    before["9"] = node("Flux2SelectAttention", model=["1", 0], backend="sdpa")
    before["5"]["inputs"]["model"] = ["9", 0]
    after, _ = convert_workflow.convert(before)
    assert [entry["class_type"] for entry in after.values()].count("Flux2SelectAttention") == 1
    assert convert_workflow.undo(after)[0] == before


def test_what_was_changed_since_survives_the_way_back():
    after, _ = convert_workflow.convert(api())
    after["1"]["inputs"].update(model_name="other.safetensors", weight_dtype="fp8")
    after["9"]["inputs"]["backend"] = "sdpa"
    after["20"] = node("LoraLoaderModelOnly", model=["9", 0], lora_name="a", strength_model=1.0)
    after["5"]["inputs"]["model"] = ["20", 0]
    back, _ = convert_workflow.undo(after)
    assert back["1"]["inputs"] == {"unet_name": "other.safetensors", "weight_dtype": "fp8_e4m3fn"}
    assert back["20"]["inputs"]["model"] == ["1", 0] and back["5"]["inputs"]["model"] == ["20", 0] and "9" not in back


def test_a_value_without_counterpart_is_refused_on_the_way_back():
    after, _ = convert_workflow.convert(api())
    after["1"]["inputs"]["weight_dtype"] = "bf16"
    with pytest.raises(
        NotConvertible,
        match="set to 'bf16', which ComfyUI's weight_dtype does not have. Set it to one of 'as stored', 'fp8'",
    ):
        convert_workflow.undo(after)


def test_converting_twice_and_undoing_twice_are_refused():
    after, _ = convert_workflow.convert(api())
    with pytest.raises(NotConvertible, match="has the loaders of this pack already. --undo goes back"):
        convert_workflow.convert(after)
    with pytest.raises(NotConvertible, match="Nothing to undo"):
        convert_workflow.undo(convert_workflow.undo(after)[0])


# --- the page's format, hand-made ------------------------------------------------------------------------------------


def slot(name, kind, link=None, widget=False):
    return {"name": name, "type": kind, "link": link, **({"widget": {"name": name}} if widget else {})}


def gui(**changes):
    """A loader, an encoder whose inputs are all there as slots (device connected), and what they feed."""
    box = {"size": [200, 82], "mode": 0, "properties": {}}
    nodes = [
        {
            **box,
            "id": 1,
            "type": "UNETLoader",
            "pos": [0, 0],
            "order": 0,
            "inputs": [],
            "outputs": [{"name": "MODEL", "type": "MODEL", "links": [1, 2]}],
            "widgets_values": ["flux2_dev.safetensors", "default"],
        },
        {
            **box,
            "id": 2,
            "type": "CLIPLoader",
            "pos": [0, 200],
            "order": 1,
            "properties": {"ver": "0.3"},
            "inputs": [
                slot("clip_name", "COMBO", None, True),
                slot("type", "COMBO", None, True),
                slot("device", "COMBO", 3, True),
            ],
            "outputs": [{"name": "CLIP", "type": "CLIP"}],
            "widgets_values": ["mistral.safetensors", "flux2", "default"],
        },
        {**box, "id": 3, "type": "BasicGuider", "pos": [400, 0], "inputs": [slot("model", "MODEL", 1)]},
        {**box, "id": 4, "type": "ModelPassThrough", "pos": [400, 200], "inputs": [slot("model", "MODEL", 2)]},
        {
            **box,
            "id": 5,
            "type": "PrimitiveNode",
            "pos": [-300, 0],
            "outputs": [{"name": "COMBO", "type": "COMBO", "links": [3]}],
        },
    ]
    links = [[1, 1, 0, 3, 0, "MODEL"], [2, 1, 0, 4, 0, "MODEL"], [3, 5, 0, 2, 2, "COMBO"]]
    return {
        "last_node_id": 5,
        "last_link_id": 3,
        "nodes": nodes,
        "links": links,
        "groups": [],
        "version": 0.4,
        **changes,
    }


def by_id(data, identity):
    return next(node for node in data["nodes"] if node["id"] == identity)


def test_links_follow_the_slots():
    before = gui()
    after, _ = convert_workflow.convert(before)
    encoder = by_id(after, 2)
    assert [entry["name"] for entry in encoder["inputs"]] == ["text_encoder_name", "device"] and [
        3,
        5,
        0,
        2,
        1,
        "COMBO",
    ] in after["links"]
    assert encoder["widgets_values"] == ["mistral.safetensors", "default"] and "ver" not in encoder["properties"]
    selector = by_id(after, 6)
    assert (
        selector["inputs"][0]["link"] == 4
        and selector["outputs"][0]["links"] == [1, 2]
        and by_id(after, 1)["outputs"][0]["links"] == [4]
    )
    assert [link for link in after["links"] if link[5] == "MODEL"] == [
        [1, 6, 0, 3, 0, "MODEL"],
        [2, 6, 0, 4, 0, "MODEL"],
        [4, 1, 0, 6, 0, "MODEL"],
    ]
    assert (after["last_node_id"], after["last_link_id"]) == (6, 4)
    assert convert_workflow.undo(after)[0] == before


def test_a_loader_that_saves_more_widgets_than_known_stays():
    before = gui()
    by_id(before, 1)["widgets_values"].append("fp16")
    after, report = convert_workflow.convert(before)
    assert (
        by_id(after, 1)["type"] == "UNETLoader"
        and "left UNETLoader 1: it has an input that is not known here (number 3)" in report
    )


def test_the_newest_file_version_keeps_links_as_objects():
    before = gui()
    before["state"] = {"lastNodeId": before.pop("last_node_id"), "lastLinkId": before.pop("last_link_id")}
    before.update(version=1, links=[dict(zip(convert_gui.LINK, link)) for link in before["links"]])
    after, _ = convert_workflow.convert(before)
    assert after["links"][-1] == dict(zip(convert_gui.LINK, (4, 1, 0, 6, 0, "MODEL"))) and after["state"] == {
        "lastNodeId": 6,
        "lastLinkId": 4,
    }
    assert convert_workflow.undo(after)[0] == before


def test_a_selector_that_was_cut_off_or_moved_is_taken_out_all_the_same():
    after, _ = convert_workflow.convert(gui())
    after["links"] = [link for link in after["links"] if link[0] not in (4, 2)]  # its input, and one of its outputs
    by_id(after, 6)["inputs"][0]["link"], by_id(after, 6)["outputs"][0]["links"] = None, [1]
    by_id(after, 1)["outputs"][0]["links"], by_id(after, 4)["inputs"][0]["link"] = [], None
    back, _ = convert_workflow.undo(after)
    assert by_id(back, 3)["inputs"][0]["link"] is None and [link[5] for link in back["links"]] == ["COMBO"]
    assert "Flux2SelectAttention" not in [entry["type"] for entry in back["nodes"]]


def test_a_connection_that_the_old_node_has_no_place_for_is_refused():
    after, _ = convert_workflow.convert(gui())
    by_id(after, 1)["inputs"] = [slot("memory", "COMBO", 9, True)]
    with pytest.raises(
        NotConvertible, match="input memory of Flux2LoadModel 1 is connected, and UNETLoader has no such input"
    ):
        convert_workflow.undo(after)


def test_widgets_shown_on_subgraph_nodes_are_renamed_at_every_depth():
    """A loader in a subgraph in a subgraph, its file name shown on both nodes, and once more by a newer page's
    notation.
    """
    loader = gui()["nodes"][0]
    inner = {
        "id": "inner",
        "name": "Inner",
        "nodes": [loader, gui()["nodes"][2]],
        "links": [dict(zip(convert_gui.LINK, (1, 1, 0, 3, 0, "MODEL")))],
    }
    loader["outputs"][0]["links"] = [1]
    box = {"pos": [0, 0], "size": [200, 100]}
    instance = {
        **box,
        "id": 7,
        "type": "inner",
        "properties": {"proxyWidgets": [["1", "unet_name"], ["1", "weight_dtype"]]},
    }
    outer = {"id": "outer", "name": "Outer", "nodes": [instance], "links": []}
    top = {
        **box,
        "id": 8,
        "type": "outer",
        "properties": {"proxyWidgets": [["7", "1: unet_name"], ["7", "unet_name"], ["9", "unet_name"]]},
    }
    before = {"nodes": [top], "links": [], "definitions": {"subgraphs": [outer, inner]}, "version": 0.4}
    after, _ = convert_workflow.convert(before)
    shown = [node["properties"]["proxyWidgets"] for node in nodes_in(after) if "proxyWidgets" in node["properties"]]
    assert shown == [
        [["7", "1: model_name"], ["7", "model_name"], ["9", "unet_name"]],
        [["1", "model_name"], ["1", "weight_dtype"]],
    ]
    assert convert_workflow.undo(after)[0] == before


def test_on_the_canvas_too_a_gguf_loader_stays_with_a_selector_behind_it():
    before = gui()
    before["nodes"][0].update(type="UnetLoaderGGUF", widgets_values=["flux2-dev-Q4_0.gguf"])
    after, report = convert_workflow.convert(before)
    new = next(node for node in after["nodes"] if node["type"] == "Flux2SelectAttention")
    assert by_id(after, 1)["type"] == "UnetLoaderGGUF" and new["outputs"][0]["links"] == [1, 2]
    assert by_id(after, 1)["outputs"][0]["links"] == [new["inputs"][0]["link"]]
    assert any(line.endswith("behind UnetLoaderGGUF 1") for line in report)
    assert convert_workflow.undo(after)[0] == before
    with pytest.raises(NotConvertible, match="Nothing to replace"):
        convert_workflow.convert(after)


def large(nodes):
    """A page's graph of so many nodes in which each tenth is a loader of its own FLUX.2 model, and one subgraph."""
    made, links = [], []
    for number in range(0, nodes, 10):
        left, top = 500 * (number // 10 % 40), 900 * (number // 400)
        for place in range(10):
            loader, link = place == 0, 10 * number + place
            node = {"id": number + place, "mode": 0, "order": 0, "size": [200, 82], "properties": {}}
            made.append(
                node
                | {
                    "type": "UNETLoader" if loader else "Flux2Scheduler" if place == 1 else "Note",
                    "pos": [left, top + 85 * place],
                    "inputs": [slot("model", "MODEL", link)] if place == 1 else [],
                    "outputs": [{"name": "MODEL", "type": "MODEL", "links": [link + 1]}] if loader else [],
                    "widgets_values": ["flux2_dev.safetensors", "default"] if loader else [],
                }
            )
        made[-9]["inputs"][0]["link"] = 10 * number + 1
        links.append([10 * number + 1, number, 0, number + 1, 0, "MODEL"])
    return {"nodes": made, "links": links, "last_node_id": nodes, "last_link_id": 10 * nodes, "version": 0.4}


def test_a_graph_of_20_000_nodes_converts_in_seconds():
    """2,000 loaders among them; the time is the processor's, for the machine may be busy with other things."""
    before = large(20_000)
    start = time.process_time()
    after, report = convert_workflow.convert(before)
    assert time.process_time() - start < 5.0 and len(report) == 4000
    boxes = {node["id"]: convert_layout.box(node) for node in after["nodes"]}
    canvas = convert_layout.Canvas(after)
    new = [node for node in after["nodes"] if node["type"] == "Flux2SelectAttention"]
    assert len(new) == 2000 and not any(canvas.covered(boxes[node["id"]], but={id(node)}) for node in new)
    start = time.process_time()
    assert convert_workflow.undo(after)[0] == before
    assert time.process_time() - start < 10.0


def test_a_new_selector_covers_nothing():
    """Neither nodes nor the frame of a group, however tight the place is."""
    before = gui()
    before["nodes"] += [
        {"id": 100 + i, "type": "Note", "pos": [310 * (i % 5) - 600, 150 * (i // 5) - 450], "size": [290, 100]}
        for i in range(30)
    ]
    before["groups"] = [
        {"title": "g", "bounding": [-700, -700, 400, 400]},
        {"title": "h", "bounding": [-2000, -2000, 9000, 9000]},
    ]
    after, _ = convert_workflow.convert(before)
    new = convert_layout.box(next(node for node in after["nodes"] if node["type"] == "Flux2SelectAttention"))
    assert not any(convert_layout.touch(new, convert_layout.box(node)) for node in before["nodes"])
    assert not convert_layout.touch(new, (-700, -700, -300, -300)) and convert_layout.inside(
        new, (-2000, -2000, 7000, 7000)
    )


# --- bad files and the command line ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        [],
        {},
        7,
        None,
        "text",
        {"nodes": 3, "links": []},
        {"1": {"class_type": 3, "inputs": {}}},
        {"nodes": [1, 2], "links": []},
        {"nodes": [{"id": 1, "type": "UNETLoader"}], "links": [[1]]},
    ],
)
def test_what_is_no_workflow_is_refused(data):
    for action in (convert_workflow.convert, convert_workflow.undo):
        with pytest.raises(NotConvertible, match="no ComfyUI workflow|damaged|Nothing to"):
            action(data)


def damaged(value, chance):
    """A copy with parts left out or of another type."""
    if chance.random() < 0.01:
        return chance.choice([None, 3, "x", [], {}, [1, 2]])
    if isinstance(value, dict):
        return {key: damaged(entry, chance) for key, entry in value.items() if chance.random() > 0.01}
    return [damaged(entry, chance) for entry in value if chance.random() > 0.01] if isinstance(value, list) else value


def test_damaged_files_never_break_the_converter():
    outcomes, chance = [], random.Random(1)
    start = convert_workflow.convert(official("image_flux2_klein_9b_kv_image_edit"))[0]
    for _ in range(150):
        data = damaged(start, chance)
        for action in (convert_workflow.convert, convert_workflow.undo):
            try:
                action(data)
                outcomes.append("done")
            except NotConvertible as error:
                outcomes.append(str(error).split(":")[0])
    assert len(set(outcomes)) > 3


def command(*arguments):
    return subprocess.run(
        [sys.executable, SCRIPTS / "convert_workflow.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_command_line_writes_beside_the_file_and_overwrites_nothing(tmp_path):
    file = tmp_path / "mine.json"
    file.write_bytes(official_files()["image_flux2_text_to_image"].read_bytes())
    done = command(file, "--backend", "sdpa")
    assert (
        done.returncode == 0
        and "replaced UNETLoader 12 in Text to Image (Flux.2 Dev) by Flux2LoadModel" in done.stdout
        and "wrote" in done.stdout
    )
    converted = tmp_path / "mine-attention.json"
    assert ["sdpa"] in [entry.get("widgets_values") for entry in nodes_in(json.loads(converted.read_text()))]
    again = command(file)
    assert (
        again.returncode == 1
        and again.stderr.startswith("convert_workflow: ")
        and "exists already; name the result with -o" in again.stderr
    )
    assert (
        command(converted, "--undo").returncode == 0
        and (tmp_path / "mine-original.json").read_bytes() == file.read_bytes()
    )
    piped = command(converted, "--undo", "-o", "-")
    assert piped.stdout.encode() == file.read_bytes() and "went back" in piped.stderr


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_the_way_back_keeps_the_ends_of_lines(tmp_path, newline):
    file = tmp_path / "图 é.json"
    file.write_bytes(newline.join(official_files()["image_flux2_text_to_image"].read_text().splitlines()).encode())
    done = command(file)
    assert done.returncode == 0 and command(tmp_path / "图 é-attention.json", "--undo").returncode == 0
    assert (tmp_path / "图 é-original.json").read_bytes() == file.read_bytes()


def test_a_console_without_unicode_stops_nothing(tmp_path):
    """Windows gives a pipe the letters of one region only; JSON is UTF-8 everywhere."""
    file = tmp_path / "图.json"
    file.write_text(
        json.dumps(
            {"1": {"class_type": "UNETLoader", "inputs": {"unet_name": "flux2 图.safetensors"}}}, ensure_ascii=False
        ),
        encoding="utf-8",
    )
    console = {**os.environ, "PYTHONIOENCODING": "ascii"}
    piped, beside = (
        subprocess.run(
            [sys.executable, SCRIPTS / "convert_workflow.py", file, *output],
            capture_output=True,
            timeout=60,
            env=console,
        )
        for output in (["-o", "-"], [])
    )
    assert json.loads(piped.stdout)["1"]["inputs"]["model_name"] == "flux2 图.safetensors" and beside.returncode == 0, (
        piped.stderr,
        beside.stderr,
    )


def test_the_command_line_refuses_in_one_sentence(tmp_path):
    picture = tmp_path / "picture.png"
    Image.new("RGB", (8, 8)).save(picture)
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 100_000)
    for file, said in (
        (tmp_path / "none.json", "cannot be read"),
        (picture, "is not a workflow"),
        (deep, "is not a workflow"),
        (official_folder() / "api_flux2.json", "There are none in this workflow"),
    ):
        done = command(file)
        assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr and not done.stdout
    done = command(official_files()["image_flux2"], "-o", tmp_path)
    assert done.returncode == 1 and done.stderr == f"convert_workflow: {tmp_path} cannot be written (Is a directory).\n"
    done = command(official_files()["image_flux2"], "--backend", "flash9", "-o", "-")
    assert (
        done.returncode == 1
        and "no attention backend 'flash9'. The backends are: auto, comfyui, sdpa," in done.stderr
        and not done.stdout
    )


# --- in the page and on the server -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(official_server, shared_page):
    shared_page.js("await app.refreshComboInNodes()")
    return shared_page


def digests(prompt):
    """What an API workflow computes, whatever its node ids: a digest for each node that nothing reads."""
    known, used = (
        {},
        {value[0] for entry in prompt.values() for value in entry["inputs"].values() if isinstance(value, list)},
    )

    def digest(key):
        if key not in known:
            inputs = {
                name: [digest(value[0]), value[1]] if isinstance(value, list) else value
                for name, value in prompt[key]["inputs"].items()
            }
            known[key] = hashlib.sha256(
                json.dumps([prompt[key]["class_type"], inputs], sort_keys=True).encode()
            ).hexdigest()
        return known[key]

    return sorted(digest(key) for key in prompt if key not in used)


def said_inputs(prompt):
    """The page gives every widget of our nodes; a converted API workflow leaves the rest to their defaults."""
    said = {row.new: {*row.names().values(), *row.added} for row in LOADERS.values()} | {
        "Flux2SelectAttention": {"model", "backend"}
    }

    def cut(entry):
        wanted = said.get(entry["class_type"], entry["inputs"])
        return {**entry, "inputs": {name: value for name, value in entry["inputs"].items() if name in wanted}}

    return {key: cut(entry) for key, entry in prompt.items()}


def opened(page, data):
    """The API workflow of a GUI workflow, after it was opened with nothing missing."""
    page.load(data)
    assert unknown_nodes(page) == [] and "missing" not in page.text().lower()
    return page.prompt()


def all_on(data):
    """Variants that a template ships switched off too."""
    for entry in data["nodes"]:
        entry["mode"] = 0
    return data


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_page_opens_both_formats_alike_and_the_way_back_from_what_it_saves(page, server, name):
    original = all_on(official(name))
    before = opened(page, original)
    converted, _ = convert_workflow.convert(original)
    after = opened(page, converted)
    saved = page.js("return (await app.graphToPrompt()).workflow")
    assert digests(said_inputs(after)) == digests(convert_workflow.convert(before)[0])
    assert digests(opened(page, convert_workflow.undo(saved)[0])) == digests(before)
    for entry in after.values():
        if entry["class_type"] in OURS:
            with urllib.request.urlopen(f"{server.url}/object_info/{entry['class_type']}") as answer:
                inputs = json.load(answer)[entry["class_type"]]["input"]["optional"]
            assert {value: entry["inputs"][value] for value in inputs} == {
                value: options[1]["default"] for value, options in inputs.items()
            }


def overlaps(page):
    """Pairs of titles of nodes that lie on each other, on the canvas and in subgraphs."""
    boxes = page.js("""
        const graphs = [app.graph, ...app.graph.subgraphs.values()];
        return graphs.map(graph => graph.nodes.map(node => [String(node.id), node.pos[0], node.pos[1] - 30, \
node.size[0], node.size[1] + 30]));""")
    return [
        {a[0], b[0]}
        for part in boxes
        for i, a in enumerate(part)
        for b in part[:i]
        if a[1] < b[1] + b[3] and b[1] < a[1] + a[3] and a[2] < b[2] + b[4] and b[2] < a[2] + a[4]
    ]


@pytest.mark.parametrize("name", OFFICIAL)
def test_on_the_canvas_nothing_new_lies_on_something(page, name):
    page.load(official(name))
    before = overlaps(page)
    page.load(convert_workflow.convert(official(name))[0])
    assert [pair for pair in overlaps(page) if pair not in before] == []


def small(prompt):
    """The API workflow with pictures of 64 to 128 pixels, one prompt (ComfyUI keeps it encoded) and one step, two where
    the second reads a KV cache; a latent is saved for every sampler.
    """
    steps = 2 if any(entry["class_type"] == "FluxKVCache" for entry in prompt.values()) else 1
    made = copy.deepcopy(prompt)
    for entry in made.values():
        for name, value in entry["inputs"].items():
            if type(value) is int and (
                name in ("width", "height") or (entry["class_type"] == "PrimitiveInt" and value >= 256)
            ):
                entry["inputs"][name] = 64
            elif type(value) is int and (name == "steps" or entry["class_type"] == "PrimitiveInt"):
                entry["inputs"][name] = steps
            elif name == "megapixels":
                entry["inputs"][name] = 0.01
            elif name == "text" and value:
                entry["inputs"][name] = "a cat"
    samplers = [key for key, entry in made.items() if entry["class_type"] == "SamplerCustomAdvanced"]
    return made | {
        f"latent-{key}": node("SaveLatent", samples=[key, 0], filename_prefix="latents/official") for key in samplers
    }


def core_side(prompt):
    """The original graph with our text encoder."""
    made = copy.deepcopy(prompt)
    for (_, key), row in decide(convert_api.graph(made)).replace.items():
        if row.old == "CLIPLoader":
            convert_api.replace(made[key], row)
    return made


def drawn(server, prompt):
    """({node id: latent}, {node id: picture as an array}) in the order of the graph."""
    outputs = run(server, small(prompt)).outputs
    files = {
        key: server.base / "output" / entry["subfolder"] / entry["filename"]
        for key, output in outputs.items()
        for entry in [*output.get("latents", []), *output.get("images", [])]
        if entry["type"] == "output"
    }
    latents = [load_file(files[key])["latent_tensor"] for key in sorted(files) if files[key].suffix == ".latent"]
    return latents, [
        numpy.asarray(Image.open(files[key]).convert("RGB")).astype(int)
        for key in sorted(files)
        if files[key].suffix == ".png"
    ]


@pytest.mark.parametrize("name", OFFICIAL)
def test_it_draws_what_the_original_draws(server, page, name):
    data = official(name)
    if name == "image_flux2_klein_text_to_image":
        data = all_on(data)  # base and distilled in one file
    if name == "image_flux2_fp8":
        # with the LoRA
        next(entry for entry in nodes_in(data) if entry["type"] == "PrimitiveBoolean")["widgets_values"] = [True]
    theirs = drawn(server, core_side(opened(page, data)))
    # the same inputs of the encoder: ComfyUI keeps its output
    ours = drawn(server, said_inputs(opened(page, convert_workflow.convert(data)[0])))
    assert len(theirs[0]) == len(ours[0]) == len(theirs[1]) == len(ours[1]) > 0
    for latent, reference in zip(ours[0], theirs[0]):
        assert (latent - reference).abs().max() <= SAME * reference.abs().max()
    for picture, reference in zip(ours[1], theirs[1]):
        assert abs(picture - reference).max() <= 1 and reference.std() > 1


def test_the_comparison_sees_another_scale_of_the_lora(server, page):
    data = official("image_flux2_fp8")
    next(entry for entry in nodes_in(data) if entry["type"] == "PrimitiveBoolean")["widgets_values"] = [True]
    prompt = opened(page, convert_workflow.convert(data)[0])
    with_lora, _ = drawn(server, prompt)
    for entry in prompt.values():
        if entry["class_type"] == "LoraLoaderModelOnly":
            entry["inputs"]["strength_model"] = 0.9
    other, _ = drawn(server, prompt)
    assert (with_lora[0] - other[0]).abs().max() > 10 * SAME * other[0].abs().max()
