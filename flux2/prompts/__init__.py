"""From a prompt to CONDITIONING: texts, tokens, encoding, and the cache on disk."""
