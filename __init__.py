"""Flux 2 Attention: FLUX.2 in ComfyUI with the attention kernel you choose, and proof of which one ran."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
