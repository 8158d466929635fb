"""Fast Blocks and the fused VAE on the GPU that is here: Triton's kernels as they are compiled, against core's blocks,
and products that run in fp8 and int8.

On a CPU only the float32 cases can be tried, in Triton's interpreter: TRITON_INTERPRET=1 FLUX2_GPU_TESTS_ON=cpu
"""

import pytest
import torch

from devices import TOLERANCE, on_cpu
from fast_blocks_interpreted import LAUNCHES, counted, relative

SIZES = {"hidden_size": 512, "depth": 2, "depth_single_blocks": 4, "context_in_dim": 256, "guidance_embed": True}
# pixels of the image, number of references, tokens of the prompt: the second's lengths divide by nothing
SHAPES = {"text to image": (128, 0, 16), "odd lengths": (144, 0, 7), "two references": (128, 2, 16)}
pytestmark = pytest.mark.gpu
needs_gpu = pytest.mark.gpu(cpu=False)


@pytest.fixture(scope="module")
def tools(comfy):
    from types import SimpleNamespace

    import full_size
    from flux2_pack.flux2.fused import blocks, fp8_rowwise, kernels
    from flux2_pack.nodes.fast import Flux2FastBlocks

    reason = kernels.unavailable(torch.device("cpu" if on_cpu() else "cuda"))
    if reason:
        pytest.skip(reason)
    return SimpleNamespace(full_size=full_size, blocks=blocks, fp8=fp8_rowwise, node=Flux2FastBlocks)


@pytest.fixture(scope="module")
def flux2(tools):
    """{dtype: MODEL with the same random weights, rounded to it}."""
    return {dtype: tools.full_size.build(SIZES, dtype) for dtype in (torch.float32, torch.bfloat16)}


def inputs(tools, model, shape="text to image"):
    pixels, references, tokens = SHAPES[shape]
    return tools.full_size.step_inputs(model, pixels, references, reference_pixels=96, text_tokens=tokens)


@torch.inference_mode()
def step(tools, model, given):
    return tools.full_size.step(model, given).float()


def fused(tools, model, precision="checkpoint"):
    return tools.node.execute(model, precision).args[0]


def all_fused(tools, model):
    return tools.blocks.log_of(model).as_data() == {"fast": 6, "left": {}}


@pytest.mark.parametrize("shape", SHAPES)
def test_in_float32_a_step_equals_cores(tools, flux2, shape):
    model = flux2[torch.float32]
    given, fast = inputs(tools, model, shape), fused(tools, model)
    assert relative(step(tools, fast, given), step(tools, model, given)) <= TOLERANCE["float32"]
    assert all_fused(tools, fast)


@needs_gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_in_bfloat16_a_step_is_as_near_to_float32_as_cores(tools, flux2, shape):
    """Fused blocks round less often: half of core's error more would be a mistake of a kernel."""
    wide, model = flux2[torch.float32], flux2[torch.bfloat16]
    given, fast = inputs(tools, model, shape), fused(tools, model)
    exact = step(tools, wide, inputs(tools, wide, shape))
    core, ours = (relative(step(tools, one, given), exact) for one in (model, fast))
    assert ours <= 1.5 * core and core < 4 * TOLERANCE["bfloat16"] and all_fused(tools, fast)
    assert torch.equal(step(tools, fast, given), step(tools, fast, given))


def test_as_many_kernels_run_as_should(tools, flux2, monkeypatch):
    model, counts = fused(tools, flux2[torch.float32]), counted(monkeypatch)
    step(tools, model, inputs(tools, model))
    assert counts == LAUNCHES


@needs_gpu
def test_fp8_products_are_those_of_the_rounded_operands(tools):
    """torch._scaled_mm with a scale per row against float32 products of the same fp8 numbers, and of the plain ones."""
    import comfy.ops
    from flux2_pack.flux2.fused.kernels.quantise import quantise_rows

    fp8 = tools.fp8.RowwiseFp8()
    dtype = tools.fp8.fp8_dtype(torch.device("cuda"))
    if dtype is None:
        pytest.skip("this GPU has no fp8 matrix products")
    fp8.format = type(fp8.format)(tools.fp8.FP8_ROW, dtype=dtype)
    generator = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(2, 200, 1024, generator=generator, device="cuda", dtype=torch.bfloat16)
    linear = comfy.ops.manual_cast.Linear(1024, 512, bias=False, device="cuda", dtype=torch.bfloat16)
    linear.weight.data.normal_(0, 1 / 32, generator=generator)
    with torch.inference_mode():
        out = fp8.product(linear, x).float()
        rows, (weight, scale, _) = quantise_rows(x, fp8.format), fp8.weight(linear, x.device, x.dtype)
        rounded = (rows.data.float() * rows.scale) @ (weight.float() * scale.reshape(-1, 1)).T
    assert relative(out, rounded) <= TOLERANCE["bfloat16"]
    assert 0 < relative(out, x.float() @ linear.weight.float().T) <= TOLERANCE["fp8"]


@needs_gpu
def test_a_bf16_file_in_fp8_is_near_it_and_says_its_errors(tools, flux2):
    model = flux2[torch.bfloat16]
    if reason := tools.fp8.unavailable_for(model):
        pytest.skip(reason)
    given, fast = inputs(tools, model), fused(tools, model, "fp8")
    error = relative(step(tools, fast, given), step(tools, model, given))
    assert TOLERANCE["bfloat16"] / 10 < error <= TOLERANCE["fp8"] and tools.blocks.log_of(fast).as_data()["fast"] == 6
    measured = tools.blocks.log_of(fast).fp8.errors
    assert measured and all(0.01 < one < TOLERANCE["fp8"] for one in measured.values())


@needs_gpu
@pytest.mark.parametrize("maker, format", [("build_fp8", "fp8"), ("build_int8", "int8")])
def test_a_quantised_file_gives_what_core_gives(tools, maker, format):
    """Both quantise the inputs of the products; the kernels do it before the rounding to bf16, core after it."""
    model = getattr(tools.full_size, maker)(SIZES)
    given, fast = inputs(tools, model), fused(tools, model)
    expected = step(tools, model, given)
    assert 0 <= relative(step(tools, fast, given), expected) <= TOLERANCE[format] and all_fused(tools, fast)


@needs_gpu
def test_the_vaes_fused_blocks_give_what_comfyuis_give(comfy, small_models):
    from flux2_pack.flux2.loading import load

    latent = torch.randn(1, 128, 12, 10, generator=torch.Generator().manual_seed(4))
    plain, fast = (load.load_vae(small_models["vae"], fused_blocks=choice) for choice in ("off", "on"))
    assert "forward" in vars(fast.first_stage_model.decoder) and "forward" not in vars(plain.first_stage_model.decoder)
    expected, found = plain.decode(latent).float(), fast.decode(latent).float()
    assert expected.std() > 0 and relative(found, expected) <= TOLERANCE["bfloat16"]
