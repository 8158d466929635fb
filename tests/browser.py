"""ComfyUI's page in a headless Chromium: open, load a workflow, queue it, look at it.

  with browser.Page(server.url) as page:
      page.load(workflow)                  # the JSON of a GUI workflow
      prompt_id = page.run()
      page.screenshot(path)

Needs Debian's chromium and chromium-driver and the package selenium; missing() says what is absent. Everything goes
through the page's own objects (window.app), so what passes here is what the user's browser does. Not covered: dragging
and typing, other browsers.
"""

import contextlib
import json
import shutil
import tempfile
import time
import urllib.request
from pathlib import Path

SECONDS_TO_OPEN, SECONDS_TO_ANSWER = 240, 120  # enough for a machine that is busy with other things
PROGRAMS = ("chromium", "chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--proxy-bypass-list=127.0.0.1;localhost",
    "--lang=en-US",
)
SETTINGS = {
    "Comfy.TutorialCompleted": True,  # no template dialog over the canvas at the first start
    "Comfy.Workflow.Persist": False,
    "Comfy.Locale": "en",
    "Comfy.VueNodes.Enabled": False,
    "Comfy.RightSidePanel.IsOpen": False,  # it covers nodes at the right
    # two clicks of a driver on a busy machine are further apart than 300 ms
    "Comfy.Pointer.DoubleClickTime": 1000,
}
READY = (
    "!!window.app?.graph && !!window.app.canvas && 'SaveImage' in LiteGraph.registered_node_types"
    # the default graph is there: it replaces what was loaded before it
    " && app.extensionManager?.spinner !== true && app.graph.nodes.length > 0"
)
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy must not see loopback addresses


def missing():
    """Why no browser can be started here, or None."""
    absent = [name for name in PROGRAMS if not shutil.which(name)]
    if absent:
        return f"{' and '.join(absent)} not found (on Debian: apt-get install chromium chromium-driver)"
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "the Python package selenium is not installed"
    return None


def store_settings(url, values):
    """Write settings of ComfyUI's default user, as the settings dialog does."""
    request = urllib.request.Request(
        f"{url}/settings", json.dumps(values).encode(), {"Content-Type": "application/json"}
    )
    with DIRECT.open(request, timeout=SECONDS_TO_ANSWER):
        pass


def start_driver(profile):
    """Chromium with a user data directory of its own."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which(PROGRAMS[0])
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which(PROGRAMS[1])))
    driver.set_script_timeout(SECONDS_TO_OPEN)
    return driver


class Page:
    """ComfyUI's page, ready for use. Closed, and its profile removed, when the `with` block ends."""

    def __init__(self, url, width=1920, height=1080, scale=1, settings=()):
        self.url, self.shape = url, (width, height, scale)
        self.settings = {**SETTINGS, **dict(settings)}
        self.driver = None

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            profile = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="flux2-chromium-", ignore_cleanup_errors=True)
            )
            store_settings(self.url, self.settings)
            self.driver = start_driver(profile)
            stack.callback(self.driver.quit)
            self.resize(*self.shape)
            self.driver.get(self.url)
            self.wait_for(READY, SECONDS_TO_OPEN)
            self.resources = stack.pop_all()
        return self

    def __exit__(self, *_):
        self.resources.close()

    def leave(self):
        """Show an empty page: ComfyUI's draws all the time, which takes a third of a core."""
        self.driver.get("about:blank")

    def come_back(self):
        """Open the page again if it was left, with its settings: other pages of this server may have changed them."""
        if self.driver.current_url == "about:blank":
            store_settings(self.url, self.settings)
            self.driver.get(self.url)
            self.wait_for(READY, SECONDS_TO_OPEN)

    def resize(self, width, height, scale=1):
        """What the page can show, in CSS pixels, and how many pixels of a screenshot make one of them."""
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False},
        )

    def js(self, body, *arguments):
        """Run the body of an async JavaScript function in the page; its `args` are the arguments. Returns what it
        returns.
        """
        outcome = self.driver.execute_async_script(
            "const args = [...arguments], done = args.pop();"
            f"(async () => {{ {body} }})().then(value => done({{value}}), error => done({{error: String(error?.stack "
            f"?? error)}}));",
            *arguments,
        )
        if "error" in outcome:
            raise RuntimeError(f"the page raised: {outcome['error']}")
        return outcome.get("value")

    def wait_for(self, condition, seconds=SECONDS_TO_ANSWER, arguments=()):
        """Wait until a JavaScript expression (of `args`) is truthy and return its value."""
        deadline = time.monotonic() + seconds
        while not (value := self.js(f"return {condition}", *arguments)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {seconds} seconds the page still had no {condition}")
            time.sleep(0.1)
        return value

    # --- the graph ---------------------------------------------------------------------------------------------------

    def load(self, workflow, name="test"):
        """Open the JSON of a GUI workflow, as the menu does."""
        self.js("await app.loadGraphData(args[0], true, true, args[1])", workflow, name)

    def load_api(self, workflow, name="test"):
        """Open an API workflow, as dropping its file on the page does: a flat graph. The page keeps values of widgets
        by the ids of graph and node, so it gets a graph of its own.
        """
        self.js(
            "const empty = {id: crypto.randomUUID(), nodes: [], links: [], version: 0.4};"
            "await app.loadGraphData(empty, true, true, args[1]);"
            "await app.loadApiJson(args[0], args[1])",
            workflow,
            name,
        )

    def set_widget(self, node_type, name, value):
        """Set a widget of the only node of that type, as the user does: the widget's own callback runs."""
        self.js(
            """
            const node = app.graph.nodes.find(node => node.type === args[0]);
            const widget = node.widgets.find(widget => widget.name === args[1]);
            const before = widget.value;
            widget.value = args[2];
            widget.callback?.(args[2], app.canvas, node);
            node.onWidgetChanged?.(args[1], args[2], before, widget);""",
            node_type,
            name,
            value,
        )

    def run(self):
        """Press Run and wait for the end; returns the prompt id. What the server refuses or fails with is raised."""
        return self.js("""
            const ended = new Promise((resolve, reject) => {
              app.api.addEventListener('execution_success', event => resolve(event.detail.prompt_id), {once: true});
              app.api.addEventListener('execution_error', event => reject(new Error(event.detail.exception_message)), \
{once: true});
            });
            if (!await app.queuePrompt(0, 1)) throw new Error('refused: ' + JSON.stringify(app.lastNodeErrors));
            const id = await ended;  // the history is written a moment after the message
            for (let i = 0; i < 300 && !(await (await app.api.fetchApi('/history/' + id)).json())[id]; i++) await new \
Promise(done => setTimeout(done, 100));
            return id;""")

    def nodes(self):
        """[{id, type, title, registered, pos, size, widgets: [{name, value}]}] of everything on the canvas; widgets are
        those that are saved.
        """
        return self.js("""
            return app.graph.nodes.map(node => ({
              id: Number(node.id), type: node.type, title: node.title, pos: [...node.pos], size: [...node.size],
              registered: node.type in LiteGraph.registered_node_types,
              widgets: (node.widgets ?? []).filter(widget => widget.serialize !== false).map(({name, value}) => \
({name, value}))}));""")

    def prompt(self):
        """The API workflow that Run would send."""
        return self.js("return (await app.graphToPrompt()).output")

    def text_boxes(self):
        """The texts in the visible text boxes and reports of nodes."""
        return self.js(
            "return [...document.querySelectorAll('textarea, .flux2-report')].filter(box => box.offsetParent)"
            ".map(box => box.value ?? box.innerText)"
        )

    def tooltip(self, node_type, name):
        """Rest the mouse on a widget; returns the tooltip that appears."""
        from selenium.webdriver.common.action_chains import ActionChains

        for _ in range(5):
            # asked again each time: the view may still have been moving
            x, y = self.js(
                """
                // widgets get their places when they are drawn
                for (let i = 0; i < 2; i++) await new Promise(requestAnimationFrame);
                const node = app.graph.nodes.find(node => node.type === args[0]), {scale, offset} = app.canvas.ds;
                const {y} = node.widgets.find(widget => widget.name === args[1]), [left, top] = node.pos;
                return [(left + 80 + offset[0]) * scale, (top + y + 10 + offset[1]) * scale].map(Math.round);
                """,
                node_type,
                name,
            )
            mouse = ActionChains(self.driver)
            mouse.w3c_actions.pointer_action.move_to_location(x - 10, y)
            mouse.w3c_actions.pointer_action.move_to_location(x, y)
            mouse.perform()
            with contextlib.suppress(TimeoutError):
                return self.wait_for("document.querySelector('.node-tooltip')?.innerText", 8)
        raise TimeoutError(f"no tooltip appeared over {name} of {node_type}")

    def click(self, label):
        """Click the button with that text, once it is there."""
        found = "[...document.querySelectorAll('button')].find(button => button.innerText.trim() === args[0])"
        self.wait_for(f"!!{found}", arguments=[label])
        self.js(f"{found}.click()", label)

    def text(self):
        """What can be read on the page outside the canvas: menus, dialogs, messages."""
        return self.js("return document.body.innerText")

    def clear_view(self):
        """Hide everything that is not the graph, and fit the graph into the window."""
        self.js(
            "app.extensionManager.focusMode || await app.extensionManager.command.execute('Workspace.ToggleFocusMode')"
        )
        self.fit()

    def fit(self, margin=40):
        """Show the whole graph. Returns the (left, top, right, bottom) that it covers on a screenshot, that many pixels
        around it included.
        """
        box = self.js(
            """
            const boxes = [...app.graph.nodes, ...app.graph.groups].map(item => item.boundingRect ?? [...item.pos, \
...item.size]);
            const [left, top] = [0, 1].map(axis => Math.min(...boxes.map(box => box[axis])));
            const [right, bottom] = [0, 1].map(axis => Math.max(...boxes.map(box => box[axis] + box[axis + 2])));
            const {clientWidth, clientHeight} = app.canvas.canvas;
            const scale = Math.min((clientWidth - 2 * args[0]) / (right - left), (clientHeight - 2 * args[0]) / \
(bottom - top), 1.5);
            app.canvas.ds.scale = scale;
            app.canvas.ds.offset = [(clientWidth / scale - left - right) / 2, (clientHeight / scale - top - bottom) / \
2];
            app.canvas.setDirty(true, true);
            const place = (value, axis) => (value + app.canvas.ds.offset[axis]) * scale;
            return [place(left, 0) - args[0], place(top, 1) - args[0], place(right, 0) + args[0], place(bottom, 1) + \
args[0]];""",
            margin,
        )
        return tuple(round(edge * self.shape[2]) for edge in box)

    def screenshot(self, path):
        """A PNG of the window, after two more frames were drawn."""
        self.js("for (let i = 0; i < 2; i++) await new Promise(requestAnimationFrame)")
        time.sleep(0.3)  # elements over the canvas, such as text boxes, follow it with a delay
        Path(path).write_bytes(self.driver.get_screenshot_as_png())
