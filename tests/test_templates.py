"""Every shipped workflow and blueprint: opens with nothing missing in both designs of ComfyUI's page, readable at the
window sizes of laptops, is tidy, says the same as its API twin, runs from the page and over the API.

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
TWINS = {  # template -> its API workflow; make_workflows.py makes the one from the other
    "1 Text to image": "flux2_text_to_image",
    "2 Image edit": "flux2_image_edit",
    "3 Two references": "flux2_image_edit_two_references",
    "4 klein in four steps": "flux2_klein_4_steps",
    "5 fp8 and fused blocks": "flux2_fp8_fast_blocks",
    "6 Several GPUs": "flux2_several_gpus",
    "7 Compare kernels": "flux2_compare_attention",
    "8 Benchmark kernels": "flux2_benchmark_attention",
}
WINDOWS = [(1366, 768), (1600, 900), (1920, 1080)]
READABLE = 8 / 14  # below this scale ComfyUI draws no text: letters of 14 pixels would be smaller than 8
NEEDS_GPU = {"5 fp8 and fused blocks": ("Flux2FastBlocks", "Fast Blocks cannot run here: .*GPU")}
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
    return json.loads((SHIPPED / "api" / f"{TWINS[name]}.json").read_text())


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


def test_every_subject_has_its_template_with_twin_and_card():
    assert TEMPLATES == sorted(TWINS) == sorted(path.stem for path in SHIPPED.glob("*.jpg"))
    assert sorted(TWINS.values()) == sorted(path.stem for path in (SHIPPED / "api").glob("*.json"))
    assert BLUEPRINTS == ["FLUX.2 edit", "FLUX.2 text to image"]


def test_an_image_holds_its_workflow():
    """Dropped on the page it opens the first template."""
    with Image.open(ROOT / "docs" / "workflow.png") as image:
        assert json.loads(image.text["workflow"]) == template(TEMPLATES[0])


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_top_level_is_what_a_user_reads_and_sets(name):
    """One node that holds the graph, what comes out of it, and a note; no more nodes than fit a laptop's screen."""
    nodes = template(name)["nodes"]
    assert len(nodes) <= 6
    for node in nodes_in(template(name)):
        kept = node["type"] == "MarkdownNote" or node in nodes and len(node["type"]) == 36  # the id of a subgraph
        assert kept or not node.get("title"), "a stored title hides the node's name from search and from translation"


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
def test_a_note_explains_and_names_the_files_and_the_card_is_square(name):
    (note,) = [node for node in template(name)["nodes"] if node["type"] == "MarkdownNote"]
    text = note["widgets_values"][0]
    assert 15 < len(note["title"]) < 60 and 250 < len(text) < 1300
    for node in nodes_in(template(name)):
        for model in node["properties"].get("models") or []:
            assert f"models/{model['directory']}: [{model['name']}]({model['url']})" in text
    with Image.open(SHIPPED / f"{name}.jpg") as card:
        assert card.size == (512, 512)
    assert (SHIPPED / f"{name}.jpg").stat().st_size < 150_000


def test_the_readme_lists_every_template_and_blueprint():
    readme = (ROOT / "README.md").read_text()
    assert set(re.findall(r"^\| \*(\d [^*]+)\* \|", readme, re.M)) == set(TEMPLATES)
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


def meaning(prompt, names):
    """A workflow without its ids: [output node], each with its values and, in place of links, what is there. names:
    {class: inputs that count}; a saved graph also has those that its twin leaves at their defaults. A report passes its
    latent on, so what hangs behind it hangs on the sampler.
    """

    def source(link):
        node = prompt[link[0]]
        passes = node["class_type"] == "Flux2AttentionReport" and link[1] == 0
        return source(node["inputs"]["latent"]) if passes else [read(link[0]), link[1]]

    def value_of(value):
        return source(value) if isinstance(value, list) else value if isinstance(value, (str, bool)) else float(value)

    def read(key):
        kind, inputs = prompt[key]["class_type"], prompt[key]["inputs"]
        return {kind: {name: value_of(inputs[name]) for name in sorted(inputs) if name in names[kind]}}

    used = {value[0] for node in prompt.values() for value in node["inputs"].values() if isinstance(value, list)}
    ends = [key for key, node in prompt.items() if key not in used or node["class_type"] == "Flux2AttentionReport"]
    return sorted(json.dumps(read(key), indent=1) for key in ends)


def named_inputs(api):
    """{class: inputs that any of its nodes names}."""
    found = {}
    for node in api.values():
        found.setdefault(node["class_type"], set()).update(node["inputs"])
    return found


@pytest.mark.parametrize("name", TEMPLATES)
def test_opens_complete_tidy_and_says_the_same_as_its_twin(page, shots, name):
    page.load(template(name), name)
    page.fit()
    page.screenshot(shots / f"{name}.png")
    assert_complete(page)
    boxes = [(n["title"], n["pos"][0], n["pos"][1] - 30, n["size"][0], n["size"][1] + 30) for n in page.nodes()]
    assert overlapping(boxes) == []
    for definition in template(name).get("definitions", {}).get("subgraphs", []):
        assert overlapping([(group["title"], *group["bounding"]) for group in definition["groups"]]) == []
    names = named_inputs(twin(name))
    assert meaning(page.prompt(), names) == meaning(twin(name), names)


OPEN_TEMPLATE = """
await app.loadGraphData(args[0], true, true, args[1], {openSource: 'template'});
for (let i = 0; i < 30; i++) await new Promise(requestAnimationFrame);
return app.canvas.ds.scale;
"""


@pytest.mark.parametrize("window", WINDOWS, ids=lambda size: f"{size[0]}x{size[1]}")
def test_opens_readable_at_every_window_size(page, shots, window):
    """The page fits a template into the window: its letters must stay above the size at which they are drawn."""
    page.resize(*window)
    try:
        for name in TEMPLATES:
            scale = page.js(OPEN_TEMPLATE, template(name), name)
            page.screenshot(shots / f"{name}-{window[0]}.png")
            assert scale > READABLE * 1.1 and not page.js("return app.canvas.low_quality"), (name, scale)
    finally:
        page.resize(1920, 1080)


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


SET_INSIDE = """
const inner = [...app.graph.subgraphs.values()].flatMap(graph => graph.nodes);
for (const widget of inner.flatMap(node => node.widgets ?? []))
  if (widget.name in args[0]) widget.value = args[0][widget.name];
"""


@pytest.mark.parametrize("name", TEMPLATES)
def test_runs_from_the_page(official_server, page, shots, name):
    page.load(template(name), name)
    page.js(SET, {**SMALL, "seed": 7})
    page.js(SET_INSIDE, {"megapixels": SMALL["megapixels"]})
    if name in NEEDS_GPU:
        # bypassed, as its note says
        page.js(
            "app.graph.nodes.find(node => node.subgraph).subgraph.nodes.find(node => node.type === args[0]).mode = 4",
            NEEDS_GPU[name][0],
        )
    outputs = json.loads(get(official_server, f"/history/{page.run()}"))
    page.fit()
    page.screenshot(shots / f"{name}-ran.png")
    report = check_output(official_server, name, next(iter(outputs.values()))["outputs"])
    assert "calls" not in report or any(f"{STEPS * BLOCKS} calls" in text for text in page.text_boxes()), (
        "the report is not on its node"
    )


def connected(page, name):
    """A blueprint in the page with an image before it, and a report and a saving node behind it."""
    page.load(blueprint(name), name)
    page.js("""
        const add = (type, pos) => { const node = LiteGraph.createNode(type); app.graph.add(node); node.pos = pos; \
return node; };
        const [node] = app.graph.nodes, save = add('SaveImage', [600, 0]);
        const report = add('Flux2AttentionReport', [600, 400]);
        const output = wanted => node.outputs.findIndex(slot => slot.name === wanted);
        node.connect(output('image'), save, 0);
        for (const wanted of ['model', 'latent'])
          node.connect(output(wanted), report, report.inputs.findIndex(slot => slot.name === wanted));
        const image = node.inputs.findIndex(slot => slot.name === 'image');
        if (image >= 0) {
          const load = add('LoadImage', [-400, 0]);
          load.widgets.find(widget => widget.name === 'image').value = 'example.png';
          load.connect(0, node, image);
        }""")


KERNEL, FILES_OF = "attention kernel", ["model", "text encoder", "vae"]
EXPOSED = {
    "FLUX.2 text to image": ["prompt", "width", "height", KERNEL, "seed", "steps", "guidance", *FILES_OF],
    "FLUX.2 edit": ["prompt", KERNEL, "seed", "steps", "guidance", *FILES_OF, "megapixels"],
}
# a widget of the blueprint -> where its value must arrive: (node, input)
ARRIVES = {
    "prompt": ("CLIPTextEncode", "text"),
    "width": ("EmptyFlux2LatentImage", "width"),
    "height": ("Flux2Scheduler", "height"),
    "seed": ("RandomNoise", "noise_seed"),
    "steps": ("Flux2Scheduler", "steps"),
    "guidance": ("FluxGuidance", "guidance"),
    KERNEL: ("Flux2SelectAttention", "backend"),
    "megapixels": ("ImageScaleToTotalPixels", "megapixels"),
}
VALUES = {
    "prompt": "a cup",
    "width": WIDTH,
    "height": HEIGHT,
    "seed": 5,
    "steps": STEPS,
    "guidance": 3.5,
    KERNEL: "sdpa-math",
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
