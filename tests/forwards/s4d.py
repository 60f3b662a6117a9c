"""S4D (Gu et al. 2022, arXiv:2206.11893) in its convolutional form: the kernel of a diagonal state space model by a
Vandermonde product, applied by FFT."""

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, STATE, LAYERS = 37, 24, 8, 2


def make(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape, fan_in=1.0):
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(fan_in), jnp.float32)

    def layer():
        return {
            "log_dt": jnp.asarray(rng.uniform(np.log(0.02), np.log(0.3), WIDTH), jnp.float32),
            "C": normal(WIDTH, STATE, 2),
            "log_A_real": jnp.log(0.5 * jnp.ones((WIDTH, STATE))),
            "A_imag": np.pi * jnp.tile(jnp.arange(STATE, dtype=jnp.float32), (WIDTH, 1)),
            "D": normal(WIDTH),
            "out": normal(WIDTH, 2 * WIDTH, fan_in=WIDTH),
        }

    return forward, {"embed": normal(VOCAB, WIDTH), "layers": [layer() for _ in range(LAYERS)]}


def kernel(p, length):
    dt = jnp.exp(p["log_dt"])
    c = p["C"][..., 0] + 1j * p["C"][..., 1]
    a = -jnp.exp(p["log_A_real"]) + 1j * p["A_imag"]
    dt_a = a * dt[:, None]
    powers = jnp.exp(dt_a[:, :, None] * jnp.arange(length))
    c = c * (jnp.exp(dt_a) - 1.0) / a
    return 2 * jnp.einsum("hn,hnl->hl", c, powers).real


def s4d(p, u):
    """u [batch, WIDTH, time]"""
    length = u.shape[-1]
    k_f = jnp.fft.rfft(kernel(p, length), n=2 * length)
    u_f = jnp.fft.rfft(u, n=2 * length)
    y = jnp.fft.irfft(u_f * k_f, n=2 * length)[..., :length]
    return jax.nn.gelu(y + u * p["D"][:, None])


def forward(params, tokens):
    x = params["embed"][tokens].swapaxes(1, 2)
    for p in params["layers"]:
        a, b = jnp.split(jnp.einsum("bht,hg->bgt", s4d(p, x), p["out"]), 2, axis=1)
        x = x + a * jax.nn.sigmoid(b)
    return jnp.einsum("bht,vh->btv", x, params["embed"]) / np.sqrt(WIDTH)
