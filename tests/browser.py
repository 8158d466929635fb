"""ComfyUI's page in a headless Chromium: open, load a workflow, queue it, look at it.

  with browser.Page(server.url) as page:
      page.load(workflow)                  # the JSON of a GUI workflow
      prompt_id = page.queue()
      page.screenshot(path)

Needs Debian's chromium and chromium-driver and the package selenium; missing() says what is absent. Everything goes through the page's own
objects (window.app, window.graph), so what passes here is what the user's browser does. Not covered: clicks and typing, other browsers.
"""
import contextlib
import json
import shutil
import tempfile
import time
import urllib.request
from pathlib import Path

SECONDS_TO_OPEN, SECONDS_TO_ANSWER, SECONDS_TO_SETTLE = 60, 30, 10
PROGRAMS = ("chromium", "chromedriver")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--force-color-profile=srgb",
         "--proxy-bypass-list=127.0.0.1;localhost", "--lang=en-US")
SETTINGS = {"Comfy.TutorialCompleted": True,  # no template dialog over the canvas at the first start
            "Comfy.Workflow.Persist": False, "Comfy.Locale": "en"}
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
    request = urllib.request.Request(f"{url}/settings", json.dumps(values).encode(), {"Content-Type": "application/json"})
    with DIRECT.open(request, timeout=SECONDS_TO_ANSWER):
        pass


def start_driver(profile, width, height, scale):
    """Chromium with a user data directory of its own."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which(PROGRAMS[0])
    size = (f"--window-size={width},{height}", f"--force-device-scale-factor={scale}")
    for flag in (*FLAGS, *size, f"--user-data-dir={profile}"):
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
            profile = stack.enter_context(tempfile.TemporaryDirectory(prefix="flux2-chromium-", ignore_cleanup_errors=True))
            store_settings(self.url, self.settings)
            self.driver = start_driver(profile, *self.shape)
            stack.callback(self.driver.quit)
            self.driver.get(self.url)
            self.wait_for("window.app?.graph && window.app.canvas && window.LiteGraph?.registered_node_types?.['SaveImage']", SECONDS_TO_OPEN)
            self.resources = stack.pop_all()
        return self

    def __exit__(self, *_):
        self.resources.close()

    def js(self, body, *arguments):
        """Run the body of an async JavaScript function in the page; its `args` are the arguments. Returns what it returns."""
        outcome = self.driver.execute_async_script(
            "const args = [...arguments], done = args.pop();"
            f"(async () => {{ {body} }})().then(value => done({{value}}), error => done({{error: String(error?.stack ?? error)}}));", *arguments)
        if "error" in outcome:
            raise RuntimeError(f"the page raised: {outcome['error']}")
        return outcome.get("value")

    def wait_for(self, condition, seconds=SECONDS_TO_ANSWER):
        """Wait until a JavaScript expression is truthy and return its value."""
        deadline = time.monotonic() + seconds
        while not (value := self.js(f"return {condition}")):
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {seconds} seconds the page still had no {condition}")
            time.sleep(0.1)
        return value
