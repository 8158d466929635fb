"""Attention of a text encoder (CLIP), chosen apart from the diffusion model's.

Core's language models take the attention function as an argument of every layer and give it no transformer_options, so
the diffusion model's override never reaches them. Forward hooks on this encoder's own layers put another function into
that argument; nothing outside this CLIP changes. The prompt is short and carries a causal mask in float32, so only
kernels that take masks and float32 can serve.
"""

import inspect

from ...attention.errors import UserError
from .. import error_links

ATTACHMENT = "flux2_attention"
ARGUMENT = "optimized_attention"


def install(clip, override):
    """Let `override` (called like core's attention functions, func first) compute the attention of every layer of a
    CLIP.

    Returns the number of layers. ValueError when the encoder has no layer that takes its attention as an argument.
    """
    layers = hook_layers(clip.cond_stage_model, override)
    if not layers:
        raise UserError(
            f"The attention of this text encoder ({type(clip.cond_stage_model).__name__}) cannot be chosen: its "
            "layers do not take it as an argument. "
            "Set 'attention kernel' to 'default'.",
            "attention-of-the-text-encoder",
        )
    layers[0].register_forward_pre_hook(lambda *_: override.dispatcher.begin_run(None) and None)
    clip.patcher.attachments[ATTACHMENT] = override.dispatcher
    clip.patcher.cached_patcher_init = (reload_with, (clip.patcher.cached_patcher_init, override))
    return len(layers)


def hook_layers(network, override):
    """Hook every attention layer of a network; returns the layers."""
    layers = attention_layers(network)
    for layer in layers:
        layer.register_forward_pre_hook(replace_argument(override), with_kwargs=True)
    return layers


def attention_layers(network):
    """The layers of a network that compute attention with a function that they are given."""
    return [
        m for m in network.modules() if hasattr(m, "o_proj") and ARGUMENT in inspect.signature(m.forward).parameters
    ]


def replace_argument(override):
    """A forward pre-hook that hands `override` to a layer in place of core's function, which it gets as its first
    argument.
    """
    linked = error_links.links()(override)  # the node in which it is shown is core's

    def hook(module, args, kwargs):
        original = kwargs[ARGUMENT]
        return args, {**kwargs, ARGUMENT: lambda *a, **kw: linked(original, *a, **kw)}

    return hook


def reload_with(original, override, disable_dynamic=False):
    """cached_patcher_init of a CLIP whose attention was chosen: the same weights again, with the same attention."""
    factory, arguments = original[:2]
    patcher = factory(*arguments, disable_dynamic=disable_dynamic)
    hook_layers(patcher.model, override)
    return patcher


def dispatcher_of(clip):
    """The dispatcher that computes a CLIP's attention, or None for core's own."""
    return clip.patcher.attachments.get(ATTACHMENT)
