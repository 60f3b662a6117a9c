"""Random weights for modules of libraries, without running their initialisers: those compile an operation for each
shape, seconds a module, and start so small that attention hardly matters."""

from typing import Any

import jax
import numpy as np


def like(shapes: Any, seed: int) -> Any:
    """A pytree of float32 arrays for one of ShapeDtypeStructs, of sizes that keep activations of the order of 1.

    Norms' scales and variances lie around 1, biases and means around 0, embeddings have deviation 1, and a matrix is
    scaled by the geometric mean of what goes in and what comes out.
    """
    random = np.random.default_rng(seed)

    def leaf(path: Any, struct: Any) -> jax.Array:
        name = jax.tree_util.keystr(path).lower()
        if "var" in name.rsplit("[", 1)[-1]:
            value = random.uniform(0.5, 1.5, struct.shape)
        elif ("embed" in name and len(struct.shape) == 2) or "position" in name:
            value = random.standard_normal(struct.shape)
        elif len(struct.shape) > 1:
            value = random.standard_normal(struct.shape) * np.prod(struct.shape) ** -0.25
        else:
            norm = any(word in name.rsplit("[", 1)[-1].rsplit(".", 1)[-1] for word in ("scale", "weight"))
            value = norm + 0.2 * random.standard_normal(struct.shape)
        return jax.numpy.asarray(value, struct.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def init(module: Any, *inputs: tuple[tuple[int, ...], str], seed: int) -> Any:
    """Variables of a linen module, or of a Haiku transform, for inputs of these (shape, dtype)."""
    structs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in inputs]
    return like(jax.eval_shape(module.init, jax.random.key(0), *structs), seed)


def nnx_module(kind: Any, seed: int) -> Any:
    """An NNX module made by kind(rngs)."""
    from flax import nnx

    graph, params, rest = nnx.split(nnx.eval_shape(lambda: kind(nnx.Rngs(0))), nnx.Param, ...)
    filled = like(nnx.to_pure_dict(params), seed)
    nnx.replace_by_pure_dict(params, filled)
    keys = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), rest)
    return nnx.merge(graph, params, keys)


def equinox_module(kind: Any, seed: int) -> tuple[Any, Any]:
    """(arrays, the rest) of an Equinox module made by kind(key)."""
    import equinox as eqx

    module = eqx.filter_eval_shape(kind, jax.random.key(0))
    shapes, static = eqx.partition(module, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    return like(shapes, seed), static
