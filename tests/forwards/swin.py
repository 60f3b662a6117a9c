"""A Swin block pair (Liu et al. 2021, arXiv:2103.14030): windows are folded into the batch, shifted ones by a roll with
a mask that keeps wrapped patches apart, relative position biases by lookup."""

import jax
import jax.numpy as jnp
import numpy as np

CLASSES, WIDTH, HEADS, WINDOW, SIDE = 7, 16, 2, 4, 8


def make(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape, fan_in=1.0):
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(fan_in), jnp.float32)

    def block():
        return {
            "qkv": normal(WIDTH, 3 * WIDTH, fan_in=WIDTH),
            "bias": normal((2 * WINDOW - 1) ** 2, HEADS),
            "out": normal(WIDTH, WIDTH, fan_in=WIDTH),
            "mlp": [normal(WIDTH, 32, fan_in=WIDTH), normal(32, WIDTH, fan_in=32)],
        }

    params = {
        "patch": normal(2, 2, 3, WIDTH, fan_in=12),
        "blocks": [block(), block()],
        "head": normal(WIDTH, CLASSES, fan_in=WIDTH / 4),
    }
    return forward, params


def norm(x):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)


def windows(x):
    """[batch, SIDE, SIDE, c] -> [batch * windows, WINDOW * WINDOW, c]"""
    batch, n = x.shape[0], SIDE // WINDOW
    x = x.reshape(batch, n, WINDOW, n, WINDOW, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch * n * n, WINDOW * WINDOW, -1)


def whole(x):
    n = SIDE // WINDOW
    x = x.reshape(-1, n, n, WINDOW, WINDOW, WIDTH).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, SIDE, SIDE, WIDTH)


def relative_index():
    grid = np.stack(np.meshgrid(np.arange(WINDOW), np.arange(WINDOW), indexing="ij"), -1).reshape(-1, 2)
    distance = grid[:, None] - grid[None] + WINDOW - 1
    return distance[..., 0] * (2 * WINDOW - 1) + distance[..., 1]


def shifted_mask(shift):
    region = np.zeros((1, SIDE, SIDE, 1), np.int32)
    cuts = (slice(0, -WINDOW), slice(-WINDOW, -shift), slice(-shift, None))
    for number, (rows, columns) in enumerate((r, c) for r in cuts for c in cuts):
        region[:, rows, columns] = number
    region = windows(region)[..., 0]
    return np.where(region[:, None, :] == region[:, :, None], 0.0, -100.0)


def attention(p, x, mask):
    rows, size, _ = x.shape
    q, k, v = (x @ p["qkv"]).reshape(rows, size, 3, HEADS, WIDTH // HEADS).transpose(2, 0, 3, 1, 4)
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(WIDTH // HEADS) + p["bias"][relative_index()].transpose(2, 0, 1)
    if mask is not None:
        scores = scores.reshape(-1, len(mask), HEADS, size, size) + mask[None, :, None]
        scores = scores.reshape(rows, HEADS, size, size)
    return (jax.nn.softmax(scores, -1) @ v).transpose(0, 2, 1, 3).reshape(rows, size, WIDTH) @ p["out"]


def forward(params, images):
    x = jax.lax.conv_general_dilated(
        images, params["patch"], (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    for p, shift in zip(params["blocks"], (0, WINDOW // 2), strict=True):
        h = jnp.roll(norm(x), (-shift, -shift), axis=(1, 2)) if shift else norm(x)
        h = whole(attention(p, windows(h), shifted_mask(shift) if shift else None))
        x = x + (jnp.roll(h, (shift, shift), axis=(1, 2)) if shift else h)
        x = x + jax.nn.gelu(norm(x) @ p["mlp"][0]) @ p["mlp"][1]
    return norm(x).mean(axis=(1, 2)) @ params["head"]
