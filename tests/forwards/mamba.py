"""Mamba (Gu and Dao 2023, arXiv:2312.00752): a causal depthwise convolution, a selective state space model by
`associative_scan` with step, B and C made from the input, and a gate."""

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, INNER, STATE, RANK, CONV, LAYERS = 43, 24, 32, 6, 4, 4, 2


def make(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape, fan_in=1.0):
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(fan_in), jnp.float32)

    def layer():
        return {
            "norm": 1 + normal(WIDTH, fan_in=100),
            "in_proj": normal(WIDTH, 2 * INNER, fan_in=WIDTH),
            "conv": normal(CONV, 1, INNER, fan_in=CONV),
            "conv_bias": normal(INNER, fan_in=25),
            "x_proj": normal(INNER, RANK + 2 * STATE, fan_in=INNER),
            "dt_proj": normal(RANK, INNER, fan_in=RANK),
            "dt_bias": normal(INNER) - 1,
            "A_log": jnp.log(jnp.tile(jnp.arange(1.0, STATE + 1), (INNER, 1))),
            "D": normal(INNER),
            "out_proj": normal(INNER, WIDTH, fan_in=INNER / 4),
        }

    params = {
        "embed": normal(VOCAB, WIDTH),
        "layers": [layer() for _ in range(LAYERS)],
        "norm": 1 + normal(WIDTH, fan_in=100),
    }
    return forward, params


def norm(x, weight):
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5) * weight


def causal_conv(x, kernel, bias):
    y = jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1,),
        padding=[(CONV - 1, 0)],
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=INNER,
    )
    return y + bias


def selective_scan(x, dt, a, b, c, d):
    """x, dt [batch, time, inner]; a [inner, state]; b, c [batch, time, state]; d [inner]"""
    decay = jnp.exp(dt[..., None] * a)
    drive = (dt * x)[..., None] * b[:, :, None, :]

    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    _, h = jax.lax.associative_scan(combine, (decay, drive), axis=1)
    return jnp.einsum("btis,bts->bti", h, c) + d * x


def block(p, u):
    x, z = jnp.split(u @ p["in_proj"], 2, axis=-1)
    x = jax.nn.silu(causal_conv(x, p["conv"], p["conv_bias"]))
    dt, b, c = jnp.split(x @ p["x_proj"], [RANK, RANK + STATE], axis=-1)
    dt = jax.nn.softplus(dt @ p["dt_proj"] + p["dt_bias"])
    y = selective_scan(x, dt, -jnp.exp(p["A_log"]), b, c, p["D"])
    return (y * jax.nn.silu(z)) @ p["out_proj"]


def forward(params, tokens):
    x = params["embed"][tokens]
    for p in params["layers"]:
        x = x + block(p, norm(x, p["norm"]))
    return norm(x, params["norm"]) @ params["embed"].T / np.sqrt(WIDTH)
