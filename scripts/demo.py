#!/usr/bin/env python3
"""Two FLUX.2 pictures out of a real ComfyUI: text to image, and an edit of a picture. Run it with `bash
scripts/demo.sh`.

  bash scripts/demo.sh                                              a small FLUX.2 that draws coloured shapes
                                                                    (docs/small-model.md)
  bash scripts/demo.sh --photograph                                 with the cat of scikit-image as reference, which the
                                                                    small model cannot draw
  bash scripts/demo.sh --attention-backend sdpa-math
  bash scripts/demo.sh --model FILE --text-encoder FILE --vae FILE  real weights

Starts ComfyUI headless, queues the two workflows of example_workflows/api/, saves the pictures into --output-path,
prints which attention backend ran and for how many calls, stops ComfyUI. The last line of stdout is one JSON object:
images, backend, calls, seconds.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import environment
from api_workflow import BadSettings, PictureSettings
from comfy_client import ComfyClient, ComfyError
from comfy_server import ROOT, ComfyServer, ServerFailed, drawing_models
from generate import local_models, stop_on_terminate
from picture import draw_all

# in the words that the small model was trained on
SMALL_PROMPT = "a small red star above a large blue circle on a grey background"
REAL_PROMPT = "A red fox asleep on a stack of old books, morning light through a dusty window"
EDIT_PROMPT = "Add a cool hat to the cat"
SMALL, REAL = {"width": 256, "height": 256, "steps": 20}, {"width": 1024, "height": 1024, "steps": 20}


def parse(arguments=None):
    parser = argparse.ArgumentParser(prog="demo", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", help="FLUX.2 model file (default: a small one that draws coloured shapes)")
    add("--text-encoder", help="Mistral 3 text encoder file; goes with --model")
    add("--vae", help="FLUX.2 VAE file; goes with --model")
    add("--attention-backend", default="auto", help="as in the node Select Attention (default auto)")
    add("--width", type=int, help="multiple of 16 (default 256, with real weights 1024)")
    add("--height", type=int, help="multiple of 16 (default 256, with real weights 1024)")
    add("--steps", type=int, help="default 20")
    add(
        "--photograph",
        action="store_true",
        help="edit the photograph of a cat that comes with scikit-image; always so with real weights",
    )
    add("--output-path", type=Path, default=ROOT / "output", help="folder for the pictures")
    return parser.parse_args(arguments)


def real_weights(args):
    given = [args.model, args.text_encoder, args.vae]
    if any(given) and not all(given):
        raise BadSettings(
            "--model, --text-encoder and --vae go together: give all three, or none for the small models."
        )
    return all(given)


def models(args, comfyui):
    if not real_weights(args):
        return drawing_models()
    return local_models(comfyui, {"diffusion_models": args.model, "text_encoders": args.text_encoder, "vae": args.vae})


def reference(args, folder):
    """The picture to edit: a drawn cat for the small model, which knows no other, and the cat of scikit-image for real
    weights.
    """
    if not (args.photograph or real_weights(args)):
        return ROOT / "tests" / "data" / "drawn_cat.png"
    from PIL import Image
    from skimage import data

    path = Path(folder) / "chelsea.png"
    Image.fromarray(data.chelsea()).save(path)
    return path


def requests(args, files, photo):
    """[(settings, models, images)] for text to image and for the edit."""
    default = REAL if real_weights(args) else SMALL
    size = {name: getattr(args, name) or value for name, value in default.items()}
    megapixels = size["width"] * size["height"] / 1024**2
    names = {folder: paths[0] for folder, paths in files.items()}
    common = {**size, "backend": args.attention_backend}
    edit = PictureSettings(EDIT_PROMPT, reference_megapixels=min(max(megapixels, 0.01), 16), **common)
    prompt = REAL_PROMPT if real_weights(args) else SMALL_PROMPT
    return [(PictureSettings(prompt, **common), names, []), (edit, names, [photo])]


def draw(args):
    """Returns the two Pictures."""
    comfyui = environment.comfyui(environment.cache_folder())
    with tempfile.TemporaryDirectory() as folder:
        files = models(args, comfyui)
        wanted = requests(args, files, reference(args, folder))
        print("Starting ComfyUI ...", file=sys.stderr, flush=True)
        with ComfyServer(comfyui, models=files) as server:
            return draw_all(lambda: ComfyClient(server.url), wanted)


def save(pictures, folder):
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("flux2-text-to-image.png", "flux2-image-edit.png")]
    for path, drawn in zip(paths, pictures):
        path.write_bytes(drawn.data)
    return paths


def demo(args):
    started = time.monotonic()
    pictures = draw(args)
    paths = save(pictures, args.output_path)
    for path, drawn in zip(paths, pictures):
        print(f"{path}\n  attention backend {drawn.backend}, {drawn.calls} calls\n{drawn.text}\n")
    print(
        json.dumps(
            {
                "images": [str(path) for path in paths],
                "backend": ", ".join(dict.fromkeys(drawn.backend for drawn in pictures)),
                "calls": sum(drawn.calls for drawn in pictures),
                "seconds": round(time.monotonic() - started, 2),
            }
        )
    )


def main():
    stop_on_terminate()
    try:
        demo(parse())
    except (BadSettings, ComfyError, ServerFailed, OSError) as error:
        raise SystemExit(f"demo: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("demo: cancelled.") from None


if __name__ == "__main__":
    main()
