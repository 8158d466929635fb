"""Attention backends for ComfyUI models: one signature, a registry that can say no, and a record of what ran.

Needs torch alone. ComfyUI is never imported here; kernel libraries are imported by their own file under backends/, when
chosen.

Layout letters used in every file: B batch, S sequence, H heads, D head size. Inside this package tensors are (B, S, H,
D).
"""
