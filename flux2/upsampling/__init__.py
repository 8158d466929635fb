"""Mistral 3 writes a better prompt, from text and images."""
