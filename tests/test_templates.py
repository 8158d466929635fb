"""Every shipped workflow and blueprint: opens with nothing missing in both designs of ComfyUI's page, is tidy, runs
from
the page and over the API.

  bash scripts/test.sh -k test_templates

They run on small models under the published file names, with small pictures and few steps, otherwise as they are.
Screenshots of all go to a temporary folder (its path is printed with pytest -s). Not covered: the published weights;
what needs a GPU must say so here, and run without it.
"""

import copy
import json
import re
import urllib.parse
import urllib.request

import pytest
from PIL import Image

from comfy_client import ExecutionFailed
from pack import ROOT
from server_fixture import run
from page_fixture import unknown_nodes
from template_models import SHIPPED, named_models, nodes_in, official_files

TEMPLATES = sorted(path.stem for path in SHIPPED.glob("*.json"))
BLUEPRINTS = sorted(path.stem for path in (ROOT / "subgraphs").glob("*.json"))
FILES = sorted([*SHIPPED.rglob("*.json"), *(ROOT / "subgraphs").glob("*.json")])
LOADERS = {"Flux2LoadModel": "diffusion_models", "Flux2LoadTextEncoder": "text_encoders", "Flux2LoadVAE": "vae"}
NEEDS_GPU = {"flux2_fp8_fast_blocks": ("Flux2FastBlocks", "Fast Blocks cannot run here: .*GPU")}
WIDTH, HEIGHT, STEPS, BLOCKS = 96, 64, 2, 6  # the small model has two double and four single blocks
SMALL = {
    "width": WIDTH,
    "height": HEIGHT,
    "steps": STEPS,
    "megapixels": 0.01,
    "sizes": "64x64",
    "backends": "sdpa, sdpa-math",
    "call_repeat": 2,
    "step_repeat": 1,
}
# keys of what the report, compare and benchmark nodes give the page
REPORTS = ("flux2_attention", "flux2_compare", "flux2_benchmark")
PACK = "flux2-attention"


def template(name):
    return json.loads((SHIPPED / f"{name}.json").read_text())


def twin(name):
    return json.loads((SHIPPED / "api" / f"{name}.json").read_text())


def blueprint(name):
    return json.loads((ROOT / "subgraphs" / f"{name}.json").read_text())


def small(prompt):
    """An API workflow with small pictures and few steps; links stay."""
    made = copy.deepcopy(prompt)
    for entry in made.values():
        values = {name for name, value in entry["inputs"].items() if not isinstance(value, list)}
        entry["inputs"].update({name: SMALL[name] for name in values & set(SMALL)})
    return made


# --- the files -------------------------------------------------------------------------------------------------------


def test_every_subject_has_its_template_with_twin_and_thumbnail():
    assert set(TEMPLATES) >= {
        "flux2_text_to_image",
        "flux2_image_edit",
        "flux2_image_edit_two_references",
        "flux2_klein_4_steps",
        "flux2_compare_attention",
        "flux2_benchmark_attention",
        "flux2_fp8_fast_blocks",
        "flux2_several_gpus",
    }
    assert (
        TEMPLATES
        == sorted(path.stem for path in (SHIPPED / "api").glob("*.json"))
        == sorted(path.stem for path in SHIPPED.glob("*.jpg"))
    )
    assert BLUEPRINTS == ["FLUX.2 edit", "FLUX.2 text to image"]


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_no_file_names_a_machine(file):
    text = file.read_text()
    assert not re.search(r"(?<![\w.])/(root|home|tmp|work|mnt|Users)/|[A-Za-z]:\\\\|127\.0\.0\.1|localhost", text)
    assert {"huggingface.co"} >= set(re.findall(r"https?://([^/\"\s)]+)", text))


@pytest.mark.parametrize("name", [*TEMPLATES, *BLUEPRINTS])
def test_every_loader_says_where_its_file_is_published(name):
    """The page offers these for download; ComfyUI's own templates name the same addresses."""
    nodes = [node for path in official_files().values() for node in nodes_in(json.loads(path.read_text()))]
    published = {model["name"]: model for node in nodes for model in node["properties"].get("models") or []}
    loaders = [
        node for node in nodes_in(template(name) if name in TEMPLATES else blueprint(name)) if node["type"] in LOADERS
    ]
    assert loaders
    for node in loaders:
        (model,) = node["properties"]["models"]
        assert (model["name"], model["directory"]) == (node["widgets_values"][0], LOADERS[node["type"]])
        assert model["url"].endswith(f"/{model['name']}")
        assert model["directory"] == published[model["name"]]["directory"]
        # which is published in two places
        assert model["url"] == published[model["name"]]["url"] or model["name"] == "qwen_3_4b.safetensors"


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_note_explains_and_the_thumbnail_shows(name):
    (note,) = [node for node in template(name)["nodes"] if node["type"] == "MarkdownNote"]
    assert 15 < len(note["title"]) < 60 and 250 < len(note["widgets_values"][0]) < 1100
    with Image.open(SHIPPED / f"{name}.jpg") as thumbnail:
        assert thumbnail.size == (960, 540)
    assert (SHIPPED / f"{name}.jpg").stat().st_size < 150_000


def test_the_readme_lists_every_template_and_blueprint():
    readme = (ROOT / "README.md").read_text()
    assert set(re.findall(r"^\| `(flux2_\w+)` \|", readme, re.M)) == set(TEMPLATES)
    assert all(f"*{name}*" in readme for name in BLUEPRINTS)


# --- the server ------------------------------------------------------------------------------------------------------


def get(server, path):
    with urllib.request.urlopen(server.url + urllib.parse.quote(path), timeout=60) as answer:
        return answer.read()


def test_the_server_offers_templates_with_thumbnails_and_blueprints(server):
    assert sorted(json.loads(get(server, "/workflow_templates"))[PACK]) == TEMPLATES
    for name in TEMPLATES:
        assert json.loads(get(server, f"/api/workflow_templates/{PACK}/{name}.json")) == template(name)
        assert get(server, f"/api/workflow_templates/{PACK}/{name}.jpg") == (SHIPPED / f"{name}.jpg").read_bytes()
    served = json.loads(get(server, "/global_subgraphs"))
    ours = {key: entry for key, entry in served.items() if entry["info"]["node_pack"] == f"custom_nodes.{PACK}"}
    assert sorted(entry["name"] for entry in ours.values()) == BLUEPRINTS
    for key, entry in ours.items():
        assert json.loads(json.loads(get(server, f"/global_subgraphs/{key}"))["data"]) == blueprint(entry["name"])


def check_output(server, name, outputs):
    """A picture where the template saves one, and a report where it shows one."""
    images = [image for output in outputs.values() for image in output.get("images", []) if image["type"] == "output"]
    assert images
    for image in images:
        with Image.open(server.base / "output" / image["subfolder"] / image["filename"]) as picture:
            darkest, brightest = picture.convert("L").getextrema()
            assert min(picture.size) >= 64 and darkest < brightest
    reports = [data for output in outputs.values() for kind in REPORTS for data in output.get(kind, [])]
    assert len(reports) == 1
    assert "calls" not in reports[0] or reports[0]["calls"] == STEPS * BLOCKS
    return reports[0]


@pytest.mark.parametrize("name", TEMPLATES)
def test_runs_over_the_api(official_server, name):
    prompt = small(twin(name))
    if name in NEEDS_GPU:
        node_type, why = NEEDS_GPU[name]
        with pytest.raises(ExecutionFailed, match=why):
            run(official_server, prompt)
        prompt = without(prompt, node_type)
    check_output(official_server, name, run(official_server, prompt).outputs)


def without(prompt, node_type):
    """The workflow as ComfyUI runs it when that node is bypassed."""
    ((key, entry),) = [(key, entry) for key, entry in prompt.items() if entry["class_type"] == node_type]
    made = {other: node for other, node in prompt.items() if other != key}
    for node in made.values():
        node["inputs"] = {
            name: entry["inputs"]["model"] if value == [key, 0] else value for name, value in node["inputs"].items()
        }
    return made


# --- the page --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(official_server, shared_page):
    shared_page.js("await app.refreshComboInNodes()")
    return shared_page


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("templates")
    print(f"screenshots: {folder}")
    return folder


@pytest.fixture
def newer_design(page):
    """ComfyUI's nodes as page elements, what new installations show."""
    page.js("await app.extensionManager.setting.set('Comfy.VueNodes.Enabled', true)")
    yield page
    page.js("await app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")


def assert_complete(page):
    text = page.text().lower()
    assert unknown_nodes(page) == [] and "missing" not in text and "errors found" not in text


def overlapping(boxes):
    """Pairs of names from [(name, x, y, width, height)]."""
    return [
        (a[0], b[0])
        for i, a in enumerate(boxes)
        for b in boxes[:i]
        if a[1] < b[1] + b[3] and b[1] < a[1] + a[3] and a[2] < b[2] + b[4] and b[2] < a[2] + a[4]
    ]


@pytest.mark.parametrize("name", TEMPLATES)
def test_opens_complete_tidy_and_says_the_same_as_its_twin(page, shots, name):
    page.load(template(name), name)
    page.fit()
    page.screenshot(shots / f"{name}.png")
    assert_complete(page)
    nodes = page.nodes()
    assert (
        overlapping(
            [
                (node["title"], node["pos"][0], node["pos"][1] - 30, node["size"][0], node["size"][1] + 30)
                for node in nodes
            ]
        )
        == []
    )
    assert overlapping([(group["title"], *group["bounding"]) for group in template(name)["groups"]]) == []
    prompt, api = page.prompt(), twin(name)
    assert {key: entry["class_type"] for key, entry in prompt.items()} == {
        key: entry["class_type"] for key, entry in api.items()
    }
    for key, entry in api.items():
        assert {value: prompt[key]["inputs"][value] for value in entry["inputs"]} == entry["inputs"], entry["_meta"][
            "title"
        ]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_newer_design_is_tidy_too(newer_design, shots, name):
    newer_design.load(template(name), name)
    newer_design.wait_for("document.querySelectorAll('[data-node-id]').length >= app.graph.nodes.length")
    newer_design.fit()
    newer_design.screenshot(shots / f"{name}-newer.png")
    assert_complete(newer_design)
    boxes = newer_design.js("""return [...document.querySelectorAll('[data-node-id]')].map(element => {
        const {x, y, width, height} = element.getBoundingClientRect();
        return [app.graph.getNodeById(element.dataset.nodeId).title, x, y, width, height]; });""")
    assert overlapping(boxes) == []


SET = """
for (const node of app.graph.nodes) for (const widget of node.widgets ?? []) {
  const linked = node.inputs?.find(slot => slot.name === widget.name)?.link;
  if (!(widget.name in args[0]) || linked) continue;
  widget.value = args[0][widget.name];
  widget.callback?.(widget.value, app.canvas, node);
}
"""


@pytest.mark.parametrize("name", TEMPLATES)
def test_runs_from_the_page(official_server, page, shots, name):
    page.load(template(name), name)
    page.js(SET, {**SMALL, "noise_seed": 7})
    if name in NEEDS_GPU:
        # bypassed, as its note says
        page.js("app.graph.nodes.find(node => node.type === args[0]).mode = 4", NEEDS_GPU[name][0])
    outputs = json.loads(get(official_server, f"/history/{page.run()}"))
    page.fit()
    page.screenshot(shots / f"{name}-ran.png")
    report = check_output(official_server, name, next(iter(outputs.values()))["outputs"])
    assert "calls" not in report or any(f"{STEPS * BLOCKS} calls" in text for text in page.text_boxes()), (
        "the report is not on its node"
    )


def connected(page, name):
    """A blueprint in the page with a picture before it and a saving node behind it."""
    page.load(blueprint(name), name)
    page.js("""
        const node = app.graph.nodes[0], save = LiteGraph.createNode('SaveImage'), load = \
LiteGraph.createNode('LoadImage');
        app.graph.add(save);
        save.pos = [600, 0];
        node.connect(node.outputs.findIndex(slot => slot.name === 'image'), save, 0);
        const picture = node.inputs.findIndex(slot => slot.name === 'picture');
        if (picture >= 0) {
          app.graph.add(load);
          load.pos = [-400, 0];
          load.widgets.find(widget => widget.name === 'image').value = 'example.png';
          load.connect(0, node, picture);
        }""")


EXPOSED = {
    "FLUX.2 text to image": [
        "prompt",
        "width",
        "height",
        "seed",
        "steps",
        "guidance",
        "attention",
        "model",
        "text_encoder",
        "vae",
    ],
    "FLUX.2 edit": ["prompt", "seed", "steps", "guidance", "attention", "model", "text_encoder", "vae", "megapixels"],
}
# a widget of the blueprint -> where its value must arrive: (node, input)
ARRIVES = {
    "prompt": ("CLIPTextEncode", "text"),
    "width": ("EmptyFlux2LatentImage", "width"),
    "height": ("Flux2Scheduler", "height"),
    "seed": ("RandomNoise", "noise_seed"),
    "steps": ("Flux2Scheduler", "steps"),
    "guidance": ("FluxGuidance", "guidance"),
    "attention": ("Flux2SelectAttention", "backend"),
    "megapixels": ("ImageScaleToTotalPixels", "megapixels"),
}
VALUES = {
    "prompt": "a cup",
    "width": WIDTH,
    "height": HEIGHT,
    "seed": 5,
    "steps": STEPS,
    "guidance": 3.5,
    "attention": "sdpa-math",
    "megapixels": 0.01,
}


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_a_blueprint_takes_its_values_and_runs(official_server, page, shots, name):
    connected(page, name)
    node = next(entry for entry in page.nodes() if entry["title"] == name)
    assert [widget["name"] for widget in node["widgets"]] == EXPOSED[name]
    page.js(SET, VALUES)
    assert_complete(page)
    inner = {entry["class_type"]: entry["inputs"] for entry in page.prompt().values()}
    assert {widget: inner[ARRIVES[widget][0]][ARRIVES[widget][1]] for widget in VALUES if widget in EXPOSED[name]} == {
        widget: value for widget, value in VALUES.items() if widget in EXPOSED[name]
    }
    outputs = json.loads(get(official_server, f"/history/{page.run()}"))
    page.fit()
    page.screenshot(shots / f"{name}.png")
    assert check_output(official_server, name, next(iter(outputs.values()))["outputs"])["backend"] == "sdpa-math"


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_a_blueprint_is_found_by_its_name_and_placed(page, shots, name):
    """In the search box of the node library, as a user does."""
    from selenium.webdriver.common.keys import Keys

    page.load({"nodes": [], "links": [], "version": 0.4}, "empty")
    page.js("await app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.wait_for("document.activeElement?.tagName === 'INPUT'")
    page.driver.switch_to.active_element.send_keys(name)
    page.wait_for("document.body.innerText.includes('Subgraph Blueprints')")
    page.wait_for(
        "document.body.innerText.includes(args[0])", arguments=[blueprint(name)["extra"]["BlueprintDescription"][:40]]
    )
    page.screenshot(shots / f"{name}-search.png")
    page.driver.switch_to.active_element.send_keys(Keys.ENTER)
    page.wait_for("app.graph.nodes.length === 1")
    (node,) = page.nodes()
    assert node["title"] == name and [widget["name"] for widget in node["widgets"]] == EXPOSED[name]


def test_models_that_are_named_are_all_known(official_server):
    """The fixture put a small model under every name, so a file that a template asks for in vain shows here."""
    for folder, name in named_models(map(template, TEMPLATES)):
        assert (official_server.base / "models" / folder / name).is_file()
