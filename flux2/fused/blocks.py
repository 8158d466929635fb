"""FLUX.2's transformer blocks with fused elementwise kernels, as replacements at ComfyUI's block patch points.

The model's modules and weights are not touched: linear layers are called as ComfyUI's modules, attention through its
attention function with whatever override the model carries. A block, or a call of one, that cannot be computed exactly
so is left to core's block, and counted with the reason. What a block computes was read from comfy/ldm/flux/layers.py
(DoubleStreamBlock, SingleStreamBlock) of ComfyUI 0.30.
"""

from collections import Counter
from typing import NamedTuple

import torch

# looked into at each call: packs put their own attention there
from comfy.ldm.flux import layers as flux_layers, math as flux_math
from comfy.patcher_extension import WrappersMP

from . import kernels
from .handover import Handover, Reader, counted
from .linear import Products, norm_weight

KEY = "flux2_fast_blocks"
KINDS = ("double_block", "single_block")
WRAPPED = "another pack wraps core's block, and what it does there would be lost"


class FastLog:
    """How many block calls of the current sampling were computed by fused kernels, and why others were not."""

    def __init__(self, rows=None):
        self.rows = rows
        self.begin()

    def begin(self):
        self.fast, self.left = Counter(), Counter()
        if self.rows:
            self.rows.begin()

    def as_text(self):
        fast, left = sum(self.fast.values()), sum(self.left.values())
        if not fast + left:
            return "Fused blocks: nothing has been sampled yet."
        lines = [f"Fused blocks: {fast} of {fast + left} block calls."]
        lines += [f"  left to ComfyUI's block, {count} calls: {reason}" for reason, count in self.left.most_common()]
        return "\n".join(lines + ([self.rows.as_text()] if self.rows else []))

    def as_data(self):
        errors = {"fp8_errors": dict(self.rows.errors)} if self.rows else {}
        return {"fast": sum(self.fast.values()), "left": dict(self.left), **errors}


def install(model, rows=None):
    """Replace the blocks of a MODEL clone by fused ones; returns (FastLog, reasons). reasons: {block: why it stays
    core's}, a sentence each.

    rows: a row_fp8.RowFp8 to compute the products of bf16 layers in fp8, or None. Raises ValueError when no block can
    be replaced, with the reasons.
    """
    inner = model.model.diffusion_model
    log, tools, reasons, number = FastLog(rows), Tools(Products(rows), Handover()), {}, 0
    for kind, fast in zip(KINDS, (double_block, single_block)):
        after = None  # from the last block to the first, so that each knows what follows
        for index, block in reversed(list(enumerate(getattr(inner, f"{kind}s", ())))):
            reason = unsuitable(block, kind)
            if reason:
                reasons[(kind, index)], after = reason, None
                continue
            after = Replacement(fast, block, log, tools, replaced(model, kind, index), after)
            model.set_model_patch_replace(after, "dit", kind, index)
            number += 1
    if not number:
        raise ValueError(
            (
                "None of this model's blocks can be fused: "
                f"{'; '.join(sorted(set(reasons.values()))) or 'it has no blocks of the FLUX kind'}."
            )
        )
    model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, counting(log, tools.handover))
    model.model_options["transformer_options"][KEY] = log
    return log, reasons


def log_of(model):
    """The FastLog of a MODEL that fused blocks were installed on, or None."""
    return model.model_options.get("transformer_options", {}).get(KEY)


def counting(log, handover):
    """A sampler wrapper: a sampling begins with an empty log, and one that was cut short leaves no tensor behind."""

    def wrapper(executor, *args, **kwargs):
        log.begin()
        try:
            return executor(*args, **kwargs)
        finally:
            handover.forget()

    return wrapper


def replaced(model, kind, index):
    """What somebody else has put in the place of a block, or None. A replacement of ours is not kept: installing twice
    replaces.
    """
    before = (
        model.model_options.get("transformer_options", {}).get("patches_replace", {}).get("dit", {}).get((kind, index))
    )
    return before.before if isinstance(before, Replacement) else before


def unsuitable(block, kind):
    """Why a block module cannot be fused, as a sentence; None when it can. Decided once, on what the module is made
    of.
    """
    activation = (
        getattr(block, "mlp_act", None)
        if kind == "single_block"
        else next(iter(list(getattr(block, "img_mlp", ()))[1:2]), None)
    )
    norm = getattr(block, "norm", None) or getattr(getattr(block, "img_attn", None), "norm", None)
    if type(activation).__name__ != "SiLUActivation":
        return "its feed-forward part is not FLUX.2's SwiGLU"
    size = getattr(getattr(norm, "query_norm", None), "weight", torch.empty(0)).numel()
    if size < 2 or size & (size - 1):
        return f"its heads have {size} elements, and the kernels want a power of two"
    if any(part.eps is not None for part in (norm.query_norm, norm.key_norm, *text_norms(block))):
        return "its q and k norms have an epsilon of their own, and the kernels take PyTorch's default"
    return None


def text_norms(block):
    """The q and k norms of a double block's text side; none of a single block."""
    norm = getattr(getattr(block, "txt_attn", None), "norm", None)
    return (norm.query_norm, norm.key_norm) if norm else ()


class Replacement:
    """One block's entry in patches_replace["dit"]: the fused block, or core's where this call cannot be fused."""

    def __init__(self, fast, block, log, tools, before, after=None):
        self.fast, self.block, self.log, self.tools, self.before = fast, block, log, tools, before
        # what the next block reads is written ahead where nobody stands between, and both get the same modulation
        ahead = after is not None and not (before or after.before or block.modulation or after.block.modulation)
        self.readers = readers(after.block) if ahead else {}
        # whoever compiles the whole model would find nothing in the closure that original_call looks into
        self.untraced = torch.compiler.disable(Replacement.answer)

    def __call__(self, args, extra):
        return self.untraced(self, args, extra)

    def answer(self, args, extra):
        if self.before is None:
            return self.run(args, extra["original_block"])
        return self.before(args, {**extra, "original_block": lambda inner: self.run(inner, extra["original_block"])})

    def run(self, args, original):
        block, given = original_call(original)
        segment, reason = segment_of(given, args["vec"]) if type(block) is type(self.block) else (None, WRAPPED)
        reason = reason or changed_inside(block) or uncomputable(args)
        if reason:
            self.count(self.log.left, reason)
            return original(args)
        self.count(self.log.fast, self.fast.__name__)
        with on_device(args["img"]):
            return self.fast(
                block,
                args,
                segment,
                self.tools._replace(readers=self.readers)
                if block is self.block
                else Tools(self.tools.products, Handover()),
            )

    def cleanup(self):
        """ComfyUI calls it when a sampling ends, in the other ranks of a parallel one too."""
        self.tools.handover.forget()

    def count(self, counter, key):
        if not torch.compiler.is_compiling():
            counter[key] += 1


class Tools(NamedTuple):
    """What a fused block computes with. readers: of the next block, by the name of the hidden states; none where
    nothing
    is to be written ahead.
    """

    products: Products
    handover: Handover
    readers: dict = {}

    def finish(self, name, given, x, delta, gate, mod, **options):
        """x += delta * gate, the last step of a block; with what the next one reads where it may be written ahead,
        under
        `mod`.

        given: x as core gave it. Where x is an alias of it, somebody may yet write through the other one, uncounted:
        then only the next block writes ahead.
        """
        reader = self.readers.get(name)
        if reader is None or x is not given or reader.linear in self.handover.missed:
            self.handover.add(name, x, delta, gate, **options)
        else:
            self.handover.add_and_note(
                name, x, delta, gate, reader, mod, self.products.scale_for(reader.linear, x), **options
            )


def readers(block):
    """{name of the hidden states: Reader} of what a block reads first."""
    if hasattr(block, "pre_norm"):
        return {"joint": Reader(block.pre_norm, block.linear1)}
    return {
        name: Reader(getattr(block, f"{name}_norm1"), getattr(block, f"{name}_attn").qkv) for name in ("img", "txt")
    }


def original_call(original):
    """(the block module, the keyword arguments) that core's own call of a block would use; None for what it does not
    close
    over.

    Core hands a replacement neither: they are what its inner function closes over. One that closes over no block is not
    core's.
    """
    names = getattr(getattr(original, "__code__", None), "co_freevars", ())
    held = dict(zip(names, (cell.cell_contents for cell in getattr(original, "__closure__", None) or ())))
    block = held.get("block")
    # torch.compile wraps the modules that it is given
    return getattr(block, "_orig_mod", block), held.get("extra_kwargs")


def changed_inside(block):
    """Why a block's own forward is not core's, or not all that a call of it does, as a sentence; None when it is."""
    foreign = getattr(block.forward, "__func__", None) is not type(block).forward
    # Compile Blocks puts its own there, and knows whether another's was there before
    foreign = foreign and getattr(block.forward, "foreign", True)
    if foreign or type(block).forward.__module__ != flux_layers.__name__:
        return "another pack has put a function of its own in the place of the block's"
    if block._forward_hooks or block._forward_pre_hooks:
        return "another pack has a hook on the block"
    if flux_layers.attention is not flux_math.attention:
        return "another pack has put a function of its own in the place of FLUX's attention"
    return None


def segment_of(given, vec):
    """((start, end) of the tokens that the modulation's second row is for, reason). reason: why a call cannot be
    fused, or
    None.
    """
    if given is None:
        return (
            ((0, 0), None) if rows(vec) == 1 else (None, "core does not say what tokens the second modulation is for")
        )
    others = sorted(set(given) - {"modulation_dims_img", "modulation_dims"})
    if others:
        return None, f"core passes arguments that the fused blocks do not know: {', '.join(others)}"
    dims = given.get("modulation_dims_img") or given.get("modulation_dims") or ()
    second = [(start, end) for start, end, row in dims if row == 1]
    if len(second) > 1 or any(row > 1 for *_, row in dims):
        return None, "more than one segment of tokens has a modulation of its own"
    return (second[0] if second else (0, 0)), None


def rows(vec):
    """Rows of a block's modulation: 1, or 2 where some tokens have their own. vec: what core passes, a tensor or
    (nested)
    ModulationOut.
    """
    while isinstance(vec, tuple):
        vec = vec[0]
    vec = getattr(vec, "shift", vec)
    return vec.shape[1] if vec.ndim == 3 else 1


def uncomputable(args):
    """Why one call cannot be fused, as a sentence; None when it can. Looks at this call's tensors."""
    img, pe = args["img"], args.get("pe")
    tokens = img.shape[1] + (args["txt"].shape[1] if "txt" in args else 0)
    if torch.is_grad_enabled() and img.requires_grad:
        return "a gradient is asked for"
    if img.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the model computes in {img.dtype}"
    if any(args[name].stride(-1) != 1 for name in ("img", "txt") if name in args):
        return "the hidden states are not contiguous along their last axis"
    if pe is not None and (pe.shape[2] != tokens or pe.dtype != torch.float32 or not pe[0].is_contiguous()):
        return f"the rotary embedding is {pe.dtype} of {tuple(pe.shape)} for {tokens} tokens"
    return kernels.unavailable(img.device)


def on_device(tensor):
    """Triton launches on the current GPU: make that the tensor's."""
    return torch.cuda.device(tensor.device if tensor.device.type == "cuda" else -1)


def double_block(block, args, segment, tools=Tools(Products(), Handover())):
    """{"img", "txt"} after a DoubleStreamBlock. args as core gives them to a replacement: img, txt, vec, pe, attn_mask,
    transformer_options.
    """
    from .kernels.qkv import joint_qkv

    img, txt = (counted(args[name]) if name in tools.readers else args[name] for name in ("img", "txt"))
    image, text = (block.img_mod(args["vec"]), block.txt_mod(args["vec"])) if block.modulation else args["vec"]
    img_side, txt_side = (
        Side(block, "img", args["img"], img, image, segment, tools),
        Side(block, "txt", args["txt"], txt, text, (0, 0), tools),
    )
    weights = txt_side.norm_weights(), img_side.norm_weights()
    place = [txt.shape[1], txt.shape[1] + img.shape[1]]
    attn = attend(
        lambda pe: joint_qkv(txt_side.qkv(), img_side.qkv(), block.num_heads, *weights, pe), args, {"img_slice": place}
    )
    img_side.finish(
        attn[:, txt.shape[1] :], finite=False
    )  # core mends float16 images once, after the last double block
    txt_side.finish(attn[:, : txt.shape[1]], finite=txt.dtype == torch.float16)
    return {"img": img, "txt": txt}


class Side:
    """The image or the text side of a double block: what it computes before and after the joint attention."""

    def __init__(self, block, name, given, x, modulations, segment, tools):
        self.name, self.given, self.x, self.segment, (self.first, self.second), self.tools = (
            name,
            given,
            x,
            segment,
            modulations,
            tools,
        )
        self.attn, self.mlp = getattr(block, f"{name}_attn"), getattr(block, f"{name}_mlp")
        self.reader, self.norm2 = readers(block)[name], getattr(block, f"{name}_norm2")

    def norm_weights(self):
        return norm_weight(self.attn.norm.query_norm, self.x), norm_weight(self.attn.norm.key_norm, self.x)

    def qkv(self):
        return self.tools.products.product(
            self.attn.qkv,
            self.x,
            lambda scale: self.tools.handover.normed(
                self.name, self.x, self.reader, self.first, scale, segment=self.segment
            ),
            f"{self.name}_attn.qkv",
        )

    def finish(self, attn, finite):
        """Add what the attention output and the feed-forward part give to x, in place."""
        from .kernels.norm import add_gated_norm_modulate, norm_modulate
        from .kernels.swiglu import swiglu

        products, mod, options = self.tools.products, self.second, {"segment": self.segment, "eps": self.norm2.eps}
        projected = products.projection(self.attn.proj, attn, f"{self.name}_attn.proj")
        hidden = products.product(
            self.mlp[0],
            self.x,
            lambda scale: add_gated_norm_modulate(
                self.x, projected, self.first.gate, mod.shift, mod.scale, fp8_scale=scale, **options
            ),
            f"{self.name}_mlp.0",
            lambda scale: norm_modulate(self.x, mod.shift, mod.scale, fp8_scale=scale, **options),
        )
        out = products.product(self.mlp[2], self.x, lambda scale: swiglu(hidden, fp8_scale=scale), f"{self.name}_mlp.2")
        self.tools.finish(self.name, self.given, self.x, out, mod.gate, self.first, segment=self.segment, finite=finite)


def single_block(block, args, segment, tools=Tools(Products(), Handover())):
    """{"img"} after a SingleStreamBlock, where img is text and image joined."""
    from .kernels.qkv import single_qkv
    from .kernels.swiglu import swiglu

    products, x = tools.products, counted(args["img"]) if tools.readers else args["img"]
    mod = block.modulation(args["vec"])[0] if block.modulation else args["vec"]
    both = products.product(
        block.linear1,
        x,
        lambda scale: tools.handover.normed("joint", x, readers(block)["joint"], mod, scale, segment=segment),
        "linear1",
    )
    weights = norm_weight(block.norm.query_norm, x), norm_weight(block.norm.key_norm, x)
    attn = attend(lambda pe: single_qkv(both, block.num_heads, *weights, pe), args, {})
    given = products.input(
        block.linear2, x, lambda scale: swiglu(both[..., 3 * block.hidden_size :], attn, fp8_scale=scale), "linear2"
    )
    both = attn = None  # the largest tensors of a step: gone before the product's output is allocated
    out = products.apply(block.linear2, x, given, "linear2")
    tools.finish("joint", args["img"], x, out, mod.gate, mod, segment=segment, finite=x.dtype == torch.float16)
    return {"img": x}


def attend(heads, args, place):
    """Attention (B, S, H*D) of heads(pe) = (q, k, v) in BSHD, through core's attention function and its patches.

    A patch on q and k sees them normalised and not yet turned, as in core's block: then core turns them.
    """
    options, pe, mask = args["transformer_options"], args.get("pe"), args.get("attn_mask")
    patches, extra = options.get("patches", {}), {**options, **place}
    if "attn1_patch" in patches:
        q, k, v = (t.transpose(1, 2) for t in heads(None))
        for patch in patches["attn1_patch"]:
            out = patch(q, k, v, pe=pe, attn_mask=mask, extra_options=extra)
            q, k, v, pe, mask = (
                out.get(name, old) for name, old in zip(("q", "k", "v", "pe", "attn_mask"), (q, k, v, pe, mask))
            )
        attn = flux_layers.attention(q, k, v, pe=pe, mask=mask, transformer_options=options)
    else:
        q, k, v = (t.transpose(1, 2) for t in heads(pe))
        attn = flux_math.optimized_attention(
            q, k, v, q.shape[1], skip_reshape=True, mask=mask, transformer_options=options
        )
    for patch in patches.get("attn1_output_patch", ()):
        attn = patch(attn, extra)
    return attn
