"""The autoencoder's fast path: latents to pixels and back in channels-last memory with fused norms."""
