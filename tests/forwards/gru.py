"""Two GRU layers (Cho et al. 2014, arXiv:1406.1078), each a `lax.scan` over time-major activations."""

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, HIDDEN, LAYERS = 37, 24, 28, 2


def make(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape, fan_in=1.0):
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(fan_in), jnp.float32)

    def layer(width):
        return {
            "w": normal(width, 3 * HIDDEN, fan_in=width),
            "u": normal(HIDDEN, 3 * HIDDEN, fan_in=HIDDEN),
            "b": normal(3 * HIDDEN, fan_in=10),
        }

    params = {
        "embed": normal(VOCAB, WIDTH),
        "layers": [layer(WIDTH if i == 0 else HIDDEN) for i in range(LAYERS)],
        "head": normal(HIDDEN, VOCAB, fan_in=HIDDEN / 4),
    }
    return forward, params


def gru(p, x):
    """x [time, batch, width] -> [time, batch, HIDDEN]"""

    def cell(h, x):
        rx, zx, nx = jnp.split(x @ p["w"] + p["b"], 3, axis=-1)
        rh, zh, nh = jnp.split(h @ p["u"], 3, axis=-1)
        r, z = jax.nn.sigmoid(rx + rh), jax.nn.sigmoid(zx + zh)
        h = (1 - z) * jnp.tanh(nx + r * nh) + z * h
        return h, h

    return jax.lax.scan(cell, jnp.zeros((x.shape[1], HIDDEN)), x)[1]


def forward(params, tokens):
    x = jnp.swapaxes(params["embed"][tokens], 0, 1)
    for p in params["layers"]:
        x = gru(p, x)
    return jnp.swapaxes(x, 0, 1) @ params["head"]
