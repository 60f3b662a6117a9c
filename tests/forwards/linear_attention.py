"""Linear attention (Katharopoulos et al. 2020, arXiv:2006.16236): phi(q) times the cumulative sum of phi(k) v^T, over
the cumulative sum of phi(k)."""

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, HEADS, DIM, LAYERS = 41, 32, 4, 8, 2


def make(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape, fan_in=1.0):
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(fan_in), jnp.float32)

    def layer():
        return {
            "qkv": normal(WIDTH, 3 * HEADS * DIM, fan_in=WIDTH),
            "out": normal(HEADS * DIM, WIDTH, fan_in=WIDTH),
            "mlp": [normal(WIDTH, 64, fan_in=WIDTH), normal(64, WIDTH, fan_in=64)],
        }

    return forward, {
        "embed": normal(VOCAB, WIDTH),
        "position": normal(128, WIDTH),
        "layers": [layer() for _ in range(LAYERS)],
    }


def norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def phi(x):
    return jax.nn.elu(x) + 1


def causal_linear_attention(q, k, v):
    """[batch, time, heads, dim] each"""
    q, k = phi(q), phi(k)
    kv = jnp.cumsum(jnp.einsum("bthd,bthe->bthde", k, v), axis=1)
    z = 1 / (jnp.einsum("bthd,bthd->bth", q, jnp.cumsum(k, axis=1)) + 1e-6)
    return jnp.einsum("bthd,bthde,bth->bthe", q, kv, z)


def forward(params, tokens):
    batch, time = tokens.shape
    x = params["embed"][tokens] + params["position"][:time]
    for p in params["layers"]:
        q, k, v = jnp.moveaxis((norm(x) @ p["qkv"]).reshape(batch, time, 3, HEADS, DIM), 2, 0)
        x = x + causal_linear_attention(q, k, v).reshape(batch, time, -1) @ p["out"]
        x = x + jax.nn.gelu(norm(x) @ p["mlp"][0]) @ p["mlp"][1]
    return norm(x) @ params["embed"].T / np.sqrt(WIDTH)
