"""RetNet (Sun et al. 2023, arXiv:2307.08621) in its parallel form: (Q K^T * D) V with D the powers of each head's
decay, rows of D scaled to unit length, rotated q and k, a norm of each head's output and a swish gate."""

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, HEADS, KEY, VALUE, LAYERS = 53, 32, 2, 8, 16, 2


def make(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape, fan_in=1.0):
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(fan_in), jnp.float32)

    def layer():
        return {
            "q": normal(WIDTH, HEADS, KEY, fan_in=WIDTH),
            "k": normal(WIDTH, HEADS, KEY, fan_in=WIDTH),
            "v": normal(WIDTH, HEADS, VALUE, fan_in=WIDTH),
            "gate": normal(WIDTH, HEADS * VALUE, fan_in=WIDTH),
            "out": normal(HEADS * VALUE, WIDTH, fan_in=WIDTH),
            "up": normal(WIDTH, 2 * WIDTH, fan_in=WIDTH),
            "down": normal(2 * WIDTH, WIDTH, fan_in=2 * WIDTH),
        }

    return forward, {"embed": normal(VOCAB, WIDTH), "layers": [layer() for _ in range(LAYERS)]}


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)


def rotated(x):
    """x [batch, heads, time, KEY]"""
    theta = 1.0 / 10_000 ** jnp.linspace(0, 1, KEY // 2)
    angle = jnp.repeat(jnp.arange(x.shape[2])[:, None] * theta, 2, axis=-1)
    swapped = jnp.stack([-x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape)
    return x * jnp.cos(angle) + swapped * jnp.sin(angle)


def decay_mask(time):
    gamma = 1 - 2.0 ** (-2 - jnp.arange(HEADS, dtype=jnp.float32))
    n, m = jnp.arange(time)[:, None], jnp.arange(time)[None, :]
    mask = jnp.where(n >= m, gamma[:, None, None] ** (n - m), 0.0)
    mask = jnp.nan_to_num(mask)
    return mask / jnp.sqrt(mask.sum(axis=-1, keepdims=True))


def retention(p, x):
    batch, time, _ = x.shape
    q = rotated(jnp.einsum("btw,whd->bhtd", x, p["q"]))
    k = rotated(jnp.einsum("btw,whd->bhtd", x, p["k"])) * KEY**-0.5
    v = jnp.einsum("btw,whd->bhtd", x, p["v"])
    retained = (q @ k.swapaxes(-1, -2)) * decay_mask(time)
    y = layer_norm(retained @ v).transpose(0, 2, 1, 3).reshape(batch, time, HEADS * VALUE)
    return (jax.nn.swish(x @ p["gate"]) * y) @ p["out"]


def forward(params, tokens):
    x = params["embed"][tokens]
    for p in params["layers"]:
        x = x + retention(p, layer_norm(x))
        x = x + jax.nn.gelu(layer_norm(x) @ p["up"]) @ p["down"]
    return layer_norm(x) @ params["embed"].T / np.sqrt(WIDTH)
