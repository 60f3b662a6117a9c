"""Multi-head latent attention, DeepSeek-V2 (arXiv:2405.04434): keys and values expanded from one normed latent, a
rotary key of its own shared by all heads, queries through a latent too."""

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, HEADS, LAYERS = 53, 48, 4, 2
LATENT, QUERY_LATENT, NOPE, ROPE, VALUE = 16, 24, 8, 4, 10


def make(seed=0):
    rng = np.random.default_rng(seed)

    def dense(n, *out):
        return jnp.asarray(rng.standard_normal((n, *out)) / np.sqrt(n), jnp.float32)

    def scale(n):
        return jnp.asarray(1 + 0.1 * rng.standard_normal(n), jnp.float32)

    def layer():
        return {
            "attn_norm": scale(WIDTH),
            "wq_a": dense(WIDTH, QUERY_LATENT),
            "q_norm": scale(QUERY_LATENT),
            "wq_b": dense(QUERY_LATENT, HEADS, NOPE + ROPE),
            "wkv_a": dense(WIDTH, LATENT + ROPE),
            "kv_norm": scale(LATENT),
            "wkv_b": dense(LATENT, HEADS, NOPE + VALUE),
            "wo": dense(HEADS * VALUE, WIDTH),
            "ffn_norm": scale(WIDTH),
            "w1": dense(WIDTH, 64),
            "w2": dense(64, WIDTH),
            "w3": dense(WIDTH, 64),
        }

    params = {
        "embed": jnp.asarray(rng.standard_normal((VOCAB, WIDTH)), jnp.float32),
        "layers": [layer() for _ in range(LAYERS)],
        "norm": scale(WIDTH),
        "head": dense(WIDTH, VOCAB),
    }
    return forward, params


def norm(x, weight):
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * weight


def rope(x):
    """x [batch, time, heads, ROPE], neighbours paired."""
    angles = jnp.arange(x.shape[1])[:, None] / 10_000 ** (jnp.arange(0, ROPE, 2) / ROPE)
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    a, b = x[..., 0::2], x[..., 1::2]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)


def latent_attention(p, x):
    batch, time, _ = x.shape
    q = jnp.einsum("btl,lhd->bthd", norm(x @ p["wq_a"], p["q_norm"]), p["wq_b"])
    q = jnp.concatenate([q[..., :NOPE], rope(q[..., NOPE:])], axis=-1)
    compressed, k_rope = jnp.split(x @ p["wkv_a"], [LATENT], axis=-1)
    kv = jnp.einsum("btl,lhd->bthd", norm(compressed, p["kv_norm"]), p["wkv_b"])
    k_nope, v = jnp.split(kv, [NOPE], axis=-1)
    k_rope = jnp.broadcast_to(rope(k_rope[:, :, None, :]), (batch, time, HEADS, ROPE))
    k = jnp.concatenate([k_nope, k_rope], axis=-1)
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(NOPE + ROPE)
    scores += jnp.triu(jnp.full((time, time), -jnp.inf), 1)
    mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, axis=-1), v)
    return mixed.reshape(batch, time, HEADS * VALUE) @ p["wo"]


def forward(params, tokens):
    x = params["embed"][tokens]
    for p in params["layers"]:
        x = x + latent_attention(p, norm(x, p["attn_norm"]))
        h = norm(x, p["ffn_norm"])
        x = x + (jax.nn.silu(h @ p["w1"]) * (h @ p["w3"])) @ p["w2"]
    return norm(x, params["norm"]) @ params["head"]
