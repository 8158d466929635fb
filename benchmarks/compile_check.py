"""torch.compile(fullgraph=True) of FLUX.2's blocks with every backend that runs on this machine: no graph breaks, same
output, still counted.

  COMFYUI_PATH=... python benchmarks/compile_check.py [--compiler inductor] [--json FILE]

A FLUX.2 of hidden size 512 with 2 double and 4 single blocks, two sequence lengths per backend with dynamic shapes.
Error: compiled against eager with the same backend, relative. On a machine without a GPU use --compiler aot_eager.
"""

import argparse

import torch

from common import import_pack, write
from full_size import build, import_comfyui, step, step_inputs

import_pack()
import_comfyui()
from flux2_pack.attention import registry  # noqa: E402
from flux2_pack.attention.dispatch import AttentionDispatcher  # noqa: E402
from flux2_pack.flux2 import attention_slot  # noqa: E402

SMALL = {"hidden_size": 512, "depth": 2, "depth_single_blocks": 4, "context_in_dim": 256, "guidance_embed": True}
PICTURES = (512, 640)


def compiled(patcher, compiler):
    """A clone whose blocks are compiled one by one without graph breaks, as core's compile node does for whole
    models.
    """
    from comfy_api.torch_helpers.torch_compile import set_torch_compile_wrapper

    clone = patcher.clone(disable_dynamic=True)
    keys = [f"diffusion_model.{kind}_blocks.{i}" for kind, n in attention_slot.block_kinds(patcher) for i in range(n)]
    set_torch_compile_wrapper(
        clone,
        backend=compiler,
        fullgraph=True,
        dynamic=True,
        keys=keys,
        options={"guard_filter_fn": lambda entries: ["transformer_options" not in e.name for e in entries]},
    )
    return clone


def check(patcher, slug, compiler):
    """One row: relative errors of compiled against eager at each size, and the calls that the log saw."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, dispatcher = patcher.clone(), AttentionDispatcher(slug)
    attention_slot.select(model, dispatcher)
    fast, errors = compiled(model, compiler), []
    for pixels in PICTURES:
        inputs = step_inputs(patcher, pixels)
        expected, out = step(model, inputs).float(), step(fast, inputs).float()
        errors.append(((out - expected).norm() / expected.norm()).item())
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return {"backend": slug, "errors": errors, "calls": dispatcher.log.current.calls, "graphs": graphs}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--compiler", default="inductor", help="torch.compile backend")
    parser.add_argument("--json", help="file to write the result to")
    options = parser.parse_args()
    with torch.inference_mode():
        patcher = build(SMALL, torch.bfloat16 if torch.cuda.is_available() else torch.float32)
        device, dtype, head_dim = attention_slot.attention_facts(patcher)
        slugs = [s for s in registry.ROWS if not registry.probe(s, device, dtype, head_dim)]
        rows = [check(patcher, slug, options.compiler) for slug in ["auto", *slugs]]
    for row in rows:
        print(
            (
                f"{row['backend']:<16} errors {', '.join(f'{e:.1e}' for e in row['errors'])}  {row['calls']} calls, "
                f"{row['graphs']} graphs"
            ),
            flush=True,
        )
    write({"compiler": options.compiler, "cases": rows}, options.json)


if __name__ == "__main__":
    main()
