"""Models by others, as their packages ship them: nothing of them is written or changed here.

They need packages that this project doesn't: an environment of their own, without torch (transformers turns its Flax
classes off beside some versions of it):

    pip install transformers==4.55.4 optax recurrentgemma mamba2-jax dynamax

Each function gives a Program's arguments: (function, params, specs, vocabulary). The function is the lambda that a
user of the class would write around its call.
"""
