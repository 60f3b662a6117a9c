"""Llama's decode step with a KV cache, written by hand: the yardstick of what is derived from jaxinfer.models.llama.

The cache of a layer is K and V, float[slots, groups, time, dim]. Every slot writes its row at its own position, by the
same scatter as a derived step (a second row that is dropped keeps XLA:CPU from copying the cache; see its StateSpec).
"""

import math

import jax
import jax.numpy as jnp

from jaxinfer.models.llama import rope_frequencies


def empty_cache(config, slots: int, length: int, dtype=jnp.float32):
    """[(K, V)] of zeros, one pair a layer."""
    shape = (slots, config.num_key_value_heads, length, config.head_dim)
    return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_hidden_layers)]


def decode(config, params, tokens, positions, cache):
    """tokens, positions int32[slots] -> (logits [slots, vocab], cache). `params` as the Llama module's state."""
    return jax.vmap(lambda token, position, cache: _one(config, params, token, position, cache))(
        tokens, positions, cache
    )


def _one(config, params, token, position, cache):
    model = params["model"]
    x = jnp.take(model["embed_tokens"]["weight"], token[None, None], axis=0, mode="clip")
    angles = position.astype(jnp.float32) * rope_frequencies(config)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    after = []
    for number in range(config.num_hidden_layers):
        layer, (keys, values) = model["layers"][number], cache[number]
        mixed, kept = _attend(
            config, layer["self_attn"], _norm(config, layer["input_layernorm"], x), (cos, sin), position, keys, values
        )
        after.append(kept)
        x = x + mixed
        x = x + _mlp(layer["mlp"], _norm(config, layer["post_attention_layernorm"], x))
    x = _norm(config, model["norm"], x)
    head = model["embed_tokens"] if config.tie_word_embeddings else params["lm_head"]
    return _linear(head, x)[0, 0], after


def _attend(config, p, x, rotation, position, keys, values):
    groups, dim = config.num_key_value_heads, config.head_dim
    q = _rotate(_linear(p["q_proj"], x).reshape(1, 1, groups, -1, dim), *rotation)
    k = _rotate(_linear(p["k_proj"], x).reshape(1, 1, groups, dim), *rotation)
    v = _linear(p["v_proj"], x).reshape(1, 1, groups, dim)
    keys, values = _write(keys, k[0, 0], position), _write(values, v[0, 0], position)
    scores = jnp.einsum("gsd,grd->gsr", keys, q[0, 0]) * (1 / math.sqrt(dim))
    seen = jnp.arange(keys.shape[1]) <= position
    weights = jax.nn.softmax(jnp.where(seen[None, :, None], scores.astype(jnp.float32), -jnp.inf), axis=1)
    mixed = jnp.einsum("gsr,gsd->grd", weights.astype(x.dtype), values)
    return _linear(p["o_proj"], mixed.reshape(1, 1, -1)), (keys, values)


def _write(cache, row, position):
    """Puts a row [groups, dim] at its position."""
    rows = jnp.stack([row, row], axis=1)
    index = jnp.stack([position, jnp.int32(cache.shape[1])])
    return cache.at[:, index].set(rows, mode="drop")


def _linear(p, x):
    return jnp.einsum("...i,oi->...o", x, p["weight"])


def _norm(config, p, x):
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + config.rms_norm_eps)
    return (wide * scale).astype(x.dtype) * p["weight"]


def _rotate(x, cos, sin):
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _mlp(p, x):
    return _linear(p["down_proj"], jax.nn.silu(_linear(p["gate_proj"], x)) * _linear(p["up_proj"], x))
