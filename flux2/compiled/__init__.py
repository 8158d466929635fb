"""FLUX.2's blocks under torch.compile."""
