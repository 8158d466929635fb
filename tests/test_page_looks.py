"""How the pack's nodes, reports, dialogs and messages look: at three window sizes, in ComfyUI's canvas nodes and in its
newer node design, with its light and its dark colours. One page, with a screenshot of each of the twelve.

  bash scripts/test.sh tests/test_page_looks.py -s     # -s prints the folder of the screenshots

What is tested: letters can be told from what is behind them (WCAG's contrast ratio), nothing sticks out of its box, of
its node or of the window, and a message lies on nothing that ComfyUI shows. Skipped, with the reason, where Chromium or
its driver is missing. Not covered: other browsers, what a canvas node draws of itself (ComfyUI's own colours).
"""

import itertools

import pytest

import browser

pytestmark = pytest.mark.skipif(browser.missing() is not None, reason=f"no browser: {browser.missing()}")

WINDOWS, DESIGNS, THEMES = [(1366, 768), (1600, 900), (1920, 1080)], ["canvas", "newer"], ["light", "dark"]
LEAST_CONTRAST = 4.5  # WCAG 2.2, level AA, for text of usual size
REPORT = """sdpa (PyTorch flash) · 0.180 s per step · all 120 attention calls
Attention backend chosen: auto
20 steps in 3.60 s, the first step included; 0.1 s before it for loading."""
BENCHMARK = """1024x1024: fastest: sdpa-cudnn, 0.443 s per step, 27% less than ComfyUI's own (0.610 s)

1024x1024, a whole step of the model
backend        ms (median)          spread  runs  what ran
sdpa-cudnn         443.100  441.2 to 450.1     3  cuDNN
ComfyUI's own      610.200  608.0 to 615.9     3  flash_attn

Cannot run here:
  aiter, aiter-triton: It needs an AMD GPU, and this model runs on an NVIDIA GPU (sm90)."""


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("looks")
    print(f"screenshots: {folder}")
    return folder


@pytest.fixture(scope="module")
def page(server):
    with browser.Page(server.url) as opened:
        yield opened


# Three nodes beside each other, as large as they are made, with reports and a refused choice.
NODES = """
await app.loadGraphData({nodes: [], links: [], version: 0.4}, true, true, 'looks');
let left = 0;
for (const [type, text] of args[0]) {
  const node = LiteGraph.createNode(type);
  node.pos = [left, 0];
  left += node.size[0] + 30;
  app.graph.add(node);
  if (text) node.onExecuted({text: [text]});
}
const selector = app.graph.nodes[0], widget = selector.widgets.find(({name}) => name === 'backend');
widget.value = 'flash4';
selector.onWidgetChanged('backend', 'flash4', 'auto', widget);
"""
# [what is wrong] of everything with letters below the selector args[0].
UNREADABLE = """
const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
const over = ([r, g, b, a = 1], below) => [r, g, b].map((value, at) => value * a + below[at] * (1 - a));
const behind = element => {
  const layers = [];
  for (let one = element; one; one = one.parentElement) layers.push(numbers(getComputedStyle(one).backgroundColor));
  return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]);
};
const bright = colour => colour.map(value => value / 255).map(value => value <= 0.04045 ? value / 12.92 :
  ((value + 0.055) / 1.055) ** 2.4).reduce((sum, value, at) => sum + value * [0.2126, 0.7152, 0.0722][at], 0);
const wrong = [];
for (const root of document.querySelectorAll(args[0])) {
  for (const element of [root, ...root.querySelectorAll('*')]) {
    const text = [...element.childNodes].filter(({nodeType}) => nodeType === 3).map(({data}) => data).join('').trim();
    if (!text || element.tagName === 'STYLE' || !element.checkVisibility()) continue;
    const back = behind(element), front = over(numbers(getComputedStyle(element).color), back);
    const [low, high] = [bright(back), bright(front)].sort((a, b) => a - b);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < args[1]) wrong.push(`${text.slice(0, 40)}: contrast ${contrast.toFixed(1)}`);
    const box = element.getBoundingClientRect(), whole = root.getBoundingClientRect();
    if (box.left < whole.left - 1 || box.right > whole.right + 1) wrong.push(`${text.slice(0, 40)}: sticks out`);
  }
}
return wrong;
"""
OUTSIDE = """
const box = document.querySelector(args[0]).getBoundingClientRect();
return box.left < 0 || box.top < 0 || box.right > innerWidth || box.bottom > innerHeight;
"""
# Texts in nodes that are page elements and stick out of the node.
BEYOND_ITS_NODE = """
return [...document.querySelectorAll('[data-testid=node-inner-wrapper]')].flatMap(node => {
  const {left, right} = node.getBoundingClientRect();
  return [...node.querySelectorAll('*')].filter(one => !one.children.length && one.textContent.trim() &&
    one.checkVisibility() && !one.closest('[data-slot-key], .lg-slot')).filter(one => {
      const box = one.getBoundingClientRect();
      return box.left < left - 1 || box.right > right + 1;
    }).map(({textContent}) => textContent.slice(0, 60));
});
"""
BESIDE = """(([one, other]) => one.right <= other.left && one.left >= 0)(
  args.map(selector => document.querySelector(selector).getBoundingClientRect()))"""


def unreadable(page, selector):
    return page.js(UNREADABLE, selector, LEAST_CONTRAST)


def set_up(page, window, design, theme):
    page.resize(*window)
    page.js("await app.extensionManager.setting.set('Comfy.VueNodes.Enabled', args[0])", design == "newer")
    page.js("await app.extensionManager.setting.set('Comfy.ColorPalette', args[0])", theme)
    page.wait_for("document.documentElement.classList.contains('dark-theme') === args[0]", arguments=[theme == "dark"])


@pytest.mark.parametrize(
    "window, design, theme",
    list(itertools.product(WINDOWS, DESIGNS, THEMES)),
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else value,
)
def test_everything_can_be_read(page, shots, window, design, theme):
    set_up(page, window, design, theme)
    name = f"{window[0]}-{design}-{theme}"
    nodes = [["Flux2SelectAttention", ""], ["Flux2AttentionReport", REPORT], ["Flux2BenchmarkAttention", BENCHMARK]]
    page.js(NODES, nodes)
    page.fit(margin=100)  # the bar at the left lies over the graph
    page.screenshot(shots / f"{name}-nodes.png")
    assert unreadable(page, ".flux2-report") == []
    assert page.js(BEYOND_ITS_NODE) == []

    page.js("await app.extensionManager.command.execute('Flux2Attention.ShowBackends')")
    page.wait_for("document.querySelectorAll('.flux2-dialog tr').length > 3")
    page.click("Test")
    page.wait_for("document.querySelectorAll('.flux2-dialog .passed').length === 3")
    failed = "Object.assign(document.createElement('div'), {className: 'failed', textContent: 'It gave NaN.'})"
    page.js(f"document.querySelector('.flux2-dialog td').append({failed})")
    page.screenshot(shots / f"{name}-dialog.png")
    assert unreadable(page, ".flux2-dialog") == [] and not page.js(OUTSIDE, ".flux2-dialog")
    page.js("document.querySelector('.flux2-dialog').close()")

    page.load_api({"1": {"class_type": "Flux2ModelInfo", "inputs": {"file_name": "vae/no-such-file.safetensors"}}})
    with pytest.raises(RuntimeError, match="refused"):
        page.run()
    page.wait_for("document.body.innerText.includes('There is no')")
    page.wait_for("document.querySelectorAll('.flux2-message').length === 1")
    page.wait_for("document.querySelector('[data-testid=error-overlay]')?.getBoundingClientRect().width > 0")
    page.screenshot(shots / f"{name}-refused.png")
    for panel in (True, False):  # ComfyUI's panel at the right moves its note of the error
        page.js("await app.extensionManager.setting.set('Comfy.RightSidePanel.IsOpen', args[0])", panel)
        page.wait_for("!!document.querySelector('[data-testid=properties-panel]') === args[0]", arguments=[panel])
        page.wait_for(BESIDE, arguments=[".flux2-message", "[data-testid=error-overlay]"])
    page.js("document.querySelector('.flux2-message button').click()")
    page.wait_for("!document.querySelector('.flux2-message')")
