"""ALiBi (Press et al. 2021, arXiv:2108.12409): a bias linear in distance, multi-query attention, a forward over ONE
sequence [time]."""

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, HEADS = 53, 24, 4


def make(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "embed": (VOCAB, WIDTH),
        "q": (WIDTH, HEADS, WIDTH // HEADS),
        "k": (WIDTH, WIDTH // HEADS),
        "v": (WIDTH, WIDTH // HEADS),
        "o": (HEADS, WIDTH // HEADS, WIDTH),
        "head": (WIDTH, VOCAB),
    }
    return forward, {name: jnp.asarray(rng.standard_normal(s) * 0.4, jnp.float32) for name, s in shapes.items()}


def forward(params, tokens):
    x = params["embed"][tokens]
    positions = jnp.arange(len(tokens))
    distance = positions[None, :] - positions[:, None]
    slopes = 2.0 ** (-8 * jnp.arange(1, HEADS + 1) / HEADS)
    q = jnp.einsum("td,dhf->htf", x, params["q"])
    scores = jnp.einsum("htf,sf->hts", q, x @ params["k"])
    scores = scores + slopes[:, None, None] * distance
    scores += jnp.where(distance > 0, -jnp.inf, 0.0)
    mixed = jnp.einsum("hts,sf->thf", jax.nn.softmax(scores), x @ params["v"])
    x = x + jnp.einsum("thf,hfd->td", mixed, params["o"])
    return x @ params["head"]
