#!/usr/bin/env python3
"""Draw one FLUX.2 picture through ComfyUI, from the command line.

  .venv/bin/python scripts/generate.py --prompt "A red fox" --server http://127.0.0.1:8188
  .venv/bin/python scripts/generate.py --prompt "Add a cool hat to the cat" --image-path cat.png \
      --model-path flux2-dev.safetensors --text-encoder mistral.safetensors --vae flux2-vae.safetensors

With --server the picture comes from that ComfyUI, which needs this pack and the model files. Without it a headless one
is started for this picture and stopped afterwards; model files are then paths, or names in the models folder of
COMFYUI_PATH. Prints the attention report, and as the last line one JSON object. Progress and errors go to stderr; on an
error the status is not zero. Not covered: batches, negative prompts and guiders other than FLUX.2's own.
"""

import argparse
import contextlib
import json
import re
import signal
import sys
import time
from pathlib import Path

import environment

try:
    from PIL import Image
    from comfy_client import ComfyClient, ComfyError
    from picture import draw_all
except ImportError as error:
    raise SystemExit(
        f"generate: {error.name} is missing in {sys.executable}. Run `bash scripts/demo.sh` once and use "
        ".venv/bin/python, or install aiohttp, tqdm and Pillow."
    ) from None
from api_workflow import BadSettings, PictureSettings, default_models
from comfy_server import ComfyServer, ServerFailed

OLD_FOLDERS = {"diffusion_models": "unet", "text_encoders": "clip"}  # ComfyUI still reads these
FLAGS = {"diffusion_models": "--model-path", "text_encoders": "--text-encoder", "vae": "--vae"}
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
PRECISIONS = ("checkpoint", "fp8")  # of the node Fast Blocks
DEFAULT_SIDE = 1024  # of a picture whose size is not given
IDLE = {True: "CPU when idle", False: "keep on GPU"}  # values of an offload flag -> the input `memory` of a loader node


# flags of public `sglang generate` and `sglang serve` commands that this one does not have -> what to do instead
INSTEAD = {
    "--save-output": "The image is always saved: leave it out, and name the file with --output-path.",
    "--output-file-name": "Name the file with --output-path, such as --output-path out.png.",
    "--output-file-path": "Name the file with --output-path, such as --output-path out.png.",
    "--return-frames": "The image is saved as a file: leave it out.",
    "--tp-size": "Use --num-gpus, which splits the work of one image.",
    "--sp-degree": "Use --num-gpus; --ulysses-degree and --ring-degree say how they share the work.",
    "--dp-size": "Start one ComfyUI for each GPU and give each its prompts.",
    "--enable-cfg-parallel": "FLUX.2 dev computes no second pass. For klein base put core's MultiGPU CFG Split into a "
    "workflow.",
    "--lora-path": "Put the node Load FLUX.2 LoRA behind the model in a workflow; docs/coming-from.md has its inputs.",
    "--lora-scale": "It is the input strength of the node Load FLUX.2 LoRA in a workflow.",
    "--lora-nickname": "Put the node Load FLUX.2 LoRA behind the model in a workflow.",
    "--negative-prompt": "FLUX.2 dev and distilled klein have guidance built in and read none. For klein base use a "
    "CFGGuider in a workflow.",
    "--prompt-path": "Use the node Encode Prompt List in a workflow, or call this once for each prompt.",
    "--prompt-file-path": "Use the node Encode Prompt List in a workflow, or call this once for each prompt.",
    "--num-outputs-per-prompt": "Call it again with another --seed, or set batch_size in a workflow.",
    "--component-attention-backends": "It is the input attention of the node Load FLUX.2 Text Encoder in a workflow.",
    "--enable-attention-backend-autotune": "Use --attention-backend auto, which measures the backends.",
    "--text-encoder-path": "Here it is --text-encoder, and takes a file or a folder.",
    "--text-encoder-precision": "It is the input precision of the node Load FLUX.2 Text Encoder in a workflow.",
    "--vae-path": "Here it is --vae, and takes a file or a folder.",
    "--dit-precision": "The file's own number format is used; the node Load FLUX.2 Model has weight_dtype.",
    "--transformer-path": "Here it is --model-path, and takes a file or a folder.",
    "--transformer-weights-path": "Here it is --model-path; fp8 and mixed-precision files load like any other.",
    "--vae-tiling": "Use core's node VAE Decode (Tiled) in a workflow. Decoding falls back to tiles by itself when "
    "memory runs out.",
    "--pin-cpu-memory": "ComfyUI decides that; its own option --disable-pinned-memory switches it off.",
    "--use-fsdp-inference": "Use --dit-layerwise-offload for a model that is larger than the GPU.",
    "--host": "Start ComfyUI with --listen and give its address here with --server.",
    "--port": "Start ComfyUI with --port and give its address here with --server.",
    "--config": "Write the flags themselves; there is no file of settings.",
    "--backend": "Leave it out: there is one way to run the model here. The kernel is --attention-backend.",
    "--trust-remote-code": "Leave it out: no code is loaded from model files.",
    "--log-level": "Leave it out: progress and errors go to stderr.",
    "--num-frames": "FLUX.2 makes single images: leave it out.",
    "--fps": "FLUX.2 makes single images: leave it out.",
}
EPILOG = """examples:
  generate.py --prompt "A red fox" --server http://127.0.0.1:8188
  generate.py --prompt "Add a cool hat to the cat" --image-path cat.png --seed 42 --output-path out.png
  generate.py --prompt "A red fox" --num-gpus 2 --attention-backend flash3 --warmup

Flags are those of `sglang generate` where both have them. docs/coming-from.md says where the others are."""


class Parser(argparse.ArgumentParser):
    """Answers flags that only sglang has with what to do instead."""

    def error(self, message):
        found = re.match(r"unrecognized arguments: (.*)", message)
        flags = [part.split("=")[0] for part in found[1].split() if part.startswith("--")] if found else []
        lines = [
            f"{flag} is not a flag of this program. {INSTEAD.get(flag, '--help lists all.')}"
            for flag in dict.fromkeys(flags)
        ]
        super().error("\n".join(lines) or message)


def parse(arguments=None):
    parser = Parser(
        prog="generate",
        description=f"{__doc__.split(chr(10))[0]} ComfyUI does the work: a running one (--server), or one that is "
        "started for this image.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("image").add_argument
    add("--prompt", required=True, help="what the image shows, or what to change in the reference images")
    add("--width", type=int, help="multiple of 16 (default 1024, or the width of the first --image-path)")
    add("--height", type=int, help="multiple of 16 (default 1024, or the height of the first --image-path)")
    add("--num-inference-steps", type=int, default=20, help="steps of the sampler (default 20; distilled klein: 4)")
    add(
        "--guidance-scale",
        type=float,
        default=4.0,
        help="how closely FLUX.2 dev follows the prompt (default 4.0; klein does not read it)",
    )
    add("--seed", type=int, default=42, help="number that the noise is made from; the same seed, the same image")
    add(
        "--image-path",
        action="append",
        default=[],
        help="a reference image to edit or combine; give it again for more",
    )
    add(
        "--reference-megapixels",
        type=float,
        default=1.0,
        help="size to which each reference image is scaled, up or down (default 1). Small values make steps faster",
    )
    add(
        "--output-path",
        type=Path,
        default=Path("output"),
        help="an image file (.png .jpg .webp) or a folder (default output)",
    )
    add = parser.add_argument_group("model files", "paths, or names in ComfyUI's model folders").add_argument
    add("--model-path", help="FLUX.2 diffusion model: a file, or a diffusers folder")
    add("--text-encoder", help="Mistral 3 (dev) or Qwen3 (klein): a file, or a Hugging Face folder")
    add("--vae", help="FLUX.2 VAE: a file, or a diffusers folder")
    add_memory_flags(parser.add_argument_group("memory"))
    add_speed_flags(parser.add_argument_group("attention and speed"))
    add_parallel_flags(parser.add_argument_group("several GPUs"))
    add = parser.add_argument_group("server").add_argument
    add("--server", help="URL of a running ComfyUI that has this pack; without it one is started")
    return parser.parse_args(arguments)


def add_memory_flags(parser):
    """Those of sglang. Each takes True or False; alone it means True, and left out ComfyUI decides."""
    for name, what in {
        "dit-cpu-offload": "True: the diffusion model leaves the GPU after each picture. False: it stays there",
        "dit-layerwise-offload": "True: each layer of the diffusion model comes to the GPU when its turn comes; goes "
        "before --dit-cpu-offload",
        "text-encoder-cpu-offload": "True: the text encoder leaves the GPU after each prompt. False: it stays there",
        "image-encoder-cpu-offload": "FLUX.2 encodes reference images with its VAE and has no other image encoder: "
        "the same as --vae-cpu-offload, "
        "which goes before it",
        "vae-cpu-offload": "True: the VAE leaves the GPU after each use. False: it stays there",
    }.items():
        parser.add_argument(
            f"--{name}",
            type=truth,
            nargs="?",
            const=True,
            metavar="True|False",
            help=f"{what} (default: ComfyUI decides)",
        )
    parser.add_argument(
        "--vae-precision",
        choices=("auto", "fp32", "fp16", "bf16"),
        default="auto",
        help="number format of the VAE (default auto)",
    )


def add_speed_flags(parser):
    """Those of sglang, and --fast-blocks."""
    add = parser.add_argument
    add("--attention-backend", default="auto", help="as in the node Select Attention (default auto)")
    yes = {"type": truth, "nargs": "?", "const": True, "default": False, "metavar": "True|False"}
    add("--enable-torch-compile", **yes, help="compile the diffusion model's blocks with torch.compile")
    add(
        "--fast-blocks",
        nargs="?",
        const=PRECISIONS[0],
        choices=PRECISIONS,
        help="fused kernels in the diffusion model's blocks; checkpoint (default): products as the checkpoint has "
        "them, fp8: large products of a bf16 one in fp8",
    )
    add(
        "--warmup",
        **yes,
        help="run some steps before the picture is drawn, so that compiling and tuning are not in its time",
    )
    add("--warmup-steps", type=int, default=1, help="steps at each size (default 1)")
    add(
        "--warmup-resolutions",
        nargs="+",
        metavar="WxH",
        help="sizes to warm up at, such as 1024x1024 2048x2048 (default the picture's); means --warmup",
    )


def add_parallel_flags(parser):
    """Those of sglang. A degree that is left out is chosen."""
    add = parser.add_argument
    add("--num-gpus", type=int, help="how many GPUs compute the picture; 0: all (default 1, or what the degrees make)")
    add("--ulysses-degree", type=int, default=0, help="how many GPUs share the attention heads")
    add(
        "--ring-degree",
        type=int,
        default=0,
        help="how many GPUs pass keys and values round; --ulysses-degree times --ring-degree is --num-gpus",
    )


def number_of_gpus(args):
    """--num-gpus, or what the degrees make."""
    return (args.ulysses_degree or 1) * (args.ring_degree or 1) if args.num_gpus is None else args.num_gpus


def warmup_sizes(args):
    """The sizes to warm up at, as the node reads them, or None."""
    if args.warmup_resolutions:
        return ", ".join(args.warmup_resolutions)
    return f"{args.width or DEFAULT_SIDE}x{args.height or DEFAULT_SIDE}" if args.warmup else None


def truth(text):
    if text.lower() not in ("true", "1", "yes", "false", "0", "no"):
        raise argparse.ArgumentTypeError(f"must be True or False, not {text!r}")
    return text.lower() in ("true", "1", "yes")


def memory_modes(args):
    """{folder under models/: memory mode} for the components that a flag speaks of."""
    vae = args.image_encoder_cpu_offload if args.vae_cpu_offload is None else args.vae_cpu_offload
    modes = {
        "diffusion_models": "layer by layer" if args.dit_layerwise_offload else IDLE.get(args.dit_cpu_offload),
        "text_encoders": IDLE.get(args.text_encoder_cpu_offload),
        "vae": IDLE.get(vae),
    }
    return {folder: mode for folder, mode in modes.items() if mode}


def settings_from(args):
    return PictureSettings(
        prompt=args.prompt,
        width=args.width,
        height=args.height,
        steps=args.num_inference_steps,
        guidance=args.guidance_scale,
        seed=args.seed,
        backend=args.attention_backend,
        reference_megapixels=args.reference_megapixels,
        memory=memory_modes(args),
        vae_precision=args.vae_precision,
        fast_blocks=args.fast_blocks,
        compile_blocks=args.enable_torch_compile,
        warmup=warmup_sizes(args),
        warmup_steps=args.warmup_steps,
        gpus=number_of_gpus(args),
        ulysses=args.ulysses_degree,
        ring=args.ring_degree,
    )


def check_images(paths):
    for path in paths:
        try:
            with Image.open(path) as image:
                image.verify()
        except FileNotFoundError:
            raise BadSettings(f"There is no reference image {path}.") from None
        except Exception as error:  # Pillow raises many kinds, from OSError to SyntaxError
            raise BadSettings(
                f"The reference image {path} cannot be read as a picture ({str(error) or type(error).__name__})."
            ) from None


def output_file(path, seed):
    """The file to write, with its folder made, so that a bad place is found before the picture is drawn."""
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        path = path / f"flux2-{time.strftime('%Y%m%d-%H%M%S')}-seed{seed}.png"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab"):
            pass
    except OSError as error:
        raise BadSettings(f"The picture cannot be written to {path}: {error.strerror}.") from None
    return path


def write_picture(path, data):
    """The server sends PNG; any other format is converted."""
    path.write_bytes(data)
    if path.suffix.lower() != ".png":
        with Image.open(path) as image:
            image.convert("RGB").save(path)


def wanted_models(args):
    return dict(zip(FLAGS, (args.model_path, args.text_encoder, args.vae)))


def is_model(path):
    """A file, or a folder as diffusers and transformers write it; the loaders take both."""
    return path.is_file() or (path / "config.json").is_file()


def local_models(comfyui, wanted):
    """The models for a server of our own: {folder: [file or model folder]}. Names are looked up in ComfyUI's models
    folder.
    """
    found = {}
    for folder, default in default_models().items():
        name = wanted.get(folder) or default
        places = [Path(name), *(comfyui / "models" / kind / name for kind in (folder, OLD_FOLDERS.get(folder, folder)))]
        file = next((place for place in places if is_model(place)), None)
        if file is None:
            raise BadSettings(
                f"There is no model file {name}, neither as a path nor in models/{folder} of {comfyui}. Give it with "
                f"{FLAGS[folder]}."
            )
        found[folder] = [file]
    return found


@contextlib.contextmanager
def server_for(args):
    """The URL of the ComfyUI to use, running as long as the block."""
    if args.server:
        yield args.server
        return
    comfyui = environment.comfyui(environment.cache_folder())
    models = local_models(comfyui, wanted_models(args))
    print("Starting ComfyUI ...", file=sys.stderr, flush=True)
    with ComfyServer(comfyui, models=models) as server:
        yield server.url


def summary(args, path, drawn):
    return {
        "image": str(path),
        "backend": drawn.backend,
        "calls": drawn.calls,
        "seconds": round(drawn.seconds, 3),
        "seconds_per_step": drawn.seconds_per_step and round(drawn.seconds_per_step, 4),
        "seed": args.seed,
        "steps": args.num_inference_steps,
    }


def generate(args):
    """Draw, save and print; raises the errors that main turns into sentences."""
    settings = settings_from(args)
    check_images(args.image_path)
    path = output_file(args.output_path, args.seed)
    try:
        with server_for(args) as url:
            (drawn,) = draw_all(lambda: ComfyClient(url), [(settings, wanted_models(args), args.image_path)])
    except BaseException:
        if path.stat().st_size == 0:
            path.unlink()
        raise
    write_picture(path, drawn.data)
    print(drawn.text)
    if drawn.seconds_per_step:
        print(f"{drawn.seconds_per_step:.3f} seconds per step")
    print(json.dumps(summary(args, path, drawn)))


def stop_on_terminate():
    """SIGTERM ends the program through its `with` blocks, so that the server is stopped and its folder removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def main():
    stop_on_terminate()
    try:
        generate(parse())
    except (BadSettings, ComfyError, ServerFailed) as error:
        raise SystemExit(f"generate: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("generate: cancelled.") from None


if __name__ == "__main__":
    main()
