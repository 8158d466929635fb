"""What FLUX.2 is: its variants, its files, how they become ComfyUI's MODEL, CLIP and VAE, and how prompts are read and
written.
"""
