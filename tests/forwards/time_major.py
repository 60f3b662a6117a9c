"""A GPT in Megatron's layout (Shoeybi et al. 2019, arXiv:1909.08053): activations [time, batch, width] throughout."""

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, HEADS, LAYERS = 47, 32, 4, 2


def make(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape, fan_in=1.0):
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(fan_in), jnp.float32)

    def layer():
        return {
            "qkv": normal(WIDTH, 3 * WIDTH, fan_in=WIDTH),
            "dense": normal(WIDTH, WIDTH, fan_in=WIDTH),
            "up": normal(WIDTH, 4 * WIDTH, fan_in=WIDTH),
            "down": normal(4 * WIDTH, WIDTH, fan_in=4 * WIDTH),
        }

    return forward, {
        "word": normal(VOCAB, WIDTH),
        "position": normal(128, WIDTH),
        "layers": [layer() for _ in range(LAYERS)],
    }


def norm(x):
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)


def attention(p, x):
    time, batch, _ = x.shape
    mixed = (x @ p["qkv"]).reshape(time, batch, HEADS, 3 * WIDTH // HEADS)
    query, key, value = jnp.split(mixed, 3, axis=-1)
    query, key, value = (a.reshape(time, batch * HEADS, WIDTH // HEADS) for a in (query, key, value))
    scores = jnp.einsum("tnd,snd->nts", query, key).reshape(batch, HEADS, time, time) / np.sqrt(WIDTH // HEADS)
    hidden = jnp.logical_not(jnp.tril(jnp.ones((1, 1, time, time), bool)))
    weights = jax.nn.softmax(jnp.where(hidden, -10_000.0, scores), -1).reshape(batch * HEADS, time, time)
    context = jnp.matmul(weights, value.transpose(1, 0, 2)).reshape(batch, HEADS, time, -1)
    return context.transpose(2, 0, 1, 3).reshape(time, batch, WIDTH) @ p["dense"]


def forward(params, tokens):
    x = params["word"][tokens] + params["position"][: tokens.shape[1]][None]
    x = x.transpose(1, 0, 2)
    for p in params["layers"]:
        x = x + attention(p, norm(x))
        x = x + jax.nn.gelu(norm(x) @ p["up"]) @ p["down"]
    return (norm(x) @ params["word"].T).transpose(1, 0, 2) / np.sqrt(WIDTH)
