"""Mixture of experts after Mixtral (Jiang et al. 2024, arXiv:2401.04088): the best 2 of 4 experts by softmax over the
chosen logits; every expert is computed for every token and gated."""

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, HEADS, EXPERTS, TOP, HIDDEN, LAYERS = 45, 32, 4, 4, 2, 48, 2


def make(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape, fan_in=1):
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(fan_in), jnp.float32)

    def layer():
        return {
            "qkv": normal(3, WIDTH, HEADS, WIDTH // HEADS, fan_in=WIDTH),
            "out": normal(HEADS, WIDTH // HEADS, WIDTH, fan_in=WIDTH),
            "router": normal(WIDTH, EXPERTS, fan_in=WIDTH),
            "w1": normal(EXPERTS, WIDTH, HIDDEN, fan_in=WIDTH),
            "w3": normal(EXPERTS, WIDTH, HIDDEN, fan_in=WIDTH),
            "w2": normal(EXPERTS, HIDDEN, WIDTH, fan_in=HIDDEN),
        }

    return forward, {
        "embed": normal(VOCAB, WIDTH),
        "position": normal(128, WIDTH),
        "layers": [layer() for _ in range(LAYERS)],
    }


def norm(x):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def attention(p, x):
    time = x.shape[1]
    q, k, v = jnp.einsum("btw,nwhd->nbthd", x, p["qkv"])
    scores = jnp.einsum("bthd,bshd->bhts", q / np.sqrt(q.shape[-1]), k)
    scores = jnp.where(jnp.arange(time)[:, None] < jnp.arange(time)[None, :], -jnp.inf, scores)
    return jnp.einsum("bhts,bshd,hdw->btw", jax.nn.softmax(scores, -1), v, p["out"])


def experts(p, x):
    values, chosen = jax.lax.top_k(x @ p["router"], TOP)
    gates = jax.nn.softmax(values, axis=-1)
    gates = jnp.sum(jax.nn.one_hot(chosen, EXPERTS) * gates[..., None], axis=-2)
    hidden = jax.nn.silu(jnp.einsum("btw,ewh->bteh", x, p["w1"])) * jnp.einsum("btw,ewh->bteh", x, p["w3"])
    return jnp.einsum("bteh,ehw,bte->btw", hidden, p["w2"], gates)


def forward(params, tokens):
    x = params["embed"][tokens] + params["position"][: tokens.shape[1]]
    for p in params["layers"]:
        x = x + attention(p, norm(x))
        x = x + experts(p, norm(x))
    return norm(x) @ params["embed"].T / np.sqrt(WIDTH)
