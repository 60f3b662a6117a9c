"""RWKV-4 (Peng et al. 2023, arXiv:2305.13048): token shift, the wkv recurrence by `lax.scan` over time kept in range by
a running maximum, channel mixing with squared ReLU."""

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, LAYERS = 45, 32, 2


def make(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape, fan_in=1.0):
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(fan_in), jnp.float32)

    def mix():
        return jnp.asarray(rng.uniform(0, 1, WIDTH), jnp.float32)

    def norm():
        return 1 + normal(WIDTH, fan_in=100), normal(WIDTH, fan_in=100)

    def layer():
        square = {name: normal(WIDTH, WIDTH, fan_in=WIDTH) for name in ("key", "value", "receptance", "output")}
        time = {"mix_k": mix(), "mix_v": mix(), "mix_r": mix(), "decay": normal(WIDTH) - 1, "first": normal(WIDTH)}
        channel = {
            "mix_k": mix(),
            "mix_r": mix(),
            "key": normal(WIDTH, 4 * WIDTH, fan_in=WIDTH),
            "receptance": normal(WIDTH, WIDTH, fan_in=WIDTH),
            "value": normal(4 * WIDTH, WIDTH, fan_in=4 * WIDTH),
        }
        return {"ln1": norm(), "ln2": norm(), "time": square | time, "channel": channel}

    params = {
        "embed": normal(VOCAB, WIDTH),
        "layers": [layer() for _ in range(LAYERS)],
        "ln_out": norm(),
        "head": normal(WIDTH, VOCAB, fan_in=WIDTH),
    }
    return forward, params


def layer_norm(x, p):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * p[0] + p[1]


def shift(x):
    """The previous token's activations; zeros before the first."""
    return jnp.concatenate([jnp.zeros_like(x[:, :1]), x[:, :-1]], axis=1)


def wkv(w, u, k, v):
    """k, v [batch, time, WIDTH]: sums of v weighted by exp(k) that decay by exp(-exp(w)) a step, u for the newest."""

    def step(carry, kv):
        aa, bb, pp = carry
        kk, vv = kv
        ww = u + kk
        p = jnp.maximum(pp, ww)
        e1, e2 = jnp.exp(pp - p), jnp.exp(ww - p)
        out = (e1 * aa + e2 * vv) / (e1 * bb + e2)
        ww = pp - jnp.exp(w)
        p = jnp.maximum(ww, kk)
        e1, e2 = jnp.exp(ww - p), jnp.exp(kk - p)
        return (e1 * aa + e2 * vv, e1 * bb + e2, p), out

    zeros = jnp.zeros_like(k[:, 0])
    _, out = jax.lax.scan(step, (zeros, zeros, zeros - 1e38), (k.transpose(1, 0, 2), v.transpose(1, 0, 2)))
    return out.transpose(1, 0, 2)


def time_mixing(p, x):
    xx = shift(x)
    k = (x * p["mix_k"] + xx * (1 - p["mix_k"])) @ p["key"]
    v = (x * p["mix_v"] + xx * (1 - p["mix_v"])) @ p["value"]
    r = jax.nn.sigmoid((x * p["mix_r"] + xx * (1 - p["mix_r"])) @ p["receptance"])
    return (r * wkv(p["decay"], p["first"], k, v)) @ p["output"]


def channel_mixing(p, x):
    xx = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    k = jnp.square(jax.nn.relu((x * p["mix_k"] + xx * (1 - p["mix_k"])) @ p["key"]))
    r = jax.nn.sigmoid((x * p["mix_r"] + xx * (1 - p["mix_r"])) @ p["receptance"])
    return r * (k @ p["value"])


def forward(params, tokens):
    x = params["embed"][tokens]
    for p in params["layers"]:
        x = x + time_mixing(p["time"], layer_norm(x, p["ln1"]))
        x = x + channel_mixing(p["channel"], layer_norm(x, p["ln2"]))
    return layer_norm(x, params["ln_out"]) @ params["head"]
