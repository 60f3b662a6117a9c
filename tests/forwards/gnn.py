"""A graph attention network (Velickovic et al. 2017, arXiv:1710.10903) on ONE graph of NODES nodes and a list of edges,
by segment sums, mapped over a batch of graphs with vmap."""

import jax
import jax.numpy as jnp
import numpy as np

NODES, FEATURES, WIDTH, LAYERS = 10, 6, 12, 2
VOCAB = NODES  # senders and receivers are node numbers


def make(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape, fan_in=1.0):
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(fan_in), jnp.float32)

    widths = (FEATURES, *[WIDTH] * LAYERS)
    layers = [
        {
            "w": normal(n, WIDTH, fan_in=n),
            "sender": normal(WIDTH),
            "receiver": normal(WIDTH),
            "self": normal(n, WIDTH, fan_in=n),
        }
        for n in widths[:-1]
    ]
    return forward, {"layers": layers, "head": normal(WIDTH, 3, fan_in=WIDTH)}


def segment_softmax(logits, segments):
    highest = jax.ops.segment_max(logits, segments, NODES)
    weights = jnp.exp(logits - highest[segments])
    return weights / jax.ops.segment_sum(weights, segments, NODES)[segments]


def graph(params, nodes, senders, receivers):
    x = nodes
    for p in params["layers"]:
        h = x @ p["w"]
        logits = jax.nn.leaky_relu((h @ p["sender"])[senders] + (h @ p["receiver"])[receivers], 0.2)
        messages = segment_softmax(logits, receivers)[:, None] * h[senders]
        x = jax.nn.elu(jax.ops.segment_sum(messages, receivers, num_segments=NODES) + x @ p["self"])
    return jnp.sum(x, axis=0) @ params["head"]


def forward(params, nodes, senders, receivers):
    return jax.vmap(graph, in_axes=(None, 0, 0, 0))(params, nodes, senders, receivers)
