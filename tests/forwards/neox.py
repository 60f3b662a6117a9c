"""GPT-NeoX (Black et al. 2022, arXiv:2204.06745): attention and MLP in parallel, rotary positions on a quarter of each
head, Q, K and V interleaved by head in one projection, biases everywhere."""

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, HEADS, LAYERS, ROTARY = 57, 48, 3, 2, 4


def make(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return jnp.asarray(rng.standard_normal(shape) * scale, jnp.float32)

    def linear(n, m):
        return {"w": normal(n, m, scale=n**-0.5), "b": normal(m, scale=0.1)}

    def norm():
        return {"scale": 1 + normal(WIDTH, scale=0.1), "bias": normal(WIDTH, scale=0.1)}

    def layer():
        return {
            "input_layernorm": norm(),
            "post_attention_layernorm": norm(),
            "query_key_value": linear(WIDTH, 3 * WIDTH),
            "dense": linear(WIDTH, WIDTH),
            "dense_h_to_4h": linear(WIDTH, 4 * WIDTH),
            "dense_4h_to_h": linear(4 * WIDTH, WIDTH),
        }

    params = {
        "embed_in": normal(VOCAB, WIDTH),
        "layers": [layer() for _ in range(LAYERS)],
        "final_layer_norm": norm(),
        "embed_out": normal(WIDTH, VOCAB, scale=WIDTH**-0.5),
    }
    return forward, params


def linear(x, p):
    return jnp.dot(x, p["w"]) + p["b"]


def layer_norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def rotate_half(x):
    return jnp.concatenate([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], axis=-1)


def attention(x, p):
    batch, time, _ = x.shape
    qkv = linear(x, p["query_key_value"]).reshape(batch, time, HEADS, 3 * WIDTH // HEADS)
    q, k, v = jnp.split(qkv.transpose(0, 2, 1, 3), 3, axis=-1)
    inv_freq = 1.0 / 10_000 ** (jnp.arange(0, ROTARY, 2) / ROTARY)
    freqs = jnp.einsum("i,j->ij", jnp.arange(time, dtype=jnp.float32), inv_freq)
    emb = jnp.concatenate([freqs, freqs], axis=-1)
    cos, sin = jnp.cos(emb)[None, None], jnp.sin(emb)[None, None]

    def partly_rotated(a):
        rot, rest = a[..., :ROTARY], a[..., ROTARY:]
        return jnp.concatenate([rot * cos + rotate_half(rot) * sin, rest], axis=-1)

    scores = jnp.einsum("bhtd,bhsd->bhts", partly_rotated(q), partly_rotated(k)) / jnp.sqrt(q.shape[-1])
    causal = jnp.tril(jnp.ones((time, time), dtype=bool))[None, None]
    scores = jnp.where(causal, scores, jnp.finfo(scores.dtype).min)
    mixed = jax.nn.softmax(scores, axis=-1) @ v
    return linear(mixed.swapaxes(1, 2).reshape(batch, time, WIDTH), p["dense"])


def forward(params, tokens):
    x = params["embed_in"][tokens]
    for p in params["layers"]:
        hidden = jax.nn.gelu(
            linear(layer_norm(x, p["post_attention_layernorm"]), p["dense_h_to_4h"]), approximate=False
        )
        x = x + attention(layer_norm(x, p["input_layernorm"]), p) + linear(hidden, p["dense_4h_to_h"])
    return layer_norm(x, params["final_layer_norm"]) @ params["embed_out"]
