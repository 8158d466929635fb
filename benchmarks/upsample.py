"""How fast Mistral 3 writes prompts, at full size (24B) with random weights made on the GPU, through the same code as
the node.

  COMFYUI_PATH=... python benchmarks/upsample.py [--json FILE] [--tokens 128] [--small]

Tokens per second of decoding, seconds to the first token and peak memory, for a request in text and for one with
reference pictures of 768 x 768; and the same with ComfyUI's casting of weights switched off, as the cost of being able
to leave weights in main memory. Speed does not depend on the weights; what is written is noise. Needs about 50 GB of
GPU memory and under 90 seconds. --small runs a tiny model anywhere, to try the program. Not covered: weights that do
not fit on the GPU, and the time to read 48 GB from a disk.
"""

import argparse
from pathlib import Path
import sys
import time

import torch

from common import ROOT, import_pack, write
from full_size import fill, import_comfyui

import_pack()
import_comfyui()
sys.path.insert(0, str(ROOT / "tests"))
import comfy.sd  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.text_encoders.flux  # noqa: E402
import small_models  # noqa: E402
from flux2_pack.flux2.checkpoints import identify  # noqa: E402
from flux2_pack.flux2.loading import load, tekken  # noqa: E402
from flux2_pack.flux2.upsampling import vision_inputs, upsample, mistral  # noqa: E402
from flux2_pack.flux2.prompts import tokens as prompt_tokens  # noqa: E402
from flux2_pack.flux2.checkpoints.header import Checkpoint, Tensor  # noqa: E402
from flux2_pack.flux2.loading.encoder_families import FAMILIES  # noqa: E402

FULL = {
    "width": 5120,
    "inner": 32768,
    "heads": 32,
    "kv": 8,
    "layers": 40,
    "vocabulary": 131072,
    "vision": (1024, 4096, 24),
}
SMALL = {"width": 128, "inner": 256, "heads": 2, "kv": 1, "layers": 32, "vocabulary": 512, "vision": (64, 96, 2)}
HEAD, PATCH = 128, 14


def shapes(size):
    """name -> shape of the weights that the CLIP does not hold, as in a Hugging Face folder."""
    w, inner, (v, v_inner, v_layers) = size["width"], size["inner"], size["vision"]
    q, kv = HEAD * size["heads"], HEAD * size["kv"]
    layer = {
        "input_layernorm": (w,),
        "post_attention_layernorm": (w,),
        "self_attn.q_proj": (q, w),
        "self_attn.k_proj": (kv, w),
        "self_attn.v_proj": (kv, w),
        "self_attn.o_proj": (w, q),
        "mlp.gate_proj": (inner, w),
        "mlp.up_proj": (inner, w),
        "mlp.down_proj": (w, inner),
    }
    tower = {
        "attention_norm": (v,),
        "ffn_norm": (v,),
        **{f"attention.{part}_proj": (v, v) for part in "qkvo"},
        "feed_forward.gate_proj": (v_inner, v),
        "feed_forward.up_proj": (v_inner, v),
        "feed_forward.down_proj": (v, v_inner),
    }
    return {
        **{
            f"model.layers.{n}.{name}.weight": shape for n in range(30, size["layers"]) for name, shape in layer.items()
        },
        **{
            f"vision_tower.transformer.layers.{n}.{name}.weight": shape
            for n in range(v_layers)
            for name, shape in tower.items()
        },
        "model.norm.weight": (w,),
        "lm_head.weight": (size["vocabulary"], w),
        "vision_tower.patch_conv.weight": (v, 3, PATCH, PATCH),
        "vision_tower.ln_pre.weight": (v,),
        "multi_modal_projector.norm.weight": (v,),
        "multi_modal_projector.linear_1.weight": (w, v),
        "multi_modal_projector.linear_2.weight": (w, w),
        "multi_modal_projector.patch_merger.merging_layer.weight": (v, 4 * v),
    }


class RandomWeights(dict):
    """Weights by their shape, made on the device when they are asked for."""

    def __init__(self, table, device):
        super().__init__(table)
        self.device = device

    def __getitem__(self, name):
        shape = super().__getitem__(name)
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16, device=self.device)
        return torch.empty(shape, dtype=torch.bfloat16, device=self.device).normal_(
            0, (shape[1] if len(shape) == 2 else 588) ** -0.5
        )


def dimensions(size):
    """ComfyUI's names of the language model's dimensions."""
    return {
        "vocab_size": size["vocabulary"],
        "hidden_size": size["width"],
        "num_hidden_layers": 30,
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["kv"],
        "intermediate_size": size["inner"],
    }


def make_clip(size, device):
    """A CLIP of the first 30 layers with random weights."""
    family = FAMILIES["mistral3"]
    flux = comfy.text_encoders.flux
    data = small_models.tekken()
    ready = {
        f"{family.name}_tokenizer_class": load._mistral_tokenizer(tekken.build(data, "benchmark"), data, size["width"])
    }
    options = {
        f"{family.name}_model_config": {**dimensions(size), "final_norm": False, "lm_head": False},
        "initial_device": device,
        "load_device": device,
        "offload_device": torch.device("cpu"),
    }
    clip = comfy.sd.CLIP(
        load.Target(flux.flux2_te(dtype_llama=torch.bfloat16), flux.Flux2Tokenizer),
        tokenizer_data=ready,
        model_options=options,
        disable_dynamic=True,
    )
    fill(clip.cond_stage_model.mistral3_24b.transformer, seed=0)
    return clip


def make_writer(clip, size, device):
    """The Writer of the node around a CLIP, its own weights random."""
    table = shapes(size)
    checkpoint = Checkpoint(
        Path("random.safetensors"), {name: Tensor(shape, "BF16", 0, Path("random")) for name, shape in table.items()}
    )
    found = identify.Identity(
        "mistral3", "Mistral 3", "", identify.TEXT_ENCODER, prefix="model.", width=size["width"], layers=size["layers"]
    )
    parts = mistral.Parts(checkpoint, found, dimensions(size), mistral.own_names(checkpoint.tensors, found), True)
    mistral.load.read = lambda _: RandomWeights(table, device)
    return mistral.writer_of(clip, parts, 10)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(clip, made, inner, asked, tokens, device):
    """Seconds to write that many tokens; the time for one is the time to the first."""
    settings = upsample.WritingSettings(0, 0.15, tokens)
    synchronize(device)
    start = time.perf_counter()
    count = len(upsample.write(clip, made, inner, asked, settings, None))
    synchronize(device)
    return count, time.perf_counter() - start


def case(name, clip, made, inner, images, tokens, device):
    asked = upsample.request(
        inner,
        "a photograph of a cat with a cool hat in the street at night",
        vision_inputs.frames(images, 4),
        made.network.config,
    )
    timed(clip, made, inner, asked, 2, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    first = timed(clip, made, inner, asked, 1, device)[1]
    count, seconds = timed(clip, made, inner, asked, tokens, device)
    row = {
        "case": name,
        "prompt_tokens": asked.ids.shape[1],
        "written": count,
        "first_token_s": round(first, 3),
        "tokens_per_s": round((count - 1) / (seconds - first), 2),
    }
    if device.type == "cuda":
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return row


def switch_casting(clip, made, on):
    """Let ComfyUI's layers cast and fetch weights, or use them as they are."""
    for module in [*clip.cond_stage_model.modules(), *made.patcher.model.modules()]:
        if hasattr(module, "comfy_cast_weights"):
            module.comfy_cast_weights = on


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=128, help="tokens to write in each case")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the program")
    parser.add_argument("--json", help="file to write the result to")
    options = parser.parse_args()
    size, device, start = (
        SMALL if options.small else FULL,
        comfy.model_management.get_torch_device(),
        time.perf_counter(),
    )
    with torch.inference_mode():
        clip = make_clip(size, device)
        made, inner = make_writer(clip, size, device), prompt_tokens.inner_of(clip)
        numbers = sum(weight.numel() for weight in made.network.parameters())
        print(f"{numbers / 1e9:.2f} billion weights made in {time.perf_counter() - start:.1f} s", flush=True)
        cases = {"text": [], "one picture": [torch.rand(1, 768, 768, 3)], "four pictures": [torch.rand(4, 768, 768, 3)]}
        rows = [case(name, clip, made, inner, images, options.tokens, device) for name, images in cases.items()]
        switch_casting(clip, made, False)
        rows.append(case("text, casting off", clip, made, inner, [], options.tokens, device))
    write(
        {
            "model": "Mistral 3 with vision tower, random weights, bf16",
            "billion_weights": round(numbers / 1e9, 3),
            "cases": rows,
            "seconds": round(time.perf_counter() - start, 1),
        },
        options.json,
    )


if __name__ == "__main__":
    main()
