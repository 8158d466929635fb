"""A small FLUX.2 that draws: its pictures (scenes, captions), its three models, its training and its judge. See
docs/small-model.md.
"""
