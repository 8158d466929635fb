"""Where the time of a step goes: the parts of benchmarks/fast_check.py and of the benchmark node, each timed alone,
added up for a whole step of FLUX.2-dev.

Products are taken at the rate that fast_check measured for all tokens together; a double block runs them for text and
image apart. Standard library alone.
"""

HIDDEN, SINGLE, DOUBLE = 6144, 48, 8  # FLUX.2-dev: comfy/ldm/flux, flux2/checkpoints/variants.py
# (k, n): q, k, v with both halves of the feed-forward part; attention with its output
SINGLE_PRODUCTS = ((HIDDEN, 9 * HIDDEN), (4 * HIDDEN, HIDDEN))
DOUBLE_PRODUCTS = ((HIDDEN, 3 * HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 6 * HIDDEN), (3 * HIDDEN, HIDDEN))
SINGLE_KERNELS = ("norm_modulate", "single_qkv", "swiglu beside attention", "add_gated")
# text and image together
DOUBLE_KERNELS = ("norm_modulate", "joint_qkv", "add_gated_norm_modulate", "swiglu", "add_gated")
RATES = {"bf16": "cublas", "fp8": "fp8 tensor fast"}  # what ComfyUI's layers call
SIZES = {
    "bf16-1024": ("bf16", "1024x1024"),
    "bf16-2048": ("bf16", "2048x2048"),
    "fp8-1024": ("fp8", "1024x1024"),
    "fp8-2048": ("fp8", "2048x2048"),
}
HEADER = (
    "case",
    "products of single blocks",
    "of double blocks",
    "attention",
    "fused kernels",
    "sum of the parts",
    "measured step",
)


def product_ms(check, tokens, shapes, rate):
    """Milliseconds of one block's products: 2 * tokens * k * n operations each, at the rate in TFLOP/s that was
    measured for the shape.
    """
    measured = {(p["m"], p["k"], p["n"]): p[rate] for p in check["products"]}
    return sum(2e-9 * tokens * k * n / measured[tokens, k, n] for k, n in shapes)


def kernel_ms(check, tokens, names):
    """Milliseconds of one block's fused kernels, with the launch settings that were fastest."""
    times = [(k["kernel"], k["ms"]) for k in check["kernels"] if k["length"] == tokens]
    return sum(min(ms for name, ms in times if name == wanted) for wanted in names)


def attention_ms(speed, size):
    """Milliseconds of the fastest exact attention call of that size in a result of the benchmark node."""
    calls = [
        r["timing"]["ms"]
        for r in speed["rows"]
        if r["size"] == size and r["call"] != "step" and r["timing"] and r["exact"]
    ]
    return min(calls)


def row(case, check, speed):
    """The row of one case of benchmarks/step.py; HEADER names its columns."""
    kind, size = SIZES[case["name"]]
    tokens, rate = case["tokens"], RATES[kind]
    parts = [
        SINGLE * product_ms(check, tokens, SINGLE_PRODUCTS, rate),
        DOUBLE * product_ms(check, tokens, DOUBLE_PRODUCTS, rate),
        (SINGLE + DOUBLE) * attention_ms(speed, size),
        SINGLE * kernel_ms(check, tokens, SINGLE_KERNELS) + DOUBLE * kernel_ms(check, tokens, DOUBLE_KERNELS),
    ]
    return [f"`{case['name']}`", *(f"{ms:.1f}" for ms in (*parts, sum(parts), case["ours_ms"]))]


def gains(check):
    """(lowest, highest) speed of each other way to compute a bf16 product, relative to cuBLAS's own choice."""
    return {
        name: [edge(p[name] / p["cublas"] - 1 for p in check["products"]) for edge in (min, max)]
        for name in ("cublaslt", "quack")
    }


def notes(check, power):
    """What keeps a step from being faster, from the same results."""
    lt, quack = (" to ".join(f"{share:+.1%}" for share in edges) for edges in gains(check).values())
    busy = power["busy"]
    return (
        "Milliseconds. The parts were timed alone, one after the other, so their sum and the step differ by some "
        "percent. In a bf16 step all but the fused kernels is matrix products and attention, "
        f"and the card sets their pace: while steps run it draws {busy['median_watt']:.0f} W, is held by its power "
        f"limit in {busy['share_at_power_cap']:.0%} of the samples and runs at "
        f"{busy['median_sm_mhz']:.0f} MHz (`benchmarks/results/power-h200.json`; its highest clock is 1980). Tried "
        "for the products, on the twelve shapes of `benchmarks/results/fast-check-h200.json`, "
        f"against cuBLAS's own choice: cuBLASLt through PyTorch {lt}, quack-kernels {quack}; neither was taken."
    )
