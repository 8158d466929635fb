"""Flux 2 Attention: FLUX.2 in ComfyUI with the attention kernel you choose, and proof of which one ran."""
from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
