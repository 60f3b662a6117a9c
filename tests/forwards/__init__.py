"""Forward passes written as their papers' authors would write them: no cache, no thought of serving.

Each module has `make(seed) -> (forward, params)` with forward(params, tokens) -> logits, and VOCAB. They run under
JAX's defaults (implicit rank promotion and all), as most users' code does.
"""
