"""One prompt through FLUX.2's text encoders at full size (Qwen3 4B and 8B, Mistral 3 24B), and how exact each way is.

  COMFYUI_PATH=... python benchmarks/encode.py [--cases qwen3-4b qwen3-8b mistral3] [--json FILE]

Random weights on the GPU, the same tensors for all. Milliseconds are wall clock, medians over rounds that go around all
peers. core and ours: the node CLIP Text Encode, from the prompt to the conditioning in host memory: core with all
layers in float32, ours-float32 and ours-bf16 as Load FLUX.2 Text Encoder makes them with that `precision`. diffusers:
its pipeline's function from the prompt to the prompt's embedding on the GPU, in bf16; of Mistral, whose processor needs
files that are not here, only what follows the tokens: 512 of them, as its pipeline pads. `error`: relative Frobenius
distance of the prompt's hidden states (padding left out) to ours-float32. `gpu_ms`: what the kernels take. --small
tries every path on a CPU.
"""

import argparse
import json
import sys
import tempfile

import torch

from common import ROOT, import_pack, save, summary
from full_size import import_comfyui

import_pack()
sys.path.append(str(ROOT / "tests"))  # behind everything: it holds a tokenizer for Mistral
import klein  # noqa: E402

MISTRAL = {
    "vocab_size": 131072,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 5120,
    "intermediate_size": 32768,
}
CASES = {
    "qwen3-4b": klein.CASES["klein-4b"][2],
    "qwen3-8b": klein.CASES["klein-9b"][2],
    "mistral3": MISTRAL,
}
LENGTH = 512  # tokens that diffusers gives every encoder


def mistral_weights(sizes, device, dtype):
    """State dict of a Mistral 3 language model with these sizes, random."""
    weights = klein.encoder_weights(sizes, device)
    return {name: value.to(dtype) for name, value in weights.items() if "_norm." not in name}


def mistral_tokenizer(width):
    """tokenizer_data for ComfyUI's CLIP: a small tekken, whose tokens are bytes."""
    import small_models
    from flux2_pack.flux2.loading import load, tekken

    data = small_models.tekken()
    return {"mistral3_24b_tokenizer_class": load._mistral_tokenizer(tekken.build(data, "tekken"), data, width)}


def transformers_mistral(sizes, weights, device, dtype):
    """transformers' language model of Mistral 3 over the encoder's tensors."""
    from transformers import MistralConfig, MistralModel
    from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

    config = MistralConfig(
        **sizes, head_dim=128, rms_norm_eps=1e-5, rope_theta=1e9, sliding_window=None, max_position_embeddings=131072
    )
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1e9}
    config.dtype = dtype
    with torch.device("meta"):
        model = MistralModel(config)
    model.load_state_dict({name.removeprefix("model."): value for name, value in weights.items()}, assign=True)
    model.rotary_emb = MistralRotaryEmbedding(config).to(device)
    return model.eval().requires_grad_(False)


class Encoders:
    """The peers of a case, as functions that encode the prompt: work() -> (1, tokens of the prompt, 3 * width)."""

    def __init__(self, kind, options):
        self.kind, self.sizes = kind, dict(CASES[kind])
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        if options.small:
            self.sizes |= klein.SMALL[1] | ({"num_hidden_layers": 32, "vocab_size": 512} if kind == "mistral3" else {})
        self.is_mistral = kind == "mistral3"
        if self.is_mistral:
            self.weights = mistral_weights(self.sizes, self.device, self.dtype)
        else:
            made = klein.encoder_weights(self.sizes, self.device)
            self.weights = {name: value.to(self.dtype) for name, value in made.items()}
        self.tokenizer_data = mistral_tokenizer(self.sizes["hidden_size"]) if self.is_mistral else {}

    def nodes(self, layers, precision):
        import nodes

        clip = klein.clip_of(self.weights, self.kind, self.sizes, layers, precision, self.tokenizer_data)
        return lambda: nodes.CLIPTextEncode().encode(clip, klein.PROMPT)[0][0][0]

    def ids(self):
        """The prompt's tokens as ComfyUI makes them, (1, T), without padding."""
        from flux2_pack.flux2.loading.encoder_families import FAMILIES
        import comfy.text_encoders.flux as flux

        (rows,) = (
            FAMILIES[self.kind]
            .tokenizer(flux)(tokenizer_data=self.tokenizer_data)
            .tokenize_with_weights(klein.PROMPT)
            .values()
        )
        return torch.tensor([[token for token, _ in rows[0] if token != 151643]], device=self.device)

    def diffusers(self):
        if not self.is_mistral:
            from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline

            world = argparse.Namespace(
                encoder_sizes=self.sizes, dtype=self.dtype, encoder=self.weights, device=self.device
            )
            model, tokenizer = klein.transformers_encoder(world), klein.tokenizer()
            return lambda: Flux2KleinPipeline._get_qwen3_prompt_embeds(model, tokenizer, klein.PROMPT)
        model, ids = transformers_mistral(self.sizes, self.weights, self.device, self.dtype), self.ids()
        padded = torch.nn.functional.pad(ids, (LENGTH - ids.shape[1], 0), value=11)
        mask = torch.nn.functional.pad(torch.ones_like(ids), (LENGTH - ids.shape[1], 0))

        def work():
            states = model(padded, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
            out = torch.stack([states[tap] for tap in (10, 20, 30)], dim=1)
            return out.permute(0, 2, 1, 3).reshape(1, LENGTH, -1)

        return work

    def prompt_part(self, out):
        """The hidden states of the prompt alone: Qwen is padded behind it, Mistral in front."""
        length = self.ids().shape[1]
        return (out[:, -length:] if self.is_mistral else out[:, :length]).float().cpu()


def gpu_ms(work):
    """Milliseconds that kernels take in one run, or None without a GPU."""
    if not torch.cuda.is_available():
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return round(sum(e.time_range.elapsed_us() for e in events if not e.name.startswith("Memcpy DtoH")) / 1e3, 2)


def measure(kind, options):
    from flux2_pack.flux2.loading.encoder_families import FAMILIES

    encoders, last = Encoders(kind, options), FAMILIES[kind].last_tap
    makers = {
        "ours-float32": lambda: encoders.nodes(last, "float32"),
        "ours-bf16": lambda: encoders.nodes(last, "bf16"),
        "core": lambda: encoders.nodes(None, "float32"),
        "diffusers": encoders.diffusers,
    }
    works, rows, exact = {}, [], None
    for peer, make in makers.items():
        row = {"peer": peer}
        rows.append(row)
        try:
            work = make()
            part = encoders.prompt_part(work())
            exact = part if exact is None else exact
            row["error"] = ((part - exact).norm() / exact.norm()).item()
            row["gpu_ms"] = gpu_ms(work)
            works[peer] = work
        except Exception as error:
            row["reason"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        print(kind, row, flush=True)
    times = {peer: [] for peer in works}
    for _ in range(options.rounds):
        for peer, work in works.items():
            times[peer].append(klein.wall_ms(work))
    for row in rows:
        row |= summary(times[row["peer"]]) if times.get(row["peer"]) else {}
    return {
        "name": kind,
        **{f"{row['peer'].replace('-', '_')}_ms": row.get("ms") for row in rows},
        "tokens": encoders.ids().shape[1],
        "rows": rows,
    }


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=9, help="timed prompts of each peer (default 9)")
    parser.add_argument("--small", action="store_true", help="small encoders: to try all paths, not to measure")
    parser.add_argument("--compiler", help=argparse.SUPPRESS)  # every benchmark takes it; nothing is compiled here
    parser.add_argument("--json", help="file to write the result to")
    return parser.parse_args()


def main():
    options = parse()
    import_comfyui()
    import folder_paths

    found = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        folder_paths.set_user_directory(folder)
        for kind in options.cases:
            found.append(measure(kind, options))
            result = save({"model": "random weights", "cases": found}, options.json)
            torch.cuda.empty_cache()
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
