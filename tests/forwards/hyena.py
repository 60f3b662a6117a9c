"""Hyena (Poli et al. 2023, arXiv:2302.10866), order 2: three projections through a short convolution, then twice a long
convolution and a gate; the filters are an MLP of position under a decaying window, the convolutions FFTs padded to
2 T."""

import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, ORDER, SHORT, FEATURES, CONTEXT = 41, 24, 2, 3, 9, 128


def make(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape, fan_in=1.0):
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(fan_in), jnp.float32)

    params = {
        "embed": normal(VOCAB, WIDTH),
        "in_proj": normal(WIDTH, (ORDER + 1) * WIDTH, fan_in=WIDTH),
        "short": normal(SHORT, (ORDER + 1) * WIDTH, fan_in=SHORT),
        "filter": [normal(FEATURES, 16, fan_in=FEATURES), normal(16, ORDER * WIDTH, fan_in=16)],
        "frequency": 1 + 10 * jnp.abs(normal(16)),
        "decay": jnp.asarray(np.linspace(3, 30, WIDTH), jnp.float32),
        "bias": normal(ORDER, WIDTH),
        "out_proj": normal(WIDTH, WIDTH, fan_in=WIDTH),
    }
    return forward, params


def implicit_filters(p, length):
    """[ORDER, length, WIDTH]"""
    t = jnp.arange(length)[:, None] / CONTEXT
    bands = jnp.linspace(1e-4, (FEATURES - 1) / 2 - 1, (FEATURES - 1) // 2)
    z = jnp.exp(-1j * 2 * jnp.pi * t * bands)
    features = jnp.concatenate([t, z.real, z.imag], axis=-1)
    h = jnp.sin(p["frequency"] * (features @ p["filter"][0])) @ p["filter"][1]
    h = h.reshape(length, ORDER, WIDTH) * jnp.exp(-p["decay"] * t)[:, None, :]
    return jnp.moveaxis(h, 1, 0)


def fft_conv(u, h):
    """u [batch, time, WIDTH], h [time, WIDTH]"""
    length = u.shape[1]
    spectrum = jnp.fft.rfft(u, n=2 * length, axis=1) * jnp.fft.rfft(h, n=2 * length, axis=0)
    return jnp.fft.irfft(spectrum, n=2 * length, axis=1)[:, :length]


def short_conv(u, kernel):
    padded = jnp.pad(u, ((0, 0), (SHORT - 1, 0), (0, 0)))
    return sum(padded[:, i : i + u.shape[1]] * kernel[i] for i in range(SHORT))


def forward(params, tokens):
    x = params["embed"][tokens]
    projected = short_conv(x @ params["in_proj"], params["short"])
    *gates, v = jnp.split(projected, ORDER + 1, axis=-1)
    for gate, h, bias in zip(gates, implicit_filters(params, x.shape[1]), params["bias"], strict=True):
        v = gate * (fft_conv(v, h) + bias * v)
    return (x + v @ params["out_proj"]) @ params["embed"].T / np.sqrt(WIDTH)
