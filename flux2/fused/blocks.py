"""FLUX.2's transformer blocks with fused elementwise kernels.

While such a model runs, each block's `forward` is a FusedBlock, so whoever calls core's block (core itself, another
pack's replacement of a block) calls the fused one, with the arguments that core gives it; the modules are as before
when the forward pass ends. Weights are not touched: linear layers are called as ComfyUI's modules, attention through
its attention function with whatever override the model carries. A block, or a call of one, that cannot be computed
exactly so is left to what was there before, and counted with the reason. What a block computes was read from
comfy/ldm/flux/layers.py (DoubleStreamBlock, SingleStreamBlock) of ComfyUI 0.30.
"""

from collections import Counter
from functools import partial

import torch

# looked into at each call: packs put their own attention there
from comfy.ldm.flux import layers as flux_layers, math as flux_math
from comfy.patcher_extension import WrappersMP

from ...attention.errors import UserError
from . import fp8_attention, kernels
from .kernels.formats import FP8_TENSOR
from .linear import Products, norm_weights
from .. import attention_slot
from ..module_forward import forwards_as
from ..parallel.attention import ShardedAttention

KEY = "flux2_fast_blocks"
EPS = 1e-6  # of core's LayerNorms, and the kernels' default


# --- the blocks ------------------------------------------------------------------------------------------------------


def double_block(block, products, img, txt, vec, pe, attn_mask, segment, options):
    """(img, txt) after a DoubleStreamBlock, both written in place.

    img, txt: (B, S, N). segment: (start, end) of the image tokens that have the modulation's second row. options: the
    transformer_options of the call.
    """
    from .kernels.norm import add_gated, add_gated_norm_modulate, norm_modulate
    from .kernels.qkv import joint_qkv
    from .kernels.swiglu import swiglu

    (img_mod1, img_mod2), (txt_mod1, txt_mod2) = (block.img_mod(vec), block.txt_mod(vec)) if block.modulation else vec
    img_attn, txt_attn = block.img_attn, block.txt_attn
    to, product = products.input_format, products.product

    # what a product reads and writes is held by nobody else, and freed when the next operation has read it
    tokens = txt.shape[1] + img.shape[1]
    size = img_attn.norm.query_norm.weight.numel()
    attn = attention(
        partial(
            joint_qkv,
            product(txt_attn.qkv, norm_modulate(txt, txt_mod1.shift, txt_mod1.scale, to=to(txt_attn.qkv, txt))),
            product(
                img_attn.qkv,
                norm_modulate(img, img_mod1.shift, img_mod1.scale, segment=segment, to=to(img_attn.qkv, img)),
            ),
            block.num_heads,
            norm_weights(txt_attn.norm, txt),
            norm_weights(img_attn.norm, img),
        ),
        (img.shape[0], tokens, block.num_heads, size, img.dtype),
        pe,
        attn_mask,
        options,
        {"img_slice": [txt.shape[1], tokens]},
        own_choice(block),
        products.attention,
    )

    for x, span, proj, mlp, mod1, mod2, segment, finite in (
        # core mends float16 images once, after the last double block
        (img, (txt.shape[1], tokens), img_attn.proj, block.img_mlp, img_mod1, img_mod2, segment, False),
        (txt, (0, txt.shape[1]), txt_attn.proj, block.txt_mlp, txt_mod1, txt_mod2, (0, 0), True),
    ):
        hidden = product(proj, of_tokens(attn, *span, products, proj))
        hidden = add_gated_norm_modulate(
            x, hidden, mod1.gate, mod2.shift, mod2.scale, segment=segment, to=to(mlp[0], x)
        )
        hidden = product(mlp[0], hidden)
        hidden = swiglu(hidden, to=to(mlp[2], x))
        hidden = product(mlp[2], hidden)
        add_gated(x, hidden, mod2.gate, segment=segment, finite=finite and x.dtype == torch.float16)
    return img, txt


def single_block(block, products, x, vec, pe, attn_mask, segment, options):
    """x (B, S, N), text and image joined, after a SingleStreamBlock; written in place. Arguments as of double_block."""
    from .kernels.norm import add_gated, norm_modulate
    from .kernels.qkv import single_qkv
    from .kernels.swiglu import swiglu

    mod = block.modulation(vec)[0] if block.modulation else vec
    to, product = products.input_format, products.product

    both = norm_modulate(x, mod.shift, mod.scale, segment=segment, to=to(block.linear1, x))
    both = product(block.linear1, both)
    qkv = partial(single_qkv, both, block.num_heads, norm_weights(block.norm, x))
    shape = (*x.shape[:2], block.num_heads, block.norm.query_norm.weight.numel(), x.dtype)
    attn = attention(qkv, shape, pe, attn_mask, options, {}, own_choice(block), products.attention)
    del qkv
    hidden = swiglu(both[..., 3 * block.hidden_size :], attn, to=to(block.linear2, x))
    del both, attn  # the largest tensors of a step: gone before the product's output is allocated
    hidden = product(block.linear2, hidden)
    return add_gated(x, hidden, mod.gate, segment=segment, finite=x.dtype == torch.float16)


def of_tokens(attn, start, stop, products, proj):
    """Attention (B, stop - start, H*D) of some tokens as the input of a product: a tensor or a Quantised. attn: what
    `attention` gives.
    """
    if torch.is_tensor(attn):
        return attn[:, start:stop]
    from .kernels.attention_output import attention_output

    to = products.input_format(proj, attn.data)
    return attention_output(attn, start, stop, to=to if to is not None and to.kind == FP8_TENSOR else None)


def patched(options):
    """Whether patches want q and k, which they get normalised and not yet rotated, as in core's block."""
    return "attn1_patch" in options.get("patches", {})


def attention(qkv, shape, pe, mask, options, extra, own, fp8=None):
    """Attention (B, S, H*D), through core's attention function and the patches around it.

    qkv(pe or None, place=None, fp8=None): the kernel that makes q, k, v (B, S, H, D), rotated where it gets pe. Patches
    get them not rotated; core rotates them then. shape: (B, S, H, D, dtype). own: the block's own_choice. On several
    GPUs the kernel can write them straight into the memory of the GPU that computes each head. fp8: the model's
    Fp8Attention, or None; with it the kernel can write them in fp8, and the result can be an
    attention.backends.cudnn_fp8.Raw.
    """
    patches, extra, sharded = options.get("patches", {}), {**options, **extra}, options.get(attention_slot.SLOT)
    if isinstance(sharded, ShardedAttention) and not patches.keys() & {"attn1_patch", "attn1_output_patch"}:
        write = partial(qkv, pe)
        attn = sharded.attend_written(
            lambda place: write(place=place),
            flux_math.optimized_attention,
            *shape,
            mask=mask,
            transformer_options=options,
            _inside_attn_wrapper=True,  # as core's wrapper says it: the function is not to look into the slot again
        )
        if attn is not None:
            return attn
    fp8 = None if patches.keys() & {"attn1_patch", "attn1_output_patch"} or mask is not None or pe is None else fp8
    raw = fp8 and fp8.written_call(qkv, shape, pe, options)
    if raw:
        return raw
    q, k, v = qkv(None if patched(options) else pe)
    del qkv  # and with it the products' outputs, which nobody else holds
    raw = fp8 and fp8.first_call(q, k, v, options)
    if raw:
        return raw
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if patched(options):
        for patch in patches["attn1_patch"]:
            out = patch(q, k, v, pe=pe, attn_mask=mask, extra_options=extra)
            q, k, v, pe, mask = (
                out.get(name, old) for name, old in zip(("q", "k", "v", "pe", "attn_mask"), (q, k, v, pe, mask))
            )
        attn = flux_layers.attention(q, k, v, pe=pe, mask=mask, transformer_options=options, **own)
    else:
        attn = flux_math.optimized_attention(
            q, k, v, q.shape[1], skip_reshape=True, mask=mask, transformer_options=options, **own
        )
    for patch in patches.get("attn1_output_patch", ()):
        attn = patch(attn, extra)
    return attn


def own_choice(block):
    """The arguments by which a block hands its own choice of attention on: cores after 0.33 keep one in each block."""
    return {"preferred_attention": block.comfy_attention} if hasattr(block, "comfy_attention") else {}


# --- in the place of core's ------------------------------------------------------------------------------------------

ARGUMENTS = {  # of core's blocks, in its order
    "double": ("img", "txt", "vec", "pe", "attn_mask", "modulation_dims_img", "modulation_dims_txt"),
    "single": ("x", "vec", "pe", "attn_mask", "modulation_dims"),
}


class FusedBlock:
    """What a block's `forward` is while its model runs. previous: what it was, for calls that cannot be fused; reason:
    why none can, or None.
    """

    def __init__(self, kind, block, previous, reason, log, products):
        self.kind, self.block, self.previous, self.reason = kind, block, previous, reason
        self.log, self.products = log, products

    def __call__(self, *args, transformer_options={}, **kwargs):
        given = {**dict.fromkeys(ARGUMENTS[self.kind]), **dict(zip(ARGUMENTS[self.kind], args)), **kwargs}
        reason = self.reason or uncomputable(self.kind, given, transformer_options)
        if reason:
            self.log.left[reason] += 1
            return self.previous(*args, transformer_options=transformer_options, **kwargs)
        self.log.fast[self.kind] += 1
        compute = {"double": double_block, "single": single_block}[self.kind]
        arguments = {name: value for name, value in given.items() if not name.startswith("modulation_dims")}
        with on_device(given["pe" if given["pe"] is not None else ARGUMENTS[self.kind][0]]):
            return compute(
                self.block, self.products, **arguments, segment=segment_of(given)[0], options=transformer_options
            )


def uncomputable(kind, given, options):
    """Why one call of a block cannot be fused, as a sentence; None when it can. given: what core gave it, by name."""
    others = sorted(set(given) - set(ARGUMENTS[kind]))
    if others:
        return f"core passes arguments that the fused blocks do not know: {', '.join(others)}"
    streams = [given["img"], given["txt"]] if kind == "double" else [given["x"]]
    x, tokens, pe = streams[0], sum(stream.shape[1] for stream in streams), given["pe"]
    if torch.is_grad_enabled() and x.requires_grad:
        return "a gradient is asked for"
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the model computes in {x.dtype}"
    if any(stream.stride(-1) != 1 for stream in streams):
        return "the hidden states are not contiguous along their last axis"
    # where patches get q and k, core rotates
    if pe is not None and not patched(options):
        if pe.shape[2] != tokens or pe.dtype != torch.float32 or not pe[0].is_contiguous():
            return f"the rotary embedding is {pe.dtype} of {tuple(pe.shape)} for {tokens} tokens"
    return segment_of(given)[1] or kernels.unavailable(x.device)


def segment_of(given):
    """((start, end) of the tokens that the modulation's second row is for, reason). reason: why a call cannot be fused,
    or None.
    """
    if given.get("modulation_dims_txt"):
        return None, "tokens of the text have a modulation of their own"
    dims = given.get("modulation_dims_img") or given.get("modulation_dims") or ()
    second = [(start, end) for start, end, row in dims if row == 1]
    if len(second) > 1 or any(row > 1 for *_, row in dims):
        return None, "more than one segment of tokens has a modulation of its own"
    return (second[0] if second else (0, 0)), None


def on_device(tensor):
    """Triton launches on the current GPU: make that the tensor's."""
    return torch.cuda.device(tensor.device if tensor.device.type == "cuda" else -1)


def unsuitable(kind, block):
    """Why a block module cannot be fused, as a sentence; None when it can. Decided by what the module is made of."""
    if type(block).__module__ != flux_layers.__name__:
        return f"it is a {type(block).__name__} and none of ComfyUI's FLUX blocks"
    activation = block.mlp_act if kind == "single" else next(iter(list(block.img_mlp.children())[1:2]), None)
    if type(activation).__name__ != "SiLUActivation":
        return "its feed-forward part is not FLUX.2's SwiGLU"
    if kind == "single":
        qk_norms, norms = [block.norm], [block.pre_norm]
    else:
        qk_norms = [block.img_attn.norm, block.txt_attn.norm]
        norms = [block.img_norm1, block.img_norm2, block.txt_norm1, block.txt_norm2]
    size = qk_norms[0].query_norm.weight.numel()
    if size < 2 or size & (size - 1):
        return f"its heads have {size} elements, and the kernels want a power of two"
    if any(part.eps is not None for norm in qk_norms for part in (norm.query_norm, norm.key_norm)):
        return "its q and k norms have an epsilon of their own, and the kernels take PyTorch's default"
    if any(norm.eps != EPS for norm in norms):
        return f"its LayerNorms have another epsilon than {EPS}"
    return None


# --- a model ---------------------------------------------------------------------------------------------------------


class FusedLog:
    """How many block calls of the current sampling were computed by fused kernels, and why others were not."""

    def __init__(self, fp8=None, left=None, attention=None):
        self.fp8, self.all_left, self.attention = fp8, left, attention
        self.begin()

    def begin(self):
        self.fast, self.left = Counter(), Counter()
        self.unsuitable = {}  # {block: what `unsuitable` says of it}: asked once in a sampling, not in every step
        for part in (self.fp8, self.attention):
            if part:
                part.begin()

    def as_text(self):
        if self.all_left:
            return f"Fused blocks: none, ComfyUI's own run: {self.all_left}"
        fast, left = sum(self.fast.values()), sum(self.left.values())
        if not fast + left:
            return "Fused blocks: nothing has been sampled yet."
        lines = [f"Fused blocks: {fast} of {fast + left} block calls."]
        lines += [f"  left to ComfyUI's block, {count} calls: {reason}" for reason, count in self.left.most_common()]
        return "\n".join(lines + [part.as_text() for part in (self.fp8, self.attention) if part])

    def as_data(self):
        errors = {"fp8_errors": dict(self.fp8.errors)} if self.fp8 else {}
        reason = {"reason": self.all_left} if self.all_left else {}
        attention = {"fp8_attention": self.attention.as_data()} if self.attention else {}
        return {"fast": sum(self.fast.values()), "left": dict(self.left), **errors, **attention, **reason}


class Fusing:
    """The wrapper around a forward pass of a FLUX network, whichever copy of it runs: its blocks are FusedBlocks
    meanwhile. fp8: an fp8_rowwise.RowwiseFp8, or None. left: why all blocks are left to ComfyUI, or None.
    """

    def __init__(self, fp8=None, left=None):
        attention = fp8_attention.Fp8Attention() if fp8_attention.switched_on() else None
        self.fp8, self.left = fp8, left
        self.log, self.products = FusedLog(fp8, left, attention), Products(fp8, attention)
        # core's compile node would trace into it: the blocks run as they are, between graphs of what is around them
        self.untraced = torch.compiler.disable(self.run)

    def __call__(self, executor, *args, **kwargs):
        if self.left:
            return executor(*args, **kwargs)
        return self.untraced(executor, *args, **kwargs)

    def run(self, executor, *args, **kwargs):
        with forwards_as({block: self.fused(kind, block) for kind, block in blocks_of(executor.class_obj)}):
            return executor(*args, **kwargs)

    def fused(self, kind, block):
        """The FusedBlock of a block module as it is now."""
        inner = getattr(block, "_orig_mod", block)  # torch.compile wraps the modules that it is given
        if inner not in self.log.unsuitable:
            self.log.unsuitable[inner] = unsuitable(kind, inner)
        reason = self.log.unsuitable[inner] or changed_inside(inner)
        if self.fp8:
            self.fp8.know(inner)
        return FusedBlock(kind, inner, block.forward, reason, self.log, self.products)


def blocks_of(network):
    """[("double" or "single", block module)] of a network."""
    return [(kind, block) for kind in ARGUMENTS for block in getattr(network, f"{kind}_blocks", ())]


def changed_inside(block):
    """Why a block's own forward is not core's, or not all that a call of it does, as a sentence; None when it is."""
    foreign = getattr(block.forward, "__func__", None) is not type(block).forward
    # Compile Blocks puts its own there, and knows whether another's was there before
    if foreign and getattr(block.forward, "foreign", True):
        return "another pack has put a function of its own in the place of the block's"
    if flux_layers.attention is not flux_math.attention:
        return "another pack has put a function of its own in the place of FLUX's attention"
    return None


def install(model, fp8=None):
    """Compute the blocks of a MODEL clone by fused kernels, from its next forward pass on; installing twice replaces.

    fp8: an fp8_rowwise.RowwiseFp8 to compute the products of bf16 layers in fp8, or None. Returns {(kind, index): why
    a block stays core's}, a sentence each. Raises ValueError when no block can be fused, with the reasons.
    """
    reason = none_fusable(model)
    if reason:
        raise UserError(reason, "fast-blocks")
    put(model, Fusing(fp8))
    return unfusable(model)


def leave(model, reason):
    """Leave the blocks of a MODEL clone to ComfyUI, with a reason (a sentence) that the report repeats."""
    put(model, Fusing(left=reason))


def put(model, fusing):
    for kind, wrapper in ((WrappersMP.DIFFUSION_MODEL, fusing), (WrappersMP.OUTER_SAMPLE, counting(fusing.log))):
        model.remove_wrappers_with_key(kind, KEY)
        model.add_wrapper_with_key(kind, KEY, wrapper)


def unfusable(model):
    """{(kind, index): why the block cannot be fused}, a sentence each."""
    found, numbers = {}, Counter()
    for kind, block in blocks_of(model.model.diffusion_model):
        reason = unsuitable(kind, block)
        if reason:
            found[kind, numbers[kind]] = reason
        numbers[kind] += 1
    return found


def none_fusable(model):
    """Why no block of a MODEL can be fused, as a sentence; None when one can."""
    reasons = unfusable(model)
    if len(reasons) < len(blocks_of(model.model.diffusion_model)):
        return None
    why = "; ".join(sorted(set(reasons.values()))) or "it has no blocks of the FLUX kind"
    return f"None of this model's blocks can be fused: {why}."


def fusing_of(model):
    """The Fusing of a MODEL, or None."""
    return next(iter(model.wrappers.get(WrappersMP.DIFFUSION_MODEL, {}).get(KEY, ())), None)


def log_of(model):
    """The FusedLog of a MODEL that fused blocks were installed on, or None."""
    fusing = fusing_of(model)
    return fusing and fusing.log


def counting(log):
    """A sampler wrapper: a sampling begins with no calls counted."""

    def wrapper(executor, *args, **kwargs):
        log.begin()
        return executor(*args, **kwargs)

    return wrapper
