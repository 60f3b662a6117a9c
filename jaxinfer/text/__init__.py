"""Tokenizers, streaming text out of tokens, and chat templates. Nothing here imports JAX."""
