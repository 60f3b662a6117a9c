"""A decoder in the manner of large-scale linen training code: `nn.scan` over layers of an `nn.remat` block, fused QKV
by nn.DenseGeneral, positions by rotary embedding inside the block."""

import flax.linen as nn
import jax.numpy as jnp

from forwards import weights

VOCAB, WIDTH, HEADS, DIM, LAYERS = 51, 32, 4, 8, 3


def rotary(x, positions):
    inv = 1.0 / 10_000 ** (jnp.arange(0, x.shape[-1], 2) / x.shape[-1])
    angle = positions[:, :, None, None] * inv
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate(
        [first * jnp.cos(angle) - second * jnp.sin(angle), second * jnp.cos(angle) + first * jnp.sin(angle)], axis=-1
    )


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, positions, mask):
        h = nn.RMSNorm()(x)
        qkv = nn.DenseGeneral((3, HEADS, DIM), use_bias=False, name="qkv")(h)
        q, k, v = (qkv[:, :, i] for i in range(3))
        mixed = nn.dot_product_attention(rotary(q, positions), rotary(k, positions), v, mask=mask)
        x = x + nn.DenseGeneral(WIDTH, axis=(-2, -1), use_bias=False, name="out")(mixed)
        h = nn.RMSNorm()(x)
        gate, up = jnp.split(nn.Dense(4 * WIDTH, use_bias=False, name="gate_up")(h), 2, axis=-1)
        return x + nn.Dense(WIDTH, use_bias=False, name="down")(nn.gelu(gate) * up), None


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCAB, WIDTH, embedding_init=nn.initializers.normal(1.0))
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        mask = nn.make_attention_mask(positions, positions, jnp.greater_equal)
        layers = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=LAYERS,
        )
        x, _ = layers(name="layers")(embed(tokens), positions, mask)
        return embed.attend(nn.RMSNorm()(x)) / jnp.sqrt(WIDTH)


def make(seed=0):
    module = Decoder()
    return module, weights.init(module, ((1, 4), "int32"), seed=seed)
