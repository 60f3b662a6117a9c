"""Switch Transformer (Fedus et al. 2021, arXiv:2101.03961): one expert a token, a buffer of fixed capacity for each
expert filled in order over ALL tokens of the batch, what overflows is dropped; dispatch and combine as einsums.

Rows of the batch compete for the buffers, so they mix. One sequence alone is causal: a token's place in its buffer is
the count of earlier tokens that chose the same expert."""

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, HEADS, EXPERTS, CAPACITY, HIDDEN = 45, 32, 4, 4, 5, 48


def make(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape, fan_in=1):
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(fan_in), jnp.float32)

    params = {
        "embed": normal(VOCAB, WIDTH),
        "position": normal(128, WIDTH),
        "qkv": normal(WIDTH, 3 * WIDTH, fan_in=WIDTH),
        "out": normal(WIDTH, WIDTH, fan_in=WIDTH),
        "router": normal(WIDTH, EXPERTS, fan_in=WIDTH),
        "wi": normal(EXPERTS, WIDTH, HIDDEN, fan_in=WIDTH / 4),
        "wo": normal(EXPERTS, HIDDEN, WIDTH, fan_in=HIDDEN / 4),
    }
    return forward, params


def norm(x):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def attention(p, x):
    batch, time, width = x.shape
    q, k, v = (a.reshape(batch, time, HEADS, -1) for a in jnp.split(x @ p["qkv"], 3, -1))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(width // HEADS)
    scores = jnp.where(jnp.tril(jnp.ones((time, time), bool)), scores, -jnp.inf)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v).reshape(batch, time, width) @ p["out"]


def switch(p, x):
    """x [tokens, width]; a buffer of CAPACITY tokens for each expert."""
    probabilities = jax.nn.softmax(x @ p["router"], axis=-1)
    gate, expert = jnp.max(probabilities, axis=-1), jnp.argmax(probabilities, axis=-1)
    mask = jax.nn.one_hot(expert, EXPERTS)
    place = (jnp.cumsum(mask, axis=0) - 1) * mask
    mask = mask * (place < CAPACITY)
    place = jnp.sum(place, axis=-1).astype(jnp.int32)
    combine = (gate[:, None] * mask)[:, :, None] * jax.nn.one_hot(place, CAPACITY)[:, None, :]
    dispatch = (combine > 0).astype(x.dtype)
    buffers = jnp.einsum("tec,tw->ecw", dispatch, x)
    hidden = jax.nn.relu(jnp.einsum("ecw,ewh->ech", buffers, p["wi"]))
    return jnp.einsum("tec,ecw->tw", combine, jnp.einsum("ech,ehw->ecw", hidden, p["wo"]))


def forward(params, tokens):
    x = params["embed"][tokens] + params["position"][: tokens.shape[1]]
    x = x + attention(params, norm(x))
    x = x + switch(params, norm(x).reshape(-1, WIDTH)).reshape(x.shape)
    return norm(x) @ params["embed"].T / np.sqrt(WIDTH)
