#!/usr/bin/env python3
"""Draw the pictures of the help pages in ComfyUI's own page, with the small FLUX.2 that draws shapes.

  python scripts/help_pictures.py [NAME ...]      write web/docs/images/NAME.webp, all of them or those named

Each picture is a workflow that really runs and the nodes that are shown of it; the others are taken away after the run.
What needs a GPU, minutes of compiling or the whole of Mistral is shown as it is before a run. Needs Chromium (see
tests/browser.py) and about four minutes on two cores. Run it after a change of a node's inputs or of what it shows.
"""

import io
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import environment
from api_workflow import PictureSettings, default_models, fill, load, put
from comfy_server import ROOT, ComfyServer, drawing_models

sys.path.insert(0, str(ROOT / "tests"))
import browser  # noqa: E402

FOLDER = ROOT / "web" / "docs" / "images"
# nothing over the graph
BARE = {"Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False, "Comfy.Graph.CanvasMenu": False}
MOST_BYTES, WIDEST, SECONDS_TO_RUN = 60_000, 720, 300
PROMPT = "a small red star above a large blue circle on a grey background"
DRAWN = PictureSettings(PROMPT, 256, 256, steps=12)
LORA = "flux2-style.safetensors"
LEFT, TOP, WIDTH, GAP = 40, 60, 400, 70  # pixels; the gap holds a node's title and the badges above it


@dataclass(frozen=True)
class Picture:
    """workflow: in the API's form. shown: {node type: (left, top, width, height)} of the nodes that stay."""

    workflow: dict
    shown: dict = field(default_factory=dict)
    run: bool = True


def stack(**heights):
    """Nodes below each other, by their types. The help panel is narrow: nothing stands beside anything."""
    tops = [TOP + sum(list(heights.values())[:number]) + number * GAP for number in range(len(heights))]
    return {name: (LEFT, top, WIDTH, height) for (name, height), top in zip(heights.items(), tops)}


def entry(class_type, title, **inputs):
    return {"class_type": class_type, "inputs": inputs, "_meta": {"title": title}}


def compared():
    """Weights rounded to fp8 against the bf16 ones: a difference that can be seen on any machine."""
    workflow = load("flux2_compare_attention.json")
    put(workflow, "CLIPTextEncode", text=PROMPT)
    for node in ("Flux2Scheduler", "EmptyFlux2LatentImage"):
        put(workflow, node, width=256, height=256)
    put(workflow, "Flux2CompareAttention", candidate_1="sdpa-math", model_a=["fp8", 0])
    workflow["fp8"] = entry(
        "Flux2LoadModel", "the same weights in fp8", model_name=default_models()["diffusion_models"], weight_dtype="fp8"
    )
    return workflow


def benchmarked():
    workflow = load("flux2_benchmark_attention.json")
    put(
        workflow,
        "Flux2BenchmarkAttention",
        sizes="512x512",
        backends="sdpa, sdpa-flash, sdpa-math",
        call_repeat=5,
        step_repeat=2,
    )
    return workflow


def with_prompt_node():
    workflow = fill(DRAWN)
    workflow["5"] = entry(
        "Flux2EncodePrompt", "Encode Prompt (FLUX.2)", clip=["2", 0], text=f"{PROMPT}, (masterpiece:1.4)"
    )
    return workflow


def with_prompt_list():
    workflow = fill(DRAWN)
    prompts = f"{PROMPT}\na green ring to the left of a yellow square on a grey background"
    workflow["5"] = entry("Flux2EncodePrompts", "Encode Prompt List (FLUX.2)", clip=["2", 0], prompts=prompts)
    return workflow


def with_improved_prompt():
    workflow = fill(DRAWN)
    workflow["writer"] = entry(
        "Flux2UpsamplePrompt",
        "Improve Prompt with Mistral (FLUX.2)",
        clip=["2", 0],
        text="a fox in a library",
        seed=42,
        temperature=0.15,
        max_tokens=512,
    )
    put(workflow, "CLIPTextEncode", text=["writer", 0])
    return workflow


def info():
    return {
        "1": entry(
            "Flux2ModelInfo", "FLUX.2 Model Info", file_name=f"diffusion_models/{default_models()['diffusion_models']}"
        )
    }


def with_lora():
    workflow = fill(DRAWN)
    workflow["lora"] = entry("Flux2LoadLoRA", "Load FLUX.2 LoRA", model=["1", 0], lora_name=LORA, strength=0.8)
    put(workflow, "Flux2SelectAttention", model=["lora", 0])
    return workflow


PICTURES = {
    "loaders": lambda: Picture(
        fill(DRAWN), stack(Flux2LoadModel=110, Flux2LoadTextEncoder=190, Flux2LoadVAE=110), run=False
    ),
    "load-lora": lambda: Picture(
        with_lora(), stack(Flux2LoadModel=110, Flux2LoadLoRA=120, Flux2SelectAttention=230), run=False
    ),
    "select-attention": lambda: Picture(fill(DRAWN), stack(Flux2SelectAttention=230)),
    "attention-report": lambda: Picture(fill(DRAWN), {"Flux2AttentionReport": (LEFT, TOP, 560, 270)}),
    "encode-prompt": lambda: Picture(with_prompt_node(), {"Flux2EncodePrompt": (LEFT, TOP, 420, 340)}),
    "model-info": lambda: Picture(info(), {"Flux2ModelInfo": (LEFT, TOP, 520, 260)}),
    "fast-blocks": lambda: Picture(
        fill(replace(DRAWN, fast_blocks="checkpoint")),
        stack(Flux2LoadModel=110, Flux2SelectAttention=230, Flux2FastBlocks=60),
        run=False,
    ),
    "compile-blocks": lambda: Picture(
        fill(replace(DRAWN, compile_blocks=True)), stack(Flux2SelectAttention=230, Flux2CompileBlocks=90), run=False
    ),
    "warm-up": lambda: Picture(
        fill(replace(DRAWN, warmup="256x256, 512x512", warmup_steps=2)), {"Flux2WarmUp": (LEFT, TOP, 480, 380)}
    ),
    "sequence-parallel": lambda: Picture(
        fill(replace(DRAWN, gpus=4)), stack(Flux2SelectAttention=230, Flux2SequenceParallel=110), run=False
    ),
    "encode-prompt-list": lambda: Picture(with_prompt_list(), {"Flux2EncodePrompts": (LEFT, TOP, 480, 540)}),
    "improve-prompt": lambda: Picture(
        with_improved_prompt(), {"Flux2UpsamplePrompt": (LEFT, TOP, 420, 420)}, run=False
    ),
    "compare": lambda: Picture(compared()),
    "benchmark": lambda: Picture(benchmarked()),
}
# pictures that are what these nodes saved, one below the other
SAVED_IMAGES = {"compare": ("13", "14"), "benchmark": ("3",)}

TAKE_AWAY = """
for (const node of [...app.graph.nodes]) {
  const place = args[0][node.type];
  if (!place) { app.graph.remove(node); continue; }
  const [left, top, width, height] = place;
  node.pos = [left, top];
  node.setSize([width, height]);
  node.updateArea?.(app.canvas.ctx); // its bounds otherwise follow when it is drawn, which it is not outside the window
}
"""


@contextmanager
def running_page():
    """A page of a ComfyUI that has the small drawing models under the official file names."""
    comfyui = environment.comfyui(environment.cache_folder())
    with tempfile.TemporaryDirectory() as folder, ComfyServer(comfyui, models=official_names(Path(folder))) as server:
        with browser.Page(server.url, settings=BARE) as page:
            page.driver.set_script_timeout(SECONDS_TO_RUN)
            page.clear_view()
            page.wait_for("app.canvas.canvas.clientWidth > innerWidth - 10")
            yield page, server


def official_names(folder):
    """The small drawing models as links with the names that the workflows ask for."""
    made = {kind: folder / name for kind, name in default_models().items()}
    for kind, file in made.items():
        file.symlink_to(drawing_models()[kind][0])
    lora = folder / LORA  # chosen, not run
    lora.touch()
    return {"loras": [lora], **{kind: [file] for kind, file in made.items()}}


def graph(page, picture):
    """The nodes that are shown, cut to what is drawn."""
    from PIL import Image

    page.js(TAKE_AWAY, picture.shown)
    box = page.fit(margin=36)
    with tempfile.TemporaryDirectory() as folder:
        page.screenshot(Path(folder) / "page.png")
        return Image.open(io.BytesIO((Path(folder) / "page.png").read_bytes())).convert("RGB").crop(box)


def saved(page, server, prompt_id, keys):
    """What the SaveImage nodes `keys` saved, one below the other."""
    from PIL import Image

    outputs = page.js("return (await (await fetch(`/history/${args[0]}`)).json())[args[0]].outputs", prompt_id)
    files = [
        server.base / "output" / image["subfolder"] / image["filename"]
        for key in keys
        for image in outputs[key]["images"]
    ]
    images = [Image.open(file).convert("RGB") for file in files]
    sheet = Image.new("RGB", (max(i.width for i in images), sum(i.height for i in images)), "white")
    top = 0
    for image in images:
        sheet.paste(image, (0, top))
        top += image.height
    return sheet


def draw(page, server, name):
    picture = PICTURES[name]()
    page.js("await app.loadApiJson(args[0], args[1])", picture.workflow, name)
    prompt_id = page.run() if picture.run else None
    drawn = saved(page, server, prompt_id, SAVED_IMAGES[name]) if name in SAVED_IMAGES else graph(page, picture)
    drawn.thumbnail((WIDEST, WIDEST))
    return drawn


def save(drawn, path):
    """As good as the limit of a help picture allows."""
    for quality in (90, 80, 70, 60, 50):
        data = io.BytesIO()
        drawn.save(data, "webp", quality=quality, method=6)
        if data.tell() < MOST_BYTES:
            break
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.getvalue())
    print(f"{path.relative_to(ROOT)}: {drawn.width} x {drawn.height}, {data.tell() / 1000:.0f} kB")


def main():
    if reason := browser.missing():
        raise SystemExit(f"help_pictures: {reason}")
    names = sys.argv[1:] or list(PICTURES)
    if unknown := [name for name in names if name not in PICTURES]:
        raise SystemExit(f"help_pictures: there is no picture {', '.join(unknown)}. There are: {', '.join(PICTURES)}.")
    with running_page() as (page, server):
        for name in names:
            save(draw(page, server, name), FOLDER / f"{name}.webp")


if __name__ == "__main__":
    main()
