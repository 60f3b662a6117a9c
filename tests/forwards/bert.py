"""BERT (Devlin et al. 2018, arXiv:1810.04805), an encoder: every token sees every other, except padding as the mask
given beside the tokens says."""

import flax.linen as nn
import jax.numpy as jnp

from forwards import weights

VOCAB, WIDTH, HEADS, LAYERS = 43, 32, 4, 2


class Bert(nn.Module):
    @nn.compact
    def __call__(self, tokens, mask):
        x = nn.Embed(VOCAB, WIDTH, embedding_init=nn.initializers.normal(1.0))(tokens)
        x = nn.LayerNorm()(x + nn.Embed(128, WIDTH)(jnp.arange(tokens.shape[1]))[None])
        attention_mask = nn.make_attention_mask(jnp.ones_like(mask), mask)
        for _ in range(LAYERS):
            x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(HEADS)(x, mask=attention_mask))
            x = nn.LayerNorm()(x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(x))))
        return x


def make(seed=0):
    module = Bert()
    return module, weights.init(module, ((1, 4), "int32"), ((1, 4), "int32"), seed=seed)
