"""LoRA and its relatives for FLUX.2: what the trainers call a layer, where that layer is in ComfyUI's model, and what
of a file was applied.
"""
