"""The Transformer of "Attention is all you need" (Vaswani et al. 2017, arXiv:1706.03762): post-norm encoder and
decoder, sinusoidal positions, cross-attention that hides the source's padding (token 0)."""

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, HEADS, LAYERS = 47, 32, 4, 2


def make(seed=0):
    rng = np.random.default_rng(seed)

    def dense(n, m):
        return jnp.asarray(rng.standard_normal((n, m)) / np.sqrt(n), jnp.float32)

    def attention():
        return {name: dense(WIDTH, WIDTH) for name in ("q", "k", "v", "o")}

    def norm():
        return jnp.asarray(1 + 0.1 * rng.standard_normal((2, WIDTH)), jnp.float32) - jnp.array([[0.0], [1.0]])

    def layer(attentions):
        return {
            "attention": [attention() for _ in range(attentions)],
            "mlp": [dense(WIDTH, 64), dense(64, WIDTH)],
            "norms": [norm() for _ in range(attentions + 1)],
        }

    params = {
        "embed": jnp.asarray(rng.standard_normal((VOCAB, WIDTH)) / np.sqrt(WIDTH), jnp.float32),
        "encoder": [layer(1) for _ in range(LAYERS)],
        "decoder": [layer(2) for _ in range(LAYERS)],
    }
    return forward, params


def layer_norm(x, p):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6) * p[0] + p[1]


def attend(p, x, memory, mask):
    def heads(a):
        return a.reshape(*a.shape[:2], HEADS, WIDTH // HEADS).transpose(0, 2, 1, 3)

    q, k, v = heads(x @ p["q"]), heads(memory @ p["k"]), heads(memory @ p["v"])
    scores = jnp.where(mask, q @ k.transpose(0, 1, 3, 2) / np.sqrt(WIDTH // HEADS), -1e9)
    return (jax.nn.softmax(scores, -1) @ v).transpose(0, 2, 1, 3).reshape(x.shape) @ p["o"]


def feed_forward(p, x):
    return jax.nn.relu(x @ p[0]) @ p[1]


def embed(params, tokens):
    position = jnp.arange(tokens.shape[1])[:, None]
    rates = jnp.exp(jnp.arange(0, WIDTH, 2) * (-np.log(10_000.0) / WIDTH))
    table = jnp.zeros((tokens.shape[1], WIDTH))
    table = table.at[:, 0::2].set(jnp.sin(position * rates)).at[:, 1::2].set(jnp.cos(position * rates))
    return params["embed"][tokens] * np.sqrt(WIDTH) + table


def encode(params, source):
    x, mask = embed(params, source), (source != 0)[:, None, None, :]
    for p in params["encoder"]:
        x = layer_norm(x + attend(p["attention"][0], x, x, mask), p["norms"][0])
        x = layer_norm(x + feed_forward(p["mlp"], x), p["norms"][1])
    return x, mask


def forward(params, tokens, source):
    memory, source_mask = encode(params, source)
    x = embed(params, tokens)
    causal = jnp.tril(jnp.ones((1, 1, tokens.shape[1], tokens.shape[1]), bool))
    for p in params["decoder"]:
        itself, cross = p["attention"]
        x = layer_norm(x + attend(itself, x, x, causal), p["norms"][0])
        x = layer_norm(x + attend(cross, x, memory, source_mask), p["norms"][1])
        x = layer_norm(x + feed_forward(p["mlp"], x), p["norms"][2])
    return x @ params["embed"].T
