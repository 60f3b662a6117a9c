"""GPT-2 (Radford et al. 2019) in plain JAX: learned positions, LayerNorm, a mask by jnp.tril, tied embeddings."""

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, HEADS, LAYERS, CONTEXT = 61, 32, 4, 2, 96


def make(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape) * 0.2, jnp.float32)

    def layer():
        return {
            "ln1": (1 + normal(WIDTH), normal(WIDTH)),
            "qkv": (normal(WIDTH, 3 * WIDTH), normal(3 * WIDTH)),
            "out": (normal(WIDTH, WIDTH), normal(WIDTH)),
            "ln2": (1 + normal(WIDTH), normal(WIDTH)),
            "up": (normal(WIDTH, 4 * WIDTH), normal(4 * WIDTH)),
            "down": (normal(4 * WIDTH, WIDTH), normal(WIDTH)),
        }

    params = {
        "wte": normal(VOCAB, WIDTH),
        "wpe": normal(CONTEXT, WIDTH),
        "layers": [layer() for _ in range(LAYERS)],
        "ln": (1 + normal(WIDTH), normal(WIDTH)),
    }
    return forward, params


def layer_norm(x, scale_bias):
    scale, bias = scale_bias
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + bias


def attention(x, layer):
    batch, time, width = x.shape
    w, b = layer["qkv"]
    q, k, v = jnp.split(x @ w + b, 3, axis=-1)
    q, k, v = (a.reshape(batch, time, HEADS, width // HEADS).transpose(0, 2, 1, 3) for a in (q, k, v))
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(width // HEADS)
    mask = jnp.tril(jnp.ones((time, time)))
    scores = jnp.where(mask == 0, -1e10, scores)
    mixed = jax.nn.softmax(scores, axis=-1) @ v
    w, b = layer["out"]
    return mixed.transpose(0, 2, 1, 3).reshape(batch, time, width) @ w + b


def forward(params, tokens):
    time = tokens.shape[1]
    x = params["wte"][tokens] + params["wpe"][jnp.arange(time)]
    for layer in params["layers"]:
        x = x + attention(layer_norm(x, layer["ln1"]), layer)
        up, down = layer["up"], layer["down"]
        x = x + jax.nn.gelu(layer_norm(x, layer["ln2"]) @ up[0] + up[1]) @ down[0] + down[1]
    return layer_norm(x, params["ln"]) @ params["wte"].T
