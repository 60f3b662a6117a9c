"""The decoder stack of T5 (Raffel et al. 2019, arXiv:1910.10683) as a language model: learned biases for log-spaced
buckets of distance, made in the first layer and shared by all, no scaling of the scores, no bias terms."""

import math

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, HEADS, DIM, LAYERS, BUCKETS, FURTHEST = 49, 32, 4, 8, 2, 8, 20


def make(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return jnp.asarray(rng.standard_normal(shape) * scale, jnp.float32)

    def layer():
        return {
            "attention_norm": 1 + normal(WIDTH, scale=0.1),
            # T5 starts the query so small that scores need no scaling.
            "q": normal(WIDTH, HEADS * DIM, scale=(WIDTH * DIM) ** -0.5),
            "k": normal(WIDTH, HEADS * DIM, scale=WIDTH**-0.5),
            "v": normal(WIDTH, HEADS * DIM, scale=WIDTH**-0.5),
            "o": normal(HEADS * DIM, WIDTH, scale=WIDTH**-0.5),
            "mlp_norm": 1 + normal(WIDTH, scale=0.1),
            "wi": normal(WIDTH, 4 * WIDTH, scale=WIDTH**-0.5),
            "wo": normal(4 * WIDTH, WIDTH, scale=(4 * WIDTH) ** -0.5),
        }

    params = {
        "embed": normal(VOCAB, WIDTH),
        "relative_bias": normal(BUCKETS, HEADS),
        "layers": [layer() for _ in range(LAYERS)],
        "norm": 1 + normal(WIDTH, scale=0.1),
    }
    return forward, params


def relative_position_bucket(relative_position):
    """Bucket of a distance back: exact up to BUCKETS / 2, then by logarithm up to FURTHEST; what is ahead is 0."""
    n = jnp.maximum(-relative_position, 0)
    max_exact = BUCKETS // 2
    large = max_exact + (
        jnp.log(n.astype(jnp.float32) / max_exact + np.finfo(np.float32).eps)
        / math.log(FURTHEST / max_exact)
        * (BUCKETS - max_exact)
    ).astype(jnp.int32)
    return jnp.where(n < max_exact, n, jnp.minimum(large, BUCKETS - 1))


def norm(x, weight):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * weight


def forward(params, tokens):
    batch, time = tokens.shape
    context, memory = jnp.arange(time)[:, None], jnp.arange(time)[None, :]
    bias = params["relative_bias"][relative_position_bucket(memory - context)]
    bias = jnp.transpose(bias, (2, 0, 1))[None]
    bias = bias + jnp.where(memory <= context, 0.0, -1e9)[None, None]
    x = params["embed"][tokens]
    for p in params["layers"]:
        h = norm(x, p["attention_norm"])
        q, k, v = ((h @ p[name]).reshape(batch, time, HEADS, DIM) for name in "qkv")
        scores = jnp.einsum("bthd,bshd->bhts", q, k) + bias
        mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, axis=-1), v)
        x = x + mixed.reshape(batch, time, HEADS * DIM) @ p["o"]
        x = x + jax.nn.relu(norm(x, p["mlp_norm"]) @ p["wi"]) @ p["wo"]
    return (norm(x, params["norm"]) * WIDTH**-0.5) @ params["embed"].T
