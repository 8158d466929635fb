"""A whole picture by FLUX.2 klein (prompt, 4 steps, VAE) with 9B and 4B: ComfyUI's nodes, diffusers' pipeline, and this
pack.

  COMFYUI_PATH=... python benchmarks/klein.py [--cases klein-9b klein-4b] [--peers core diffusers ours ...] [--json
  FILE]

Model, text encoder (Qwen3 8B and 4B) and VAE at full size with random weights, all on the GPU: no loading is timed. The
diffusion model and the encoder are the same tensors for all; diffusers' VAE has weights of its own. Milliseconds are
wall clock from the prompt to the picture in host memory, medians over rounds that go around all peers. `working_gib` is
what a picture takes on the GPU beside the weights; `stages` says what encoding, sampling and decoding took in one more
picture, with waits in between.

core: the nodes of its klein template, called one after another as its executor does, with the encoder as ComfyUI loads
it (36 layers, float32 activations). ours: the same nodes with Select Attention and Fast Blocks, and encoder and VAE as
our loaders make them: 27 layers (FLUX.2 reads no others) in bf16, fused blocks. ours-fp8: the same, products in fp8.
ours-cudnn-fp8: the same, products in bf16 and attention by backend cudnn-fp8; ours-cudnn-fp8-fused: with
FLUX2_FP8_QKV=1. diffusers: Flux2KleinPipeline in bf16
with the fastest of its attention backends, its blocks eager and compiled; benchmarks/twins.py says how to get it.
--small tries every path on a CPU.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import types

import torch

from common import ROOT, import_pack, save, summary
from full_size import KLEIN_4B, KLEIN_9B, build, import_comfyui, step_inputs

import_pack()
sys.path.append(str(ROOT / "tests"))  # behind everything: it holds the generator of random VAEs
import peers  # noqa: E402
import twins  # noqa: E402
from step import gib, synchronise, time_ms, working_bytes  # noqa: E402

ENCODER = {"vocab_size": 151936, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8}
CASES = {
    "klein-9b": (KLEIN_9B, "qwen3-8b", {**ENCODER, "hidden_size": 4096, "intermediate_size": 12288}),
    "klein-4b": (KLEIN_4B, "qwen3-4b", {**ENCODER, "hidden_size": 2560, "intermediate_size": 9728}),
}
SMALL = (
    {"hidden_size": 256, "depth": 1, "depth_single_blocks": 2, "context_in_dim": 384, "guidance_embed": False},
    {
        **ENCODER,
        "num_hidden_layers": 29,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "hidden_size": 128,
        "intermediate_size": 128,
    },
)
PROMPT, STEPS, PIXELS, SEED = (
    "A red fox asleep on a stack of old books, morning light through a dusty window, film photograph",
    4,
    1024,
    42,
)
COLUMNS = {
    "core_ms": ("core",),
    "core_attention_ms": ("core-attention",),
    "core_compiled_ms": ("core-compiled",),
    "diffusers_ms": peers.DIFFUSERS,
    "diffusers_eager_ms": ("diffusers",),
    "diffusers_compiled_ms": ("diffusers-compiled",),
    "ours_ms": ("ours",),
    "ours_fp8_ms": ("ours-fp8",),
    "ours_cudnn_fp8_ms": ("ours-cudnn-fp8",),
    "ours_cudnn_fp8_fused_ms": ("ours-cudnn-fp8-fused",),
}
CHAT = (
    "{% for message in messages %}<|im_start|>user\n{{ message.content "
    "}}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n{% endfor %}"
)


# --- weights ---------------------------------------------------------------------------------------------------------


def encoder_weights(sizes, device, seed=2):
    """State dict of a Qwen3 with these sizes, random, in ComfyUI's keys, which are transformers' too."""
    from flux2_pack.flux2.checkpoints import keys

    generator, weights = torch.Generator(device).manual_seed(seed), {}
    shapes = {**keys.encoder_shapes(sizes, query_norms=True), "model.norm.weight": (sizes["hidden_size"],)}
    for name, shape in shapes.items():
        weight = torch.ones(shape, device=device, dtype=torch.bfloat16)
        weights[name] = weight.normal_(0.0, shape[-1] ** -0.5, generator=generator) if len(shape) > 1 else weight
    return weights


def clip_of(weights, kind, sizes, layers=None, precision="float32", tokenizer_data={}):
    """ComfyUI's CLIP over these weights. layers: how many our loader keeps; None: all, as core loads them. precision:
    one that encoder_precision knows, "bf16" or "float32".
    """
    import comfy.sd
    import comfy.text_encoders.flux
    from flux2_pack.flux2.loading import encoder_families, encoder_precision, load
    from flux2_pack.flux2.checkpoints import keys

    family = encoder_families.FAMILIES[kind]
    kept = {
        **sizes,
        **({"num_hidden_layers": layers, "final_norm": False} if layers else {"final_norm": True}),
        "lm_head": False,
    }
    if layers:
        weights = {name: value for name, value in weights.items() if keys.encoder_name(name, "model.", layers)}
    text_model = family.text_model(comfy.text_encoders.flux, comfy.sd.llama_detect([weights]))
    if precision == "bf16":
        text_model = encoder_precision.bf16_text_model(text_model, family)
    target = load.Target(text_model, family.tokenizer(comfy.text_encoders.flux))
    clip = comfy.sd.CLIP(
        target,
        tokenizer_data=tokenizer_data,
        parameters=sum(value.numel() for value in weights.values()),
        state_dict=[dict(weights)],
        model_options={f"{family.name}_model_config": kept},
        disable_dynamic=True,
    )
    share(clip.cond_stage_model, weights)
    return clip


def share(network, weights):
    """Let a loaded text encoder hold the tensors of `weights` themselves, so that both encoders and diffusers' take
    memory once.
    """
    for name, parameter in network.named_parameters():
        source = next((value for key, value in weights.items() if name.endswith(key)), None)
        if source is not None and source.dtype == parameter.dtype and source.shape == parameter.shape:
            parameter.data = source


def vae_of(fused_blocks="off"):
    """ComfyUI's VAE at full size with random weights; fused_blocks: the input of our loader."""
    import comfy.sd
    import small_models
    from flux2_pack.flux2.vae import prepare

    vae = comfy.sd.VAE(sd=small_models.vae(decoder_channels=128))
    if fused_blocks != "off":
        prepare.prepare(vae, fused_blocks)
    return vae


# --- ComfyUI ---------------------------------------------------------------------------------------------------------


class Nodes:
    """The nodes of core's klein template as functions, on one MODEL, CLIP and VAE; the picture is (1, H, W, 3) float32
    in host memory.
    """

    def __init__(self, model, clip, vae, pixels):
        from comfy_extras import nodes_custom_sampler, nodes_flux
        import nodes

        self.model, self.clip, self.vae, self.pixels = model, clip, vae, pixels
        self.core, self.custom, self.flux = nodes, nodes_custom_sampler, nodes_flux

    def encode(self):
        return self.core.CLIPTextEncode().encode(self.clip, PROMPT)[0]

    def sample(self, positive):
        custom = self.custom
        latent = self.flux.EmptyFlux2LatentImage.execute(self.pixels, self.pixels, 1).args[0]
        sigmas = self.flux.Flux2Scheduler.execute(STEPS, self.pixels, self.pixels).args[0]
        guider, sampler = (
            custom.BasicGuider.execute(self.model, positive).args[0],
            custom.KSamplerSelect.execute("euler").args[0],
        )
        return custom.SamplerCustomAdvanced.execute(
            custom.RandomNoise.execute(SEED).args[0], guider, sampler, sigmas, latent
        ).args[0]

    def decode(self, latent):
        return self.core.VAEDecode().decode(self.vae, latent)[0].cpu()

    def picture(self):
        return self.decode(self.sample(self.encode()))

    def stages(self):
        """{stage: milliseconds} of one picture."""
        found = {}
        positive = staged(found, "encode", self.encode)
        latent = staged(found, "sample", lambda: self.sample(positive))
        staged(found, "decode", lambda: self.decode(latent))
        return found


def staged(found, name, work):
    """The result of work(); its milliseconds, device included, go into `found`."""
    synchronise()
    start = time.perf_counter()
    result = work()
    synchronise()
    found[name] = round((time.perf_counter() - start) * 1e3, 2)
    return result


# --- diffusers -------------------------------------------------------------------------------------------------------


class Pipeline:
    """diffusers' Flux2KleinPipeline over the same weights; the picture is (1, H, W, 3) float32 in host memory."""

    def __init__(self, world, is_compiled):
        from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline

        arguments = {"fullgraph": True, "dynamic": True, "backend": world.compiler} if is_compiled else None
        transformer = twins.twin(
            world.setting.patcher, world.setting.sizes, world.setting.diffusers_attention, arguments
        )
        vae, scheduler = (
            AutoencoderKLFlux2().to(world.device, world.dtype).eval(),
            FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        )
        self.pipe = Flux2KleinPipeline(
            scheduler, vae, transformers_encoder(world), tokenizer(), transformer, is_distilled=True
        )
        self.pipe.set_progress_bar_config(disable=True)
        self.settings = {
            "width": world.pixels,
            "height": world.pixels,
            "num_inference_steps": STEPS,
            "guidance_scale": 1.0,
        }

    def picture(self):
        out = self.pipe(prompt=PROMPT, generator=torch.Generator().manual_seed(SEED), output_type="np", **self.settings)
        return torch.from_numpy(out.images)

    def stages(self):
        found = {}
        embeds, _ = staged(found, "encode", lambda: self.pipe.encode_prompt(PROMPT))
        staged(found, "sample", lambda: self.pipe(prompt_embeds=embeds, output_type="latent", **self.settings))
        return found


def transformers_encoder(world):
    """transformers' Qwen3 over the encoder's tensors."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    config = Qwen3Config(
        **world.encoder_sizes,
        head_dim=128,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
        dtype=world.dtype,
    )
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    model.load_state_dict({**world.encoder, "lm_head.weight": world.encoder["model.embed_tokens.weight"]}, assign=True)
    # its frequencies are no weight: they were made on the meta device
    model.model.rotary_emb = Qwen3RotaryEmbedding(config).to(world.device)
    return model.eval().requires_grad_(False)


def tokenizer():
    """Qwen's tokenizer as ComfyUI ships it, with klein's chat template."""
    from transformers import Qwen2TokenizerFast

    found = Qwen2TokenizerFast.from_pretrained(
        os.path.join(os.environ["COMFYUI_PATH"], "comfy", "text_encoders", "qwen25_tokenizer")
    )
    found.chat_template = CHAT
    return found


# --- one case --------------------------------------------------------------------------------------------------------


def world_of(name, options):
    """Everything that the peers of a case share."""
    sizes, kind, encoder_sizes = CASES[name]
    if options.small:
        sizes, encoder_sizes = SMALL
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    patcher = build(sizes, dtype)
    setting = peers.Setting(patcher, sizes, "bf16", options.attention, options.compiler)
    encoder = {key: value.to(dtype) for key, value in encoder_weights(encoder_sizes, patcher.load_device).items()}
    world = types.SimpleNamespace(
        setting=setting,
        device=patcher.load_device,
        dtype=dtype,
        encoder_sizes=encoder_sizes,
        compiler=options.compiler,
        encoder=encoder,
        kind=kind,
        clips={},
        vaes={},
        pixels=PIXELS // 16 if options.small else PIXELS,
    )
    if set(options.peers) & set(peers.DIFFUSERS):
        inputs = step_inputs(patcher, world.pixels)
        _, setting.diffusers_attention = peers.fastest_attention(
            setting, inputs, lambda work: (work(), time_ms(work))[1]
        )
    return world


def make(peer, world):
    """A Nodes or Pipeline."""
    if peer in peers.DIFFUSERS:
        return Pipeline(world, peer.endswith("compiled"))
    setting, ours = world.setting, peer in peers.OURS
    model = {
        "core": lambda: setting.patcher,
        "core-attention": lambda: peers.select(setting.patcher, setting.attention),
        "core-compiled": lambda: peers.compiled(peers.select(setting.patcher, setting.attention), setting.compiler),
        "ours": lambda: peers.fast(setting, "checkpoint"),
        "ours-fp8": lambda: peers.fast(setting, "fp8"),
        "ours-cudnn-fp8": lambda: peers.fast(setting, "checkpoint", "cudnn-fp8"),
        "ours-cudnn-fp8-fused": lambda: peers.fast_fp8_qkv(setting),
    }[peer]()
    from flux2_pack.flux2.loading import encoder_families, encoder_precision

    if ours not in world.clips:
        precision = encoder_precision.resolved("auto", world.device)
        layers = encoder_families.FAMILIES[world.kind].last_tap
        options = {"layers": layers, "precision": precision} if ours else {}
        world.clips[ours] = clip_of(world.encoder, world.kind, world.encoder_sizes, **options)
        world.vaes[ours] = vae_of("auto" if ours else "off")
    return Nodes(model, world.clips[ours], world.vaes[ours], world.pixels)


def first(peer, world):
    """(row, what makes pictures or None): the first pictures of a peer, its memory, and its stages."""
    row = {"peer": peer}
    try:
        start = time.perf_counter()
        maker = make(peer, world)
        maker.picture()
        row["first_s"] = round(time.perf_counter() - start, 2)
        working, picture = working_bytes(maker.picture)
        row["working_gib"] = gib(working)
        row |= {"stages": maker.stages(), "picture": list(picture.shape)}
        if not torch.isfinite(picture).all():
            raise ValueError("the picture has values that are not finite")
    except Exception as error:
        row["reason"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        maker = None
    said = (
        f"first {row['first_s']:.1f} s, {row['working_gib']} GiB beside the weights, stages {row['stages']}"
        if maker
        else f"not run. {row['reason']}"
    )
    print(f"{peer:<20} {said}", flush=True)
    return row, maker


def prompt_in_bf16(world):
    """What a prompt computed in bf16 in the place of float32 changes, as relative distances: of the conditioning, and
    of the latents after all steps, from the same noise by core's model.
    """
    from flux2_pack.flux2.loading import encoder_families

    layers, found = encoder_families.FAMILIES[world.kind].last_tap, {}
    for precision in ("float32", "bf16"):
        clip = clip_of(world.encoder, world.kind, world.encoder_sizes, layers, precision)
        nodes = Nodes(world.setting.patcher, clip, None, world.pixels)
        positive = nodes.encode()
        found[precision] = positive[0][0], nodes.sample(positive)["samples"]
    pairs = zip(("conditioning", "latents"), found["bf16"], found["float32"])
    return {name: peers.error_between(rounded, exact) for name, rounded, exact in pairs}


def wall_ms(work):
    synchronise()
    start = time.perf_counter()
    work()
    synchronise()
    return (time.perf_counter() - start) * 1e3


def measure(name, options, save_now):
    """What save_now(case as data), called after every round, gave at last."""
    world = world_of(name, options)
    made = [first(peer, world) for peer in options.peers]
    times = {row["peer"]: [] for row, maker in made if maker}
    changed = prompt_in_bf16(world)
    print(f"a prompt in bf16 in the place of float32 changes {changed}", flush=True)
    for _ in range(options.rounds):
        for row, maker in made:
            if maker:
                times[row["peer"]].append(wall_ms(maker.picture))
                row |= summary(times[row["peer"]])
        medians = {row["peer"]: row["ms"] for row, maker in made if maker}
        columns = {
            column: min((medians[peer] for peer in of if peer in medians), default=None)
            for column, of in COLUMNS.items()
        }
        saved = save_now(
            {
                "name": f"{name}-{world.pixels}",
                **columns,
                "steps": STEPS,
                "prompt_in_bf16": changed,
                "diffusers_attention": world.setting.diffusers_attention,
                "rows": [row for row, _ in made],
            }
        )
    return saved


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--peers", nargs="+", choices=peers.ALL, default=list(peers.ALL))
    parser.add_argument(
        "--attention", default="auto", help="what core-attention, core-compiled and ours select (default auto)"
    )
    parser.add_argument("--compiler", default="inductor", help="torch.compile backend (default inductor)")
    parser.add_argument("--rounds", type=int, default=7, help="timed pictures of each peer (default 7)")
    parser.add_argument(
        "--small", action="store_true", help="small models and pictures: to try all paths, not to measure"
    )
    parser.add_argument("--json", help="file to write the result to")
    return parser.parse_args(arguments)


def main():
    options = parse()
    import_comfyui()
    import comfy.utils
    import folder_paths

    comfy.utils.set_progress_bar_enabled(False)
    found = {}

    def save_now(case):
        found[case["name"]] = case
        return save(
            {"model": "FLUX.2 klein, random weights", "attention": options.attention, "cases": list(found.values())},
            options.json,
        )

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        folder_paths.set_user_directory(folder)
        for name in options.cases:
            last = measure(name, options, save_now)
            torch.cuda.empty_cache()
    print(table(found.values()))
    print(json.dumps(last), flush=True)
    os._exit(0) if torch.cuda.is_available() else None


def table(cases):
    """The cases as text."""
    lines = [f"{'case':<16}{'peer':<20}{'ms':>9}{'spread':>18}{'GiB':>9}  stages"]
    for case in cases:
        for row in case["rows"]:
            text = f"  {row.get('reason', '')}"
            if "ms" in row:
                text = (
                    f"{row['ms']:>9.1f}{row['min_ms']:>9.1f} to{row['max_ms']:>6.0f}{row['working_gib'] or '':>9}  "
                    f"{row['stages']}"
                )
            lines.append(f"{case['name']:<16}{row['peer']:<20}{text}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
