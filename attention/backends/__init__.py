"""One file per library. attention/registry.py imports these files, when asked for a backend, and nothing else does."""
