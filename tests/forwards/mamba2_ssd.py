"""Mamba-2 (Dao and Gu 2024, arXiv:2405.21060), with the paper's own minimal SSD (its listing 1): einsums and segment
sums within chunks of 10 rows, and the chunks' states by a product with the decays between all pairs of chunks."""

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, INNER, HEADS, STATE, CONV, LAYERS, CHUNK = 43, 24, 32, 4, 6, 4, 2, 10


def make(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape, fan_in=1.0):
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(fan_in), jnp.float32)

    def layer():
        return {
            "norm": 1 + normal(WIDTH, fan_in=100),
            "in_proj": normal(WIDTH, 2 * INNER + 2 * STATE + HEADS, fan_in=WIDTH),
            "conv": normal(CONV, 1, INNER + 2 * STATE, fan_in=CONV),
            "dt_bias": normal(HEADS) - 1,
            "A_log": jnp.log(jnp.linspace(1.0, 4.0, HEADS)),
            "D": normal(HEADS),
            "out_norm": 1 + normal(INNER, fan_in=100),
            "out_proj": normal(INNER, WIDTH, fan_in=INNER),
        }

    params = {
        "embed": normal(VOCAB, WIDTH),
        "layers": [layer() for _ in range(LAYERS)],
        "norm": 1 + normal(WIDTH, fan_in=100),
    }
    return forward, params


def norm(x, weight):
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5) * weight


def segsum(x):
    """[..., t] -> [..., t, t]: sums of x over stretches, -inf above the diagonal. Stable: nothing is subtracted."""
    t = x.shape[-1]
    x = jnp.broadcast_to(x[..., None], (*x.shape, t))
    x = jnp.where(jnp.tril(jnp.ones((t, t), bool), k=-1), x, 0)
    return jnp.where(jnp.tril(jnp.ones((t, t), bool)), jnp.cumsum(x, axis=-2), -jnp.inf)


def ssd(x, a, b, c):
    """x [batch, time, heads, dim]; a [.., heads]; b, c [batch, time, heads, state]; time is a multiple of CHUNK"""

    def cut(x):
        return x.reshape(x.shape[0], x.shape[1] // CHUNK, CHUNK, *x.shape[2:])

    x, a, b, c = cut(x), cut(a).transpose(0, 3, 1, 2), cut(b), cut(c)
    a_cumsum = jnp.cumsum(a, axis=-1)
    # 1. within each chunk
    y_diagonal = jnp.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", c, b, jnp.exp(segsum(a)), x)
    # 2. each chunk's state, as if it began with none
    states = jnp.einsum("bclhn,bhcl,bclhp->bchpn", b, jnp.exp(a_cumsum[..., -1:] - a_cumsum), x)
    # 3. from chunk to chunk
    states = jnp.concatenate([jnp.zeros_like(states[:, :1]), states], axis=1)
    decay = jnp.exp(segsum(jnp.pad(a_cumsum[..., -1], ((0, 0), (0, 0), (1, 0)))))
    states = jnp.einsum("bhzc,bchpn->bzhpn", decay, states)[:, :-1]
    # 4. what a chunk's state adds to its rows
    y_off = jnp.einsum("bclhn,bchpn,bhcl->bclhp", c, states, jnp.exp(a_cumsum))
    y = y_diagonal + y_off
    return y.reshape(y.shape[0], -1, *y.shape[3:])


def causal_conv(x, kernel):
    dims = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1,), [(CONV - 1, 0)], dimension_numbers=dims, feature_group_count=x.shape[-1]
    )


def block(p, u):
    batch, time, _ = u.shape
    z, xbc, dt = jnp.split(u @ p["in_proj"], [INNER, 2 * INNER + 2 * STATE], axis=-1)
    x, b, c = jnp.split(jax.nn.silu(causal_conv(xbc, p["conv"])), [INNER, INNER + STATE], axis=-1)
    dt = jax.nn.softplus(dt + p["dt_bias"])
    x = x.reshape(batch, time, HEADS, -1)
    b, c = (jnp.repeat(m[:, :, None], HEADS, axis=2) for m in (b, c))
    pad = [(0, 0), (0, -time % CHUNK)]
    rows = (x * dt[..., None], -jnp.exp(p["A_log"]) * dt, b, c)
    y = ssd(*(jnp.pad(r, pad + [(0, 0)] * (r.ndim - 2)) for r in rows))[:, :time]
    y = (y + p["D"][:, None] * x).reshape(batch, time, INNER)
    return norm(y * jax.nn.silu(z), p["out_norm"]) @ p["out_proj"]


def forward(params, tokens):
    x = params["embed"][tokens]
    for p in params["layers"]:
        x = x + block(p, norm(x, p["norm"]))
    return norm(x, params["norm"]) @ params["embed"].T / np.sqrt(WIDTH)
