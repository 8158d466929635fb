"""Every node of the pack, run with hostile values of its inputs, made from a seed.

  COMFYUI_PATH=... python tests/fuzz_nodes.py --count 20000 --seed 1      # by hand; tests/test_fuzz.py runs 500

A case is one node with good values on small models, and one to three of them replaced by what a link from another
node may bring: None, NaN, numbers far out of range, texts of a million or of control characters, tensors of other
shapes, number formats and devices, images without a pixel, schedules without a step, models of another kind. The nodes
are those that ComfyUI gets. Each run must end in a result or in an error of the pack in sentences, within LIMIT.
"""

import argparse
import asyncio
import collections
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import pack  # noqa: F401
import torch

import prompt_models
import small_models as maker
from fuzz_files import LIMIT, outcome

CONSTANTS = (None, True, -1, 0, 1, 3, 2**31, 2**63, 2**64, 10**400, 1.5, 3.0, -1.0, 1e308, float("nan"), float("inf"))
CONSTANTS += ("", " ", ".", "\0", "\x1b[31m\r\n", "x" * 300, "\ud800", "٣", "nan", "auto", "none", "comfyui", "sdpa")
CONSTANTS += ([], {}, [1], ["1", 0], (1, 2), b"x", object())
# texts that reach a parser or a tokenizer, most of them long
TEXTS = ("", " ", ",", "\0", "a" * 10**6, " " * 10**6, ",x" * 10**5, "(" * 10**5, "é" * 10**5, "\u202e" * 100)
TEXTS += ("\x00\x1b\x7f" * 1000, "\ud800", "[IMG]" * 1000, "<s>[INST]" * 500, "embedding:../../x", "9" * 5000 + "x16")
TEXTS += (
    "32x32," * 10**5,
    "32x32+99",
    "0x0",
    "16x99999999999999999999",
    "32 × 32",
    "٣٢x٣٢",
    "sdpa,sdpa,sdpa",
    "flash3",
)
TEXTS += ("sdpa", "../x.txt", "/dev/zero", "x" * 300 + ".txt", "prompts.txt", "32x48, 48x32")


# --- values ----------------------------------------------------------------------------------------------------------


def tensors(good, rng):
    """A tensor that is not like a good one: shape, number format, layout, device or content."""
    shape = list(good.shape)
    what = rng.randrange(7)
    if what == 0:
        place = rng.randrange(len(shape))
        shape[place] = rng.choice((0, 1, shape[place] + 1, 5))
        return torch.ones(shape, dtype=good.dtype)
    if what == 1:
        return rng.choice((good[None], good[0], good.flatten(), torch.tensor(1.0), good.movedim(-1, 0)))
    if what == 2:
        kinds = "uint8 int64 bool float64 float16 bfloat16 complex64 float8_e4m3fn"
        return good.to(getattr(torch, rng.choice(kinds.split())))
    if what == 3:
        return good.to("meta") if rng.random() < 0.5 else good.to_sparse()
    if what == 4:
        return good * rng.choice((float("nan"), float("inf"), 1e30, -1e30, 0.0))
    if what == 5:
        return good.clone().requires_grad_(good.is_floating_point() and not good.is_inference())
    return rng.choice((good.tolist(), good.expand(3, *shape), good.mT if good.ndim > 1 else good[:0], good[..., :0]))


def constants(item, good, rng):
    if item.io_type == "STRING" and rng.random() < 0.7:
        return rng.choice(TEXTS)
    if item.io_type == "COMBO" and rng.random() < 0.3:
        return rng.choice(item.options or [""])
    limits = [v for v in (getattr(item, "min", None), getattr(item, "max", None)) if v is not None]
    if limits and rng.random() < 0.2:
        return rng.choice(limits) + rng.choice((-1, 1))
    return rng.choice(CONSTANTS)


def latents(good, rng):
    what = rng.randrange(5)
    if what == 0:
        return {"samples": tensors(good["samples"], rng)}
    if what == 1:
        return {**good, "noise_mask": tensors(torch.ones(1, 1, 4, 4), rng)}
    if what == 2:
        return {**good, "batch_index": rng.choice((None, [], [0], [10**9], ["x"], 3))}
    if what == 3:
        return {**good, "downscale_ratio_spacial": rng.choice((None, 0, 8, "x", 10**9))}
    return rng.choice((None, {}, [], {"samples": None}, {"x": good["samples"]}, good["samples"], "x"))


def conditionings(good, rng):
    context, options = good[0]
    what = rng.randrange(4)
    if what == 0:
        return [[tensors(context, rng), options]]
    if what == 1:
        wrong = rng.choice((None, "x", [], torch.zeros(1, 5, 2, 2), torch.zeros(2), float("nan"), 10**400))
        name = rng.choice(
            ("guidance", "reference_latents", "pooled_output", "attention_mask", "area", "mask", "control")
        )
        return [[context, {**options, name: rng.choice((wrong, [wrong]))}]]
    if what == 2:
        name = rng.choice(("start_percent", "end_percent", "strength", "timestep_start", "hooks", "model_conds"))
        return [[context, {**options, name: rng.choice(CONSTANTS)}]]
    return rng.choice((None, [], [[]], [[context]], [[None, {}]], [["x", {}]], [[context, None]], [context], good * 3))


def hostile(item, good, world, rng):
    """A hostile value for an input."""
    kind = item.io_type
    if kind in ("INT", "FLOAT", "STRING", "COMBO"):
        return constants(item, good, rng)
    if rng.random() < 0.25:
        return rng.choice((None, "x", 5, [], {}, object(), *world.values()))
    if kind in ("MODEL", "CLIP", "VAE"):
        return rng.choice(world[f"other {kind}"])
    if kind == "LATENT":
        return latents(good, rng)
    if kind == "CONDITIONING":
        return conditionings(good, rng)
    if kind in ("SIGMAS", "IMAGE"):
        return tensors(good, rng)
    return rng.choice((None, "x", object(), world["MODEL"], world["SAMPLER"], world["GUIDER"]))


# --- the world in which a node is good -------------------------------------------------------------------------------


def make_world(folder):
    """{type of socket: a good value}, and {"other " + type: [values of that type that fit badly]}."""
    import comfy.samplers
    import folder_paths
    from flux2_pack.flux2.loading import lazy_clip, load
    from flux2_pack.flux2.measuring import sampling

    files = {
        "diffusion_models": maker.diffusion_model(hidden=128, double=1, single=1),
        "text_encoders": maker.text_encoder(),
        "vae": maker.vae(),
    }
    (folder / "input").mkdir(exist_ok=True)
    (folder / "input" / "prompts.txt").write_text("a cat\na dog\n")
    folder_paths.set_input_directory(str(folder / "input"))
    folder_paths.set_output_directory(str(folder / "output"))
    folder_paths.set_temp_directory(str(folder / "temp"))
    folder_paths.set_user_directory(str(folder / "user"))
    paths = {kind: maker.write(folder / kind / f"good-{kind}.safetensors", value) for kind, value in files.items()}
    lora = {
        "single_blocks.0.linear1.lora_A.weight": torch.ones(2, 128),
        "single_blocks.0.linear1.lora_B.weight": torch.ones(1152, 2),
    }
    paths["loras"] = maker.write(folder / "loras" / "good-loras.safetensors", lora)
    for kind, path in paths.items():
        folder_paths.add_model_folder_path(kind, str(path.parent), is_default=True)
        folder_paths.filename_list_cache.pop(kind, None)
    model = load.load_model(str(paths["diffusion_models"]))
    whole = lazy_clip.EncoderSource(str(prompt_models.folder(folder / "mistral")[0]))
    clip = lazy_clip.text_encoder(whole, lambda: load.load_text_encoder(whole.path))  # it can write
    vae = load.load_vae(str(paths["vae"]))
    other = maker.write(folder / "wide.safetensors", maker.diffusion_model(hidden=256, double=1, single=1, context=64))
    broken = load.load_model(str(paths["diffusion_models"]))
    with torch.no_grad():
        next(broken.model.diffusion_model.parameters()).fill_(float("nan"))
    positive = [[torch.zeros(1, 4, 3 * maker.TEXT_HIDDEN), {"guidance": 4.0}]]
    return {
        "MODEL": model,
        "CLIP": clip,
        "VAE": vae,
        "LATENT": {"samples": torch.zeros(1, 128, 2, 2)},
        "CONDITIONING": positive,
        "SIGMAS": torch.tensor([1.0, 0.5, 0.0]),
        "SAMPLER": comfy.samplers.sampler_object("euler"),
        "GUIDER": sampling.guider_of(model, positive),
        "IMAGE": torch.full((1, 32, 32, 3), 0.5),
        "other MODEL": [load.load_model(str(other)), broken, not_flux()],
        "other CLIP": [load.load_text_encoder(str(paths["text_encoders"]), padding="reference")],
        "other VAE": [vae],
    }


def not_flux():
    """A MODEL of another kind: core's base class around one linear layer."""
    import comfy.latent_formats
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models_base

    class Other(comfy.supported_models_base.BASE):
        unet_config = {"disable_unet_model_creation": True}
        latent_format = comfy.latent_formats.SD15

    network = comfy.model_base.BaseModel(Other({"disable_unet_model_creation": True}))
    network.diffusion_model = torch.nn.Linear(4, 4)
    network.diffusion_model.dtype = torch.float32
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(network, cpu, cpu)


def nodes_of_the_pack():
    """{node id: class}, as ComfyUI gets them."""
    from flux2_pack.nodes import Flux2Attention

    return {node.GET_SCHEMA().node_id: node for node in asyncio.run(Flux2Attention().get_node_list())}


LONG_WORK = ("references", "call_repeat", "step_repeat", "max_tokens")  # valid values take a CPU longer than a case may
GOOD = {  # where the default is not what is wanted here
    "sizes": "32x32",
    "text": "a cat",
    "prompts": "a cat\na dog",
    "steps": 1,
    "call_repeat": 1,
    "step_repeat": 1,
    "backends": "sdpa",
    "noise_seed": 1,
    "candidate_1": "sdpa-math",
    "max_tokens": 2,
    "gpus": 1,
}


def good_values(node, world):
    """The values with which a node runs: {input id: value}; of optional sockets only what it needs."""
    found = {}
    for item in node.define_schema().inputs:
        if item.io_type in world:
            if not item.optional or item.id in ("positive", "vae"):
                found[item.id] = world[item.io_type]
        elif item.id in GOOD:
            found[item.id] = GOOD[item.id]
        elif item.io_type == "COMBO" and item.default is None:
            found[item.id] = next(name for name in item.options if "good-" in name)
        else:
            # an input of two types: what it is on the page
            found[item.id] = (getattr(item, "input_override", None) or item).default
    return found


def sentence_of(error):
    """The text of an error of the pack without the line that names its section, None of any other error."""
    from flux2_pack.attention.errors import Explained
    from flux2_pack.flux2 import error_links

    return error_links.bare(str(error)) if isinstance(error, Explained) or getattr(error, "topic", "") else None


def fuzz(count, seed, folder, show=print, first=0, only=None):
    """(Counter of outcomes, slowest seconds) of `count` cases from number `first` on; all but results and sentences
    are shown.
    """
    total, slowest = collections.Counter(), 0.0
    folder = Path(folder)
    world, nodes = make_world(folder), nodes_of_the_pack()
    for number in range(first, first + count):
        rng = random.Random(f"{seed}/{number}")
        name = rng.choice(sorted(nodes))
        if only and name not in only:
            continue
        node, schema = nodes[name], nodes[name].define_schema()
        values = good_values(node, world)
        changed = rng.sample(schema.inputs, min(rng.choice((0, 1, 1, 1, 2, 3)), len(schema.inputs)))
        for item in changed:
            if item.id in LONG_WORK:
                continue
            values[item.id] = hostile(item, values.get(item.id, world.get(item.io_type)), world, rng)
        shutil.rmtree(folder / "user", ignore_errors=True)
        result, seconds, text = outcome(lambda: node.EXECUTE_NORMALIZED(**values), sentence_of)
        slowest = max(slowest, seconds)
        if result in ("done", "sentence") and seconds > LIMIT:
            result = "slow"
        total[result] += 1
        if result not in ("done", "sentence"):
            given = {item.id: repr(values[item.id])[:200] for item in changed}
            show(f"case {seed}/{number} ({name}, {given}): {result} after {seconds:.1f} s\n{text}")
    return total, slowest


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20000)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to try one again")
    parser.add_argument("--only", nargs="*", help="node ids")
    args = parser.parse_args()
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    sys.argv = sys.argv[:1]
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args as core

    core.cpu = True
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        core.base_directory = folder
        total, slowest = fuzz(
            args.count, args.seed, folder, lambda text: print(text, flush=True), args.first, args.only
        )
    print(f"{args.count} cases, seed {args.seed}: {dict(total)}, slowest {slowest:.2f} s")
    return 1 if set(total) - {"done", "sentence"} else 0


if __name__ == "__main__":
    sys.exit(main())
