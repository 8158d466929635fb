"""The shipped graphs, flat as an API file opens, in a real browser on the running ComfyUI: nothing missing, tooltips,
what to download, a run with its report. (tests/test_templates.py has the templates.)

  bash scripts/test.sh -k test_browser

Screenshots go to a temporary folder (its path is printed with pytest -s). Skipped, with the reason, where Chromium or
its driver is missing. Not covered: other browsers.
"""

import json
import urllib.request

import pytest
from PIL import Image

import browser
from server_fixture import MODEL_FOLDERS
from pack import ROOT
from template_models import nodes_in

pytestmark = pytest.mark.skipif(browser.missing() is not None, reason=f"no browser: {browser.missing()}")

NAMES = ("flux2_text_to_image", "flux2_image_edit")
LOADERS = {
    "diffusion_models": ("Flux2LoadModel", "model_name"),
    "text_encoders": ("Flux2LoadTextEncoder", "text_encoder_name"),
    "vae": ("Flux2LoadVAE", "vae_name"),
}
OURS = [node for node, _ in LOADERS.values()] + ["Flux2SelectAttention", "Flux2AttentionReport"]
WIDTH, HEIGHT, STEPS, BLOCKS = 128, 96, 2, 6  # the small model has two double and four single blocks


TEMPLATE = "1 Text to image"


def template():
    return json.loads((ROOT / "example_workflows" / f"{TEMPLATE}.json").read_text())


def api_workflow(name):
    return json.loads((ROOT / "example_workflows" / "api" / f"{name}.json").read_text())


def get(server, path):
    with urllib.request.urlopen(server.url + path, timeout=30) as answer:
        return json.load(answer)


@pytest.fixture(scope="session")
def photo(server):
    """The picture that the edit workflow names, in the server's input folder."""
    Image.linear_gradient("L").convert("RGB").resize((WIDTH, HEIGHT)).save(server.base / "input" / "example.png")


@pytest.fixture(scope="session")
def shots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("screenshots")
    print(f"screenshots: {folder}")
    return folder


@pytest.fixture(scope="module")
def page(server, photo):
    with browser.Page(server.url) as opened:
        yield opened


def use_small_models(page, model_files, seed):
    """What a user does after opening the graph: choose the files that are there, and a small picture."""
    for folder, (node, widget) in LOADERS.items():
        page.set_widget(node, widget, model_files[folder][0].name)
    page.set_widget("RandomNoise", "noise_seed", seed)
    page.set_widget("Flux2Scheduler", "steps", STEPS)


def use_small_size(page, name):
    if name == "flux2_image_edit":
        page.set_widget("ImageScaleToTotalPixels", "megapixels", 0.01)
        return
    for node in ("Flux2Scheduler", "EmptyFlux2LatentImage"):
        page.set_widget(node, "width", WIDTH)
        page.set_widget(node, "height", HEIGHT)


def saved_picture(server, prompt_id):
    """The picture that the prompt left in the history and the output folder."""
    outputs = get(server, f"/history/{prompt_id}")[prompt_id]["outputs"].values()
    (entry,) = [image for output in outputs for image in output.get("images", []) if image["type"] == "output"]
    return Image.open(server.base / "output" / entry["subfolder"] / entry["filename"])


@pytest.mark.parametrize("name", NAMES)
def test_opens_with_every_node_known(page, shots, name):
    page.load_api(api_workflow(name), name)
    page.fit()
    page.screenshot(shots / f"{name}-open.png")
    nodes = page.nodes()
    assert [node["type"] for node in nodes if not node["registered"]] == []
    assert "missing node" not in page.text().lower()
    assert sorted(entry["class_type"] for entry in api_workflow(name).values()) == sorted(n["type"] for n in nodes)


@pytest.mark.parametrize("name", NAMES)
def test_widgets_are_saved_in_the_order_of_the_inputs(server, page, name):
    page.load_api(api_workflow(name), name)
    saved = {node["id"]: node for node in page.js("return app.graph.serialize().nodes")}
    for node in page.nodes():
        if node["type"] in OURS:
            order = get(server, f"/object_info/{node['type']}")[node["type"]]["input_order"]
            inputs = [name for kind in ("required", "optional") for name in order.get(kind, [])]
            names = [widget["name"] for widget in node["widgets"]]
            assert names == [name for name in inputs if name in names]
            values = saved[node["id"]].get("widgets_values", [])
            assert values == [widget["value"] for widget in node["widgets"]]


def test_every_input_and_output_has_a_tooltip(server):
    for node in OURS:
        info = get(server, f"/object_info/{node}")[node]
        inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        assert [name for name, (_, *options) in inputs.items() if not (options and options[0].get("tooltip"))] == [], (
            node
        )
        assert all(info["output_tooltips"]) and info["description"], node


def test_the_tooltip_appears_under_the_mouse(page, shots):
    page.load_api(api_workflow(NAMES[0]))
    page.fit()
    tooltip = page.tooltip("Flux2SelectAttention", "backend")
    page.screenshot(shots / "tooltip.png")
    assert "flash4" in tooltip and "aiter" in tooltip


def test_missing_model_files_are_offered_for_download(page, shots):
    """The server has small models under other names, as a machine has on which nothing was downloaded yet."""
    page.load(template())
    page.click("View details")
    page.wait_for("document.body.innerText.includes('Download all')")
    page.screenshot(shots / "missing-models.png")
    text = page.text()
    models = [model for node in nodes_in(template()) for model in node["properties"].get("models", [])]
    assert len(models) == 3
    for model in models:
        assert model["name"] in text and model["directory"] in MODEL_FOLDERS and model["url"].endswith(model["name"])


@pytest.mark.parametrize("name, seed", list(zip(NAMES, (7001, 7002))))
def test_runs_from_the_page_and_shows_the_report(server, page, model_files, shots, name, seed):
    page.load_api(api_workflow(name), name)
    use_small_models(page, model_files, seed)
    use_small_size(page, name)
    prompt_id = page.run()
    page.fit()
    page.screenshot(shots / f"{name}-ran.png")
    with saved_picture(server, prompt_id) as picture:
        assert picture.size == (WIDTH, HEIGHT) or name == "flux2_image_edit"
    assert any(f"{STEPS * BLOCKS} calls" in text for text in page.text_boxes()), "the report is not on its node"


def test_the_newer_node_design_shows_the_same(server, photo, model_files, shots):
    """ComfyUI can draw nodes as page elements instead of on a canvas."""
    with browser.Page(server.url, settings={"Comfy.VueNodes.Enabled": True}) as page:
        page.load_api(api_workflow(NAMES[0]))
        use_small_models(page, model_files, seed=7003)
        use_small_size(page, NAMES[0])
        page.run()
        page.fit()
        page.screenshot(shots / "newer-design.png")
        for title in ("Select Attention", "Attention Report", "Load FLUX.2 Model"):
            assert title in page.text()
        assert any(f"{STEPS * BLOCKS} calls" in text for text in page.text_boxes()), "the report is not on its node"
