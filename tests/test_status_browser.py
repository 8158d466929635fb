"""Attention at a glance in a real browser: the badge on the selector after a run, and the dialog with every backend on
this machine.

  bash scripts/test.sh tests/test_status_browser.py -s     # -s prints the folder of the screenshots

Skipped, with the reason, where Chromium or its driver is missing. Not covered: other browsers, and a machine with a
GPU.
"""

import contextlib
import json
import re
import urllib.error
import urllib.request

import pytest

import browser
from flux2_pack.attention import registry
from pack import ROOT

pytestmark = pytest.mark.skipif(browser.missing() is not None, reason=f"no browser: {browser.missing()}")

LOADERS = {
    "diffusion_models": ("Flux2LoadModel", "model_name"),
    "text_encoders": ("Flux2LoadTextEncoder", "text_encoder_name"),
    "vae": ("Flux2LoadVAE", "vae_name"),
}
PER_STEP = r"/[\d.e-]+ s\/step/g"  # the machine decides how long a step takes
BODY = f"document.body.innerText.replace({PER_STEP}, 'N s/step')"
SELECTOR = "Flux2SelectAttention"
STEPS, CALLS = 2, 2 * 6  # the small model has two double and four single blocks
BADGES = (
    "node.badges.map(badge => typeof badge === 'function' ? badge() : badge).filter(badge => badge.text && "
    "badge.text !== 'flux2-attention')"
)


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("status")
    print(f"screenshots: {folder}")
    return folder


def get(server, path):
    with urllib.request.urlopen(server.url + path, timeout=30) as answer:
        return json.load(answer)


def open_graph(page, model_files, seed, backend="auto"):
    """The text-to-image graph with the small models and a small picture, as a user sets it."""
    page.load_api(json.loads((ROOT / "example_workflows" / "api" / "flux2_text_to_image.json").read_text()))
    for folder, (node, widget) in LOADERS.items():
        page.set_widget(node, widget, model_files[folder][0].name)
    page.set_widget("RandomNoise", "noise_seed", seed)
    page.set_widget("Flux2Scheduler", "steps", STEPS)
    for node in ("Flux2Scheduler", "EmptyFlux2LatentImage"):
        page.set_widget(node, "width", 128)
        page.set_widget(node, "height", 96)
    if backend != "auto":
        page.set_widget(SELECTOR, "backend", backend)
        page.wait_for(f"app.graph.nodes.some(node => node.comfyClass === '{SELECTOR}' && {BADGES}.length)")


def badges(page):
    """[[text, background]] of the status badges of every selector, subgraphs included, in the order of the graph."""
    return page.js(
        f"""
        const found = [];
        const look = graph => graph.nodes.forEach(node => {{
          if (node.comfyClass === args[0]) {BADGES}.forEach(badge => found.push([badge.text, badge.bgColor]));
          if (node.subgraph) look(node.subgraph);
        }});
        look(app.graph);
        return found;""",
        SELECTOR,
    )


def texts(page):
    return [text for text, _ in badges(page)]


def wait_for_badges(page, wanted):
    """The badges once they read as wanted; the message of a run comes a moment after its end."""
    with contextlib.suppress(TimeoutError):
        page.wait_for(
            "JSON.stringify(app.graph.nodes.flatMap(node => [node, ...(node.subgraph?.nodes ?? [])]).filter(node => "
            "node.comfyClass === args[0])"
            f".flatMap(node => {BADGES}.map(badge => badge.text.replace({PER_STEP}, 'N s/step')))) === args[1]",
            60,
            [SELECTOR, json.dumps(wanted, ensure_ascii=False, separators=(",", ":"))],
        )
    assert [re.sub(r"[\d.e-]+ s/step", "N s/step", text) for text in texts(page)] == wanted


def look_at(page, node_type):
    page.js(
        """
        const node = app.graph.nodes.find(node => node.type === args[0]);
        app.canvas.ds.scale = 1.5;
        app.canvas.ds.offset = [300 - node.pos[0], 250 - node.pos[1]];
        app.canvas.setDirty(true, true);""",
        node_type,
    )


# --- the badge


def test_the_selector_shows_what_it_resolved_to_and_follows_when_it_is_cached(shared_page, model_files, shots):
    page = shared_page
    open_graph(page, model_files, seed=8101)
    assert badges(page) == []
    page.run()
    wait_for_badges(page, [f"auto → sdpa · N s/step ({STEPS} steps)"])
    look_at(page, SELECTOR)
    page.screenshot(shots / "badge.png")
    page.set_widget("Flux2Scheduler", "steps", STEPS + 1)
    page.run()  # the selector is cached now and does not run: its sampling does
    wait_for_badges(page, [f"auto → sdpa · N s/step ({STEPS + 1} steps)"])


def test_the_badge_judges_another_choice_before_it_runs(shared_page, model_files):
    open_graph(shared_page, model_files, seed=8102)
    shared_page.run()
    wait_for_badges(shared_page, [f"auto → sdpa · N s/step ({STEPS} steps)"])
    shared_page.set_widget(SELECTOR, "backend", "sdpa-math")
    assert texts(shared_page) == ["sdpa-math: runs here"]
    shared_page.run()
    wait_for_badges(shared_page, [f"sdpa-math · N s/step ({STEPS} steps)"])


def test_a_refusal_is_red_and_short_with_the_whole_text_in_the_dialog(shared_page, model_files, shots):
    page = shared_page
    open_graph(page, model_files, seed=8103, backend="flash4")
    assert texts(page)[0].startswith("flash4 cannot run here: It needs an NV") and badges(page)[0][1] == "#a12622"
    with pytest.raises(RuntimeError, match="cannot run here"):
        page.run()
    page.wait_for(
        f"app.graph.nodes.some(node => node.comfyClass === '{SELECTOR}' && {BADGES}[0].text.includes('refused'))"
    )
    ((text, colour),) = badges(page)
    assert text.startswith("flash4 refused: It needs an NVIDIA GPU") and len(text) < 50 and colour == "#a12622"
    look_at(page, SELECTOR)
    page.screenshot(shots / "refused.png")
    page.js(
        f"{BADGES.replace('node.', 'app.graph.nodes.find(node => node.comfyClass === args[0]).', 1)}[0].onClick()",
        SELECTOR,
    )
    page.wait_for("document.querySelector('.flux2-dialog pre')?.innerText.includes('Attention backend')")
    assert "NVIDIA" in page.js("return document.querySelector('.flux2-dialog pre').innerText")
    close_dialog(page)


def test_several_selectors_each_show_their_own(shared_page, model_files, shots):
    page = shared_page
    open_graph(page, model_files, seed=8104)
    page.js("""
        const one = type => app.graph.nodes.find(node => node.type === type);
        const add = type => { const node = LiteGraph.createNode(type); app.graph.add(node); return node; };
        const link = (from, output, to, input) => from.connect(output, to, to.inputs.findIndex(({name}) => name === \
input));
        const selector = add('Flux2SelectAttention'), guider = add('BasicGuider'), sampler = \
add('SamplerCustomAdvanced'), save = add('SaveLatent');
        selector.pos = [one('Flux2SelectAttention').pos[0], one('Flux2SelectAttention').pos[1] - 400];
        selector.widgets.find(({name}) => name === 'backend').value = 'sdpa-math';
        link(one('Flux2LoadModel'), 0, selector, 'model');
        link(selector, 0, guider, 'model');
        const {graph} = guider, conditioning = one('BasicGuider').inputs.find(({name}) => name === 'conditioning');
        const source = graph.getLink ? graph.getLink(conditioning.link) : graph.links[conditioning.link];
        link(graph.getNodeById(source.origin_id), source.origin_slot, guider, 'conditioning');
        for (const {name, link: id} of one('SamplerCustomAdvanced').inputs) {
          const from = graph.getLink ? graph.getLink(id) : graph.links[id];
          link(name === 'guider' ? guider : graph.getNodeById(from.origin_id), name === 'guider' ? 0 : \
from.origin_slot, sampler, name);
        }
        link(sampler, 0, save, 'samples');""")
    page.run()
    wait_for_badges(page, [f"auto → sdpa · N s/step ({STEPS} steps)", f"sdpa-math · N s/step ({STEPS} steps)"])
    page.fit()
    page.screenshot(shots / "two-selectors.png")
    page.js(
        "app.graph.nodes.filter(node => node.comfyClass === args[0])[1].widgets.find(({name}) => name === "
        "'backend').value = 'auto'",
        SELECTOR,
    )
    # two selectors alike are one entry of ComfyUI's cache, one model and one log: what both samplings ran last
    page.run()
    wait_for_badges(page, [f"auto → sdpa · N s/step ({STEPS} steps)"] * 2)


def test_a_selector_inside_a_subgraph(shared_page, model_files, shots):
    page = shared_page
    open_graph(page, model_files, seed=8105)
    page.js(
        "app.graph.convertToSubgraph(new Set(app.graph.nodes.filter(node => [args[0], "
        "'BasicGuider'].includes(node.type))))",
        SELECTOR,
    )
    assert not any(node["type"] == SELECTOR for node in page.nodes())
    page.run()
    wait_for_badges(page, [f"auto → sdpa · N s/step ({STEPS} steps)"])
    page.js(
        "app.canvas.setGraph ? app.canvas.setGraph(app.graph.nodes.find(node => node.subgraph).subgraph) : "
        "app.canvas.openSubgraph(app.graph.nodes.find(node => node.subgraph).subgraph)"
    )
    page.screenshot(shots / "subgraph.png")
    page.js("app.canvas.setGraph(app.rootGraph)")


def test_a_page_that_was_opened_after_the_run_and_the_newer_node_design(server, model_files, shared_page, shots):
    """Everything is cached then and nothing is sampled: the selector's output names the run."""
    open_graph(shared_page, model_files, seed=8106, backend="sdpa-flash")
    shared_page.run()
    wait_for_badges(shared_page, [f"sdpa-flash · N s/step ({STEPS} steps)"])
    with browser.Page(server.url, settings={"Comfy.VueNodes.Enabled": True}) as page:
        open_graph(page, model_files, seed=8106, backend="sdpa-flash")
        assert texts(page) == ["sdpa-flash: runs here"]
        page.run()
        wait_for_badges(page, [f"sdpa-flash · N s/step ({STEPS} steps)"])
        look_at(page, SELECTOR)
        page.wait_for(f"{BODY}.includes('sdpa-flash · N s/step ({STEPS} steps)')")  # a page element
        page.screenshot(shots / "newer-design.png")
        page.set_widget("RandomNoise", "noise_seed", 8107)
        page.set_widget("Flux2Scheduler", "steps", STEPS + 1)
        page.run()
        page.wait_for(f"{BODY}.includes('sdpa-flash · N s/step ({STEPS + 1} steps)')")
        page.js("app.extensionManager.setting.set('Flux2Attention.Badge', false)")
        page.wait_for("!document.body.innerText.includes('sdpa-flash ·')")
        page.js("app.extensionManager.setting.set('Flux2Attention.Badge', true)")
        page.wait_for("document.body.innerText.includes('sdpa-flash ·')")


def test_an_answer_that_comes_late_does_not_take_back_what_a_message_told(shared_page):
    """The page asks for a status while the run goes on; the run's end may be told before the answer is there."""
    shared_page.load({"nodes": [], "links": [], "version": 0.4}, "late")
    shared_page.js(
        """
        const node = LiteGraph.createNode(args[0]);
        app.graph.add(node);
        const {fetchApi} = app.api, asked = new Promise(done => { window.answer = done; });
        app.api.fetchApi = () => asked;
        node.onExecuted({flux2_attention_status: ['late']});
        app.api.fetchApi = fetchApi;
        const ended = {token: 'late', state: 'ran', text: 'sdpa · 1 s/step (2 steps)'};
        app.api.dispatchCustomEvent('flux2_attention_status', ended);
        window.answer(new Response(JSON.stringify({token: 'late', state: 'running', text: 'sdpa · running'})));
        await new Promise(done => setTimeout(done, 200));""",
        SELECTOR,
    )
    assert texts(shared_page) == ["sdpa · 1 s/step (2 steps)"]


# --- the dialog


def close_dialog(page):
    page.js("document.querySelector('.flux2-dialog').close()")
    page.wait_for("!document.querySelector('.flux2-dialog')")


def open_dialog(page):
    page.js("await app.extensionManager.command.execute('Flux2Attention.ShowBackends')")
    page.wait_for("document.querySelectorAll('.flux2-dialog tr').length > 3")
    return page.js("return document.querySelector('.flux2-dialog').innerText")


def test_the_dialog_lists_every_backend_with_its_reason(server, shared_page, shots):
    text = open_dialog(shared_page)
    shared_page.screenshot(shots / "backends.png")
    for entry in get(server, "/flux2_attention/backends")["backends"]:
        assert entry["backend"] in text and (" ".join(entry["reasons"]) or entry["version"]) in text
        assert entry["install"] in text or entry["command"] in text
    close_dialog(shared_page)


def test_test_runs_every_backend_that_can_and_copy_takes_the_list(shared_page, shots):
    open_dialog(shared_page)
    shared_page.js("""
        window.copied = [];
        Object.defineProperty(navigator, 'clipboard', {configurable: true, value: {writeText: async text => { \
window.copied.push(text); }}});
        [...document.querySelectorAll('.flux2-dialog button')].find(({textContent}) => textContent === \
'Test').click();""")
    shared_page.wait_for("document.querySelectorAll('.flux2-dialog .passed').length === 3")
    shared_page.screenshot(shots / "tested.png")
    shared_page.click("Copy")
    shared_page.wait_for("window.copied.length === 1")
    copied = shared_page.js("return window.copied[0]")
    assert (
        all(slug in copied for slug in registry.ROWS) and copied.count("test call passed") == 3 and "PyTorch" in copied
    )
    close_dialog(shared_page)


def test_an_install_command_can_be_copied(shared_page, shots):
    """On a machine with an NVIDIA GPU and no library: the answer of the server is replaced, the page is real."""
    row = {"library": "FlashAttention-4", "summary": "for Hopper", "exact": True, "hardware": "NVIDIA", "version": ""}
    entry = {
        **row,
        "backend": "flash4",
        "state": "to install",
        "reasons": ["FlashAttention-4 cannot be imported."],
        "install": registry.row("flash4").install,
        "command": "/env/bin/python -m pip install --pre flash-attn-4",
    }
    shared_page.js(
        """
        window.copied = [];
        Object.defineProperty(navigator, 'clipboard', {configurable: true, value: {writeText: async text => { \
window.copied.push(text); }}});
        window.fetchApi = app.api.fetchApi;
        app.api.fetchApi = async () => new Response(JSON.stringify({machine: {device: 'NVIDIA H200 (sm90)'}, backends: \
[args[0]], text: ''}));
        await app.extensionManager.command.execute('Flux2Attention.ShowBackends');""",
        entry,
    )
    shared_page.wait_for("!!document.querySelector('.flux2-dialog code')")
    shared_page.screenshot(shots / "install.png")
    shared_page.js("app.api.fetchApi = window.fetchApi; document.querySelector('.flux2-dialog td button').click()")
    shared_page.wait_for("window.copied.length === 1")
    assert shared_page.js("return window.copied[0]") == entry["command"]
    assert "Would run here once installed (1)" in shared_page.js(
        "return document.querySelector('.flux2-dialog').innerText"
    )
    close_dialog(shared_page)


def test_escape_closes_the_dialog_and_its_keys_do_not_reach_the_graph(shared_page):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    before = len(shared_page.nodes())
    open_dialog(shared_page)
    ActionChains(shared_page.driver).send_keys(Keys.DELETE, "m").perform()
    press_escape(shared_page)
    shared_page.wait_for("!document.querySelector('.flux2-dialog')")
    assert len(shared_page.nodes()) == before


def press_escape(page):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    ActionChains(page.driver).send_keys(Keys.ESCAPE).perform()


def test_the_settings_lead_to_the_dialog(shared_page, shots):
    page = shared_page
    page.js("await app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
    leaf = (
        "[...document.querySelectorAll('[role=dialog] *')].find(element => !element.children.length && "
        "element.textContent.trim() === args[0])"
    )
    page.wait_for(f"!!{leaf}", arguments=["Flux 2 Attention"])
    page.js(f"{leaf}.click()", "Flux 2 Attention")
    page.click("Show")
    page.wait_for("document.querySelectorAll('.flux2-dialog tr').length > 3")
    page.screenshot(shots / "from-settings.png")
    close_dialog(page)
    for _ in range(5):
        press_escape(page)
        with contextlib.suppress(TimeoutError):
            page.wait_for("!document.querySelector('[role=dialog]')", 5)
            return
    raise AssertionError("the settings did not close")


# One look at ComfyUI's menu: opens what is closed on the way to the last entry and returns it once it can be seen. It
# clicks, as a person does whose mouse opened nothing: entries open under the mouse only while the menu has the focus,
# and whatever else takes the focus ends that.
MENU_ENTRY = """(() => {
  const button = document.querySelector('.comfy-menu-button-wrapper');
  if (!button.matches('.comfy-menu-button-active')) return void button.click();
  const seen = [...document.querySelectorAll('[role=menuitem]')].filter(item => item.checkVisibility());
  const [last, ...above] = args.map(label => seen.find(item => item.ariaLabel === label)).reverse();
  const closed = above.findLast(item => item?.ariaExpanded !== 'true');
  if (closed) return void closed.firstElementChild.click();
  return last;
})()"""


def test_the_menu_leads_to_the_dialog(shared_page, shots):
    page, path = shared_page, ["Extensions", "Flux 2 Attention", "Backends on this machine"]
    for focus_is_lost in (False, True):
        page.wait_for(f"!!{MENU_ENTRY}", arguments=path[:1])
        if focus_is_lost:
            page.js("document.activeElement.blur()")
        page.wait_for(f"!!{MENU_ENTRY}", arguments=path)
        page.screenshot(shots / "menu.png")
        clicked = f"(() => {{ const entry = {MENU_ENTRY}; entry?.firstElementChild.click(); return !!entry; }})()"
        page.wait_for(clicked, arguments=path)
        page.wait_for("document.querySelectorAll('.flux2-dialog tr').length > 3")
        close_dialog(page)


def test_the_menu_of_the_node_leads_there_too(shared_page, model_files):
    open_graph(shared_page, model_files, seed=8108)
    offered = shared_page.js("""
        const {getNodeMenuItems} = app.extensions.find(({name}) => name === 'flux2_attention.status');
        return ['Flux2SelectAttention', 'BasicGuider'].map(type => getNodeMenuItems(app.graph.nodes.find(node => \
node.type === type)).filter(Boolean).map(({content}) => content));""")
    assert offered == [["Flux 2 Attention: backends on this machine"], []]


def test_an_unknown_token_is_no_error_of_the_server(server):
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(server, "/flux2_attention/status/no-such-token")
    assert caught.value.code == 404 and json.load(caught.value)["error"]
