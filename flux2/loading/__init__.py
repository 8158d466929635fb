"""From files to ComfyUI's MODEL, CLIP and VAE: building them, where their weights stay, and the encoder that is read
when it is needed.
"""
