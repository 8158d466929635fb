"""What the pack's page code does besides the badge: labels of choices and their judgement, reasons on nodes and the
section of troubleshooting behind them, Select Attention put into a graph, reports as tables, sizes, search, settings.

  bash scripts/test.sh tests/test_page_browser.py -s     # -s prints the folder of the screenshots

In ComfyUI's canvas nodes and in its newer node design. Skipped, with the reason, where Chromium or its driver is
missing. Not covered: other browsers, and a machine with a GPU.
"""

import json

import pytest
import torch

import browser
import small_models
from pack import ROOT
from template_models import official_files

pytestmark = pytest.mark.skipif(browser.missing() is not None, reason=f"no browser: {browser.missing()}")

SELECTOR, COMPARE = "Flux2SelectAttention", "Flux2CompareAttention"
EMPTY = {"nodes": [], "links": [], "version": 0.4}
ADD = """
const node = LiteGraph.createNode(args[0]);
node.pos = [300, 250];
app.graph.add(node);
await new Promise(requestAnimationFrame);
"""
TEXTS = """
const badges = node => (node.badges ?? []).map(badge => typeof badge === 'function' ? badge() : badge)
  .filter(badge => badge?.text && badge.text !== 'flux2-attention');
"""


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    print(f"screenshots: {folder}")
    return folder


@pytest.fixture(params=[False, True], ids=["canvas", "newer design"])
def page(shared_page, request):
    """The shared page with an empty graph, in both of ComfyUI's node designs."""
    shared_page.js("await app.extensionManager.setting.set('Comfy.VueNodes.Enabled', args[0])", request.param)
    shared_page.load(EMPTY, "empty")
    yield shared_page
    shared_page.js("document.querySelector('.flux2-dialog')?.close()")
    shared_page.js("await app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")


def add(page, node_type):
    page.js(ADD, node_type)
    return node_type


def badge(page, node_type=SELECTOR):
    """[text, colour] of the status badge of the only node of that type, or None."""
    return page.js(
        TEXTS + "const [found] = badges(app.graph.nodes.find(node => node.type === args[0])); "
        "return found ? [found.text, found.bgColor] : null;",
        node_type,
    )


def wait_for_badge(page, begin, node_type=SELECTOR):
    page.wait_for(
        f"(() => {{ {TEXTS} return badges(app.graph.nodes.find(node => node.type === args[0]))"
        ".some(({text}) => text.startsWith(args[1])); })()",
        60,
        [node_type, begin],
    )
    return badge(page, node_type)


# --- choosing


def labels(page, node_type, name):
    """{value: label} of a combo, in the order in which it offers them."""
    return dict(
        page.js(
            "const {options} = app.graph.nodes.find(node => node.type === args[0]).widgets"
            ".find(({name}) => name === args[1]);"
            "return options.values.map(value => [value, options.getOptionLabel?.(value) ?? value])",
            node_type,
            name,
        )
    )


@pytest.mark.parametrize("node_type, name", [(SELECTOR, "backend"), (SELECTOR, "edge_backend"), (COMPARE, "reference")])
def test_labels_say_what_this_machine_can_do(page, node_type, name):
    """On a CPU: PyTorch's kernels run, all others need a card; those that run are offered first."""
    add(page, node_type)
    page.wait_for(
        "app.graph.nodes[0].widgets.find(({name}) => name === args[0]).options.getOptionLabel('flash4') !== 'flash4'",
        60,
        [name],
    )
    found = labels(page, node_type, name)
    assert found["flash4"] == "flash4 · needs NVIDIA" and found["sdpa"] == "sdpa" and found["auto"] == "auto"
    assert found["aiter"] == "aiter · needs AMD · experimental" and "approximate" in found["sage2"]
    order = list(found)
    last = max(order.index(slug) for slug in ("auto", "sdpa", "sdpa-flash", "sdpa-math"))
    assert last < order.index("flash4"), "those that run here come first"


def test_labels_of_values_that_say_little(page):
    add(page, "Flux2LoadModel")
    assert labels(page, "Flux2LoadModel", "weight_dtype")["as stored"] == "as in the file"
    assert labels(page, "Flux2LoadModel", "memory")["keep on GPU"] == "stay in VRAM (fastest)"


def test_a_choice_is_judged_before_it_runs(page, shots):
    add(page, SELECTOR)
    page.set_widget(SELECTOR, "backend", "flash4")
    text, colour = wait_for_badge(page, "flash4 cannot run here: It needs an NV")
    page.screenshot(shots / "judged.png")
    assert colour == "#a12622"
    page.set_widget(SELECTOR, "backend", "sdpa-math")
    assert badge(page)[0] == "sdpa-math: runs here"
    page.set_widget(SELECTOR, "edge_backend", "sdpa")
    assert badge(page)[0].startswith("The second kernel computes nothing")
    page.set_widget(SELECTOR, "first_steps", 2)
    assert badge(page)[0] == "sdpa-math: runs here"
    page.set_widget(SELECTOR, "edge_backend", "none")
    assert badge(page)[0].startswith("Counts are set")


def hidden(page):
    return page.js(
        "return app.graph.nodes.find(node => node.type === args[0]).widgets.filter(({hidden}) => hidden)"
        ".map(({name}) => name)",
        SELECTOR,
    )


def test_inputs_that_do_not_apply_are_not_shown_and_still_saved(page):
    counts = ["first_steps", "last_steps", "first_blocks", "last_blocks"]
    add(page, SELECTOR)
    assert hidden(page) == [*counts, "aiter_rounding"]
    page.set_widget(SELECTOR, "edge_backend", "sdpa")
    assert hidden(page) == ["aiter_rounding"]
    page.set_widget(SELECTOR, "backend", "aiter")
    assert hidden(page) == []
    page.set_widget(SELECTOR, "edge_backend", "none")
    page.set_widget(SELECTOR, "backend", "auto")
    assert len(page.js("return app.graph.serialize().nodes[0].widgets_values")) == 8


def test_defaults_of_new_nodes_come_from_the_settings(page):
    page.js("await app.extensionManager.setting.set('Flux2Attention.Default.Kernel', 'sdpa-math')")
    try:
        add(page, SELECTOR)
        assert page.nodes()[0]["widgets"][0]["value"] == "sdpa-math"
        saved = page.js("return app.graph.serialize()")
        saved["nodes"][0]["widgets_values"][0] = "sdpa"
        page.load(saved, "loaded")
        assert page.nodes()[0]["widgets"][0]["value"] == "sdpa", "a graph that is loaded keeps its own"
    finally:
        page.js("await app.extensionManager.setting.set('Flux2Attention.Default.Kernel', 'auto')")


# --- reasons


def dialog(page):
    return page.js("return document.querySelector('.flux2-dialog main')?.innerText ?? ''")


CLICK_BADGE = TEXTS + "badges(app.graph.nodes.find(node => node.type === args[0]))[0].onClick()"


def test_what_a_node_raises_is_on_it_and_leads_to_its_section(page, model_files, shots):
    """Fast Blocks needs a GPU."""
    name = model_files["diffusion_models"][0].name
    page.load_api(
        {
            "1": {"class_type": "Flux2LoadModel", "inputs": {"model_name": name, "weight_dtype": "as stored"}},
            # the page remembers a widget's value by node id and name: an id that no graph loaded after this one has
            "92": {"class_type": "Flux2FastBlocks", "inputs": {"model": ["1", 0], "precision": "checkpoint"}},
            "3": {"class_type": "EmptyFlux2LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
            "4": {"class_type": "Flux2AttentionReport", "inputs": {"model": ["92", 0], "latent": ["3", 0]}},
        }
    )
    with pytest.raises(RuntimeError, match="Fast Blocks cannot run here"):
        page.run()
    text, colour = wait_for_badge(page, "Fast Blocks cannot run here", "Flux2FastBlocks")
    assert colour == "#a12622"
    page.wait_for("document.body.innerText.includes('Fast Blocks cannot run here')")  # the message
    page.js(CLICK_BADGE, "Flux2FastBlocks")
    page.screenshot(shots / "reason.png")
    assert dialog(page).startswith("Fast Blocks cannot run here") and "custom_nodes" not in dialog(page)
    page.js("[...document.querySelectorAll('dialog button')].find(({innerText}) => innerText === 'Explain').click()")
    page.wait_for("document.querySelector('.flux2-dialog .target')?.innerText === 'Fast Blocks'")
    page.screenshot(shots / "troubleshooting.png")
    top = page.js("const box = document.querySelector('.flux2-dialog .target').getBoundingClientRect(); return box.top")
    assert 0 < top < 300, "the section is at the top of the dialog"


def test_what_validation_refuses_is_on_the_node_too(page, shots):
    page.load_api({"1": {"class_type": "Flux2ModelInfo", "inputs": {"file_name": "vae/no-such-file.safetensors"}}})
    with pytest.raises(RuntimeError, match="refused"):
        page.run()
    text, colour = wait_for_badge(page, "There is no", "Flux2ModelInfo")
    page.js(CLICK_BADGE, "Flux2ModelInfo")
    page.screenshot(shots / "validation.png")
    assert "no-such-file" in dialog(page) and not dialog(page).startswith("file_name")


# --- into the graph one has


def test_select_attention_goes_behind_any_model_and_undo_takes_it_out(page):
    page.load(json.loads(official_files()["image_flux2_text_to_image"].read_text()), "core")
    inside = "app.rootGraph.nodes.find(node => node.subgraph).subgraph"
    found = page.js(f"""
        app.canvas.setGraph({inside});
        await new Promise(done => setTimeout(done, 500));
        const loader = {inside}.nodes.find(({{type}}) => type === 'UNETLoader');
        const before = loader.outputs[0].links.map(id => [loader.graph.getLink(id).target_id,
          loader.graph.getLink(id).target_slot]);
        const {{getNodeMenuItems}} = app.extensions.find(({{name}}) => name === 'flux2_attention.insert');
        getNodeMenuItems(loader).find(item => item?.content === 'Put Select Attention behind this').callback();
        const added = {inside}.nodes.find(({{type}}) => type === 'Flux2SelectAttention');
        const links = ids => ids.map(id => [added.graph.getLink(id).target_id, added.graph.getLink(id).target_slot]);
        return {{before, added: added.id, loader: links(loader.outputs[0].links), after: links(added.outputs[0].links),
          right: added.pos[0] > loader.pos[0]}};""")
    assert found["loader"] == [[found["added"], 0]] and found["right"]
    assert sorted(map(str, found["after"])) == sorted(map(str, found["before"]))
    page.wait_for("app.extensionManager.workflow.activeWorkflow.changeTracker.undoQueue.length > 0")
    page.js("await app.extensionManager.command.execute('Comfy.Undo')")
    page.wait_for(f"!{inside}.nodes.some(({{type}}) => type === 'Flux2SelectAttention')")
    page.js("app.canvas.setGraph(app.rootGraph)")


TYPES = "[app.rootGraph, ...app.rootGraph.subgraphs.values()].flatMap(({nodes}) => nodes.map(({type}) => type))"


def test_the_command_converts_the_open_graph_and_undo_takes_it_back(page, shots):
    """ComfyUI's own template: its subgraph gets this pack's nodes, and the kernel can be chosen on its node."""
    page.load(json.loads(official_files()["image_flux2_text_to_image"].read_text()), "core")
    before = page.js(f"return {TYPES}")
    page.js("await app.extensionManager.command.execute('Flux2Attention.Convert')")
    page.wait_for("document.querySelector('.flux2-dialog')?.innerText.includes('replaced UNETLoader')")
    page.screenshot(shots / "converted.png")
    after = page.js(f"return {TYPES}")
    assert {"Flux2LoadModel", "Flux2LoadTextEncoder", "Flux2LoadVAE", SELECTOR} <= set(after)
    host = "app.rootGraph.nodes.find(node => node.subgraph).widgets.find(({name}) => name === 'attention kernel')"
    assert page.js(f"return {host}.value") == "auto"
    page.js(f"{host}.value = 'sdpa-math'")
    assert [n["inputs"]["backend"] for n in page.prompt().values() if n["class_type"] == SELECTOR] == ["sdpa-math"]
    page.js(f"{host}.value = 'auto'; document.querySelector('.flux2-dialog').close()")
    page.js("await app.extensionManager.command.execute('Comfy.Undo')")
    page.wait_for(f"!{TYPES}.includes(args[0])", arguments=[SELECTOR])
    assert sorted(page.js(f"return {TYPES}")) == sorted(before)
    page.load(EMPTY, "nothing")
    page.js("await app.extensionManager.command.execute('Flux2Attention.Convert')")
    page.wait_for("document.body.innerText.includes('Nothing to replace')")


def test_a_dropped_model_link_offers_it_first(page):
    assert page.js("return LiteGraph.slot_types_default_out.MODEL[0]") == SELECTOR


# --- reports, sizes, search


def test_tables_in_a_report_are_tables(page, shots):
    add(page, "Flux2BenchmarkAttention")
    lines = [
        "Fastest: sdpa",
        "",
        "backend  ms (median)  runs",
        "sdpa          1.250     9",
        "flash2       11.500    12",
    ]
    page.js("app.graph.nodes[0].onExecuted({text: [args[0]]})", "\n".join(lines))
    rows = page.js(
        "return [...document.querySelectorAll('.flux2-report tr')].map(row => [...row.cells].map(cell => "
        "cell.innerText))"
    )
    page.screenshot(shots / "table.png")
    assert rows == [["backend", "ms (median)", "runs"], ["sdpa", "1.250", "9"], ["flash2", "11.500", "12"]]
    page.js("document.querySelector('.flux2-report button').click()")
    assert "Fastest: sdpa" in dialog(page)


def test_what_a_lora_changed_is_on_its_node(page, server, model_files, shots):
    """A file with a layer that the model has and one that it has not."""
    file = server.base / "models" / "loras" / "of-a-page-test.safetensors"
    file.parent.mkdir(exist_ok=True)
    names = ("diffusion_model.double_blocks.0.img_attn.proj", "diffusion_model.double_blocks.0.nothing")
    parts = {"lora_A": torch.full((4, 256), 0.01), "lora_B": torch.full((256, 4), 0.01)}
    small_models.write(
        file, {f"{name}.{part}.weight": tensor.clone() for name in names for part, tensor in parts.items()}
    )
    model = {"model_name": model_files["diffusion_models"][0].name, "weight_dtype": "as stored"}
    strength = 0.5 + 0.1 * page.js("return Number(LiteGraph.vueNodesMode ?? false)")
    page.load_api(
        {
            "1": {"class_type": "Flux2LoadModel", "inputs": model},
            "93": {
                "class_type": "Flux2LoadLoRA",
                "inputs": {"model": ["1", 0], "lora_name": file.name, "strength": strength},
            },
            "3": {"class_type": "PreviewAny", "inputs": {"source": ["93", 2]}},
        }
    )
    try:
        page.run()
        report = "document.querySelector('.flux2-report')?.innerText ?? ''"
        page.wait_for(f"({report}).includes('1 of 2 layers applied; these were not:')", 30)
        page.screenshot(shots / "lora.png")
        text = page.js(f"return {report}")
    finally:
        file.unlink()
    assert "of-a-page-test.safetensors (LoRA of rank 4) for FLUX.2" in text and f"strength {strength:g}." in text
    assert "diffusion_model.double_blocks.0.nothing: the model has no such layer." in text
    (node,) = [node for node in page.nodes() if node["type"] == "Flux2LoadLoRA"]
    assert node["size"][0] >= 400 and node["size"][1] >= 320


def test_a_report_of_an_earlier_run_says_so(page):
    add(page, "Flux2AttentionReport")
    page.js("app.graph.nodes[0].onExecuted({text: ['a report']})")
    say = "app.api.dispatchCustomEvent ? app.api.dispatchCustomEvent(args[0], args[1]) : \
app.api.dispatchEvent(new CustomEvent(args[0], {detail: args[1]}))"
    page.js(say, "execution_start", {"prompt_id": "x"})
    page.js(say, "execution_interrupted", {"prompt_id": "x", "node_id": "99", "node_type": "KSampler", "executed": []})
    page.wait_for("document.querySelector('.flux2-report .old')?.hidden === false")
    page.js("app.graph.nodes[0].onExecuted({text: ['a new report']})")
    assert page.js("return document.querySelector('.flux2-report .old').hidden")


LEAST = {
    "Flux2AttentionReport": (420, 320),
    "Flux2BenchmarkAttention": (520, 520),
    "Flux2ModelInfo": (420, 320),
    "Flux2LoadLoRA": (400, 320),
    "Flux2EncodePrompt": (400, 300),
}


@pytest.mark.parametrize("node_type", LEAST)
def test_new_nodes_are_as_large_as_what_they_show(page, node_type):
    add(page, node_type)
    (node,) = page.nodes()
    assert node["size"][0] >= LEAST[node_type][0] and node["size"][1] >= LEAST[node_type][1]


FOUND = """
const stores = document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s;
return stores.get('nodeDef').nodeSearchService.searchNode(args[0]).slice(0, 3).map(({name}) => name);
"""
LOADERS = {"Flux2LoadModel", "Flux2LoadTextEncoder", "Flux2LoadVAE"}
WORDS = {
    **dict.fromkeys(("aiter", "rocm", "sdpa", "amd", "sage", "flash attention", "flashattention"), {SELECTOR}),
    **dict.fromkeys(("vram", "low vram", "offload"), LOADERS),
    "several gpus": {"Flux2SequenceParallel"},
    "mistral": {"Flux2LoadTextEncoder", "Flux2UpsamplePrompt"},
    "klein": {"Flux2LoadModel"},
    "triton": {"Flux2FastBlocks"},
}


@pytest.mark.parametrize("words", WORDS)
def test_search_finds_the_node_among_the_first_three(shared_page, words):
    """By ComfyUI's own search service, which its search box asks."""
    assert WORDS[words] & set(shared_page.js(FOUND, words))


def test_the_button_that_clears_prompts_asks_first_and_is_not_sent(page):
    add(page, "Flux2EncodePrompt")
    page.js("app.graph.nodes[0].widgets.find(({type}) => type === 'button').callback()")
    page.wait_for("document.querySelector('.flux2-dialog')?.innerText.includes('Delete all encoded prompts')")
    page.js("[...document.querySelectorAll('dialog button')].find(({innerText}) => innerText === 'Cancel').click()")
    page.wait_for("!document.querySelector('.flux2-dialog')")
    sent = page.prompt()
    (inputs,) = [entry["inputs"] for entry in sent.values()]
    assert not any("clear" in name for name in inputs) and None not in inputs.values()


def test_the_dialog_closes_by_its_cross_and_by_a_click_beside_it(page):
    for close in (
        "document.querySelector('.flux2-dialog header button').click()",
        "document.querySelector('.flux2-dialog').dispatchEvent(new MouseEvent('click'))",
    ):
        page.js("await app.extensionManager.command.execute('Flux2Attention.ShowBackends')")
        page.wait_for("!!document.querySelector('.flux2-dialog')")
        page.js(close)
        page.wait_for("!document.querySelector('.flux2-dialog')")


def test_the_texts_of_the_page_follow_its_language(shared_page):
    texts = json.loads((ROOT / "locales" / "fr" / "main.json").read_text())["flux2Attention"]
    before = "return (await import(`/extensions/flux2-attention/texts.js`)).t('copy')"
    shared_page.js("await app.extensionManager.setting.set('Comfy.Locale', 'fr')")
    try:
        assert shared_page.js(before) == texts["copy"]
    finally:
        shared_page.js("await app.extensionManager.setting.set('Comfy.Locale', 'en')")


# --- what a run shows ------------------------------------------------------------------------------------------------


def test_a_comparison_shows_its_two_images_under_a_slider_and_says_what_it_does(page, server, model_files, shots):
    workflow = json.loads((ROOT / "example_workflows" / "api" / "flux2_compare_attention.json").read_text())
    names = {kind: model_files[kind][0].name for kind in ("diffusion_models", "text_encoders", "vae")}
    small = {
        "model_name": names["diffusion_models"],
        "text_encoder_name": names["text_encoders"],
        "vae_name": names["vae"],
        "width": 64,
        "height": 64,
        "steps": 2,
        "candidate_1": "sdpa-math",
    }
    for node in workflow.values():
        node["inputs"].update({name: small[name] for name in small if name in node["inputs"]})
    page.load_api(workflow)
    page.js(
        "window.said = [];"
        "app.api.addEventListener('flux2_attention_progress', ({detail}) => window.said.push(detail.text))"
    )
    page.set_widget(COMPARE, "noise_seed", 9 + page.js("return Number(LiteGraph.vueNodesMode ?? false)"))
    size = next(node["size"] for node in page.nodes() if node["type"] == COMPARE)
    page.run()
    page.wait_for(
        "[...document.querySelectorAll('.flux2-pair img')].filter(({naturalWidth}) => naturalWidth).length === 2"
    )
    page.screenshot(shots / "slider.png")
    assert list(dict.fromkeys(page.js("return window.said"))) == ["comfyui: 2 steps", "sdpa-math: 2 steps"]
    assert page.js("return document.querySelector('.flux2-report .words').hidden"), "what was said goes with the run"
    page.js(
        "const slide = document.querySelector('.flux2-pair input'); slide.value = 20;"
        "slide.dispatchEvent(new Event('input'))"
    )
    assert "20%" in page.js("return document.querySelector('.flux2-pair img + img').style.clipPath")
    assert next(node["size"] for node in page.nodes() if node["type"] == COMPARE) == size, "the node did not grow"


def test_words_of_a_node_without_a_report_are_on_its_badge_and_do_not_change_its_size(page):
    add(page, "Flux2CompileBlocks")
    before = page.nodes()[0]["size"]
    say = "app.api.dispatchCustomEvent ? app.api.dispatchCustomEvent(args[0], args[1]) : \
app.api.dispatchEvent(new CustomEvent(args[0], {detail: args[1]}))"
    node = page.nodes()[0]["id"]
    page.js(say, "flux2_attention_progress", {"node": str(node), "text": "Compiling double blocks ..."})
    assert badge(page, "Flux2CompileBlocks")[0] == "Compiling double blocks ..."
    assert page.nodes()[0]["size"] == before
    page.js(say, "execution_success", {"prompt_id": "x"})
    assert badge(page, "Flux2CompileBlocks") is None
