"""A streaming speech detector over frames, not tokens: log-energy features through a causal convolution that strides
over nothing, an LSTM written out for ONE recording [time, bins], a probability for each frame."""

import jax
import jax.numpy as jnp
import numpy as np

BINS, CHANNELS, HIDDEN, WIDTH = 12, 16, 20, 5


def make(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape, fan_in=1.0):
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(fan_in), jnp.float32)

    params = {
        "conv": normal(CHANNELS, BINS, WIDTH, fan_in=BINS * WIDTH),
        "w_ih": normal(4 * HIDDEN, CHANNELS, fan_in=CHANNELS / 4),
        "w_hh": normal(4 * HIDDEN, HIDDEN, fan_in=HIDDEN),
        "bias": normal(4 * HIDDEN, fan_in=10),
        "out": normal(HIDDEN),
    }
    return forward, params


def forward(params, frames):
    x = jnp.log1p(jnp.abs(frames))
    x = jnp.pad(x.T, ((0, 0), (WIDTH - 1, 0)))[None]
    x = jax.nn.relu(jax.lax.conv(x, params["conv"], (1,), "VALID"))[0].T

    def cell(carry, x):
        h, c = carry
        i, f, g, o = jnp.split(params["w_ih"] @ x + params["w_hh"] @ h + params["bias"], 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    _, hidden = jax.lax.scan(cell, (jnp.zeros(HIDDEN), jnp.zeros(HIDDEN)), x)
    return jax.nn.sigmoid(hidden @ params["out"])
