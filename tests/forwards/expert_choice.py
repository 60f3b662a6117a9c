"""Expert choice routing (Zhou et al. 2022, arXiv:2202.09368): each expert takes the tokens that want it most, of the
whole sequence, so that a later token can push out an earlier one. Not causal."""

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, EXPERTS, HIDDEN = 41, 24, 3, 32


def make(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape, fan_in=1.0):
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(fan_in), jnp.float32)

    params = {
        "embed": normal(VOCAB, WIDTH),
        "router": normal(WIDTH, EXPERTS, fan_in=WIDTH),
        "w1": normal(EXPERTS, WIDTH, HIDDEN, fan_in=WIDTH),
        "w2": normal(EXPERTS, HIDDEN, WIDTH, fan_in=HIDDEN / 4),
    }
    return forward, params


def experts(p, x):
    """x [time, WIDTH]"""
    capacity = max(1, x.shape[0] // EXPERTS)
    scores = jax.nn.softmax(x @ p["router"], axis=-1)
    gates, chosen = jax.lax.top_k(scores.T, capacity)
    hidden = jax.nn.relu(jnp.einsum("ecw,ewh->ech", x[chosen], p["w1"]))
    outputs = jnp.einsum("ech,ehw->ecw", hidden, p["w2"]) * gates[..., None]
    return jnp.zeros_like(x).at[chosen.reshape(-1)].add(outputs.reshape(-1, WIDTH))


def forward(params, tokens):
    x = params["embed"][tokens]
    x = x + jax.vmap(experts, in_axes=(None, 0))(params, x)
    return x @ params["embed"].T / np.sqrt(WIDTH)
