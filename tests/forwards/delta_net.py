"""DeltaNet (Schlag et al. 2021, arXiv:2102.11174): a fast weight matrix corrected towards each new value, as a
`lax.scan` over ONE sequence, mapped over heads and over the batch with vmap."""

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, HEADS, DIM = 39, 32, 2, 8


def make(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape, fan_in=1.0):
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(fan_in), jnp.float32)

    params = {
        "embed": normal(VOCAB, WIDTH),
        "qkv": normal(3, WIDTH, HEADS, DIM, fan_in=WIDTH),
        "beta": normal(WIDTH, HEADS, fan_in=WIDTH),
        "out": normal(HEADS, DIM, WIDTH, fan_in=WIDTH / 4),
        "head": normal(WIDTH, VOCAB, fan_in=WIDTH),
    }
    return forward, params


def delta_rule(q, k, v, beta):
    """One head of one sequence: q, k, v [time, dim], beta [time]"""

    def step(memory, inputs):
        q, k, v, beta = inputs
        memory = memory + beta * jnp.outer(v - memory @ k, k)
        return memory, memory @ q

    return jax.lax.scan(step, jnp.zeros((v.shape[-1], k.shape[-1])), (q, k, v, beta))[1]


def sequence(params, tokens):
    x = params["embed"][tokens]
    q, k, v = jnp.einsum("tw,nwhd->nthd", x, params["qkv"])
    q, k = (a / jnp.linalg.norm(a, axis=-1, keepdims=True) for a in (q, k))
    mixed = jax.vmap(delta_rule, in_axes=1, out_axes=1)(q, k, v, jax.nn.sigmoid(x @ params["beta"]))
    return (x + jnp.einsum("thd,hdw->tw", mixed, params["out"])) @ params["head"]


def forward(params, tokens):
    return jax.vmap(sequence, in_axes=(None, 0))(params, tokens)
