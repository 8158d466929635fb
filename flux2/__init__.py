"""What FLUX.2 is: its variants, its files and how they become ComfyUI's MODEL, CLIP and VAE. Only load.py imports ComfyUI."""
