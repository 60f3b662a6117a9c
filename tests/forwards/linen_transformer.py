"""A decoder of Flax linen's own parts: nn.MultiHeadDotProductAttention and nn.make_causal_mask."""

import flax.linen as nn

from forwards import weights

VOCAB = 47


class Decoder(nn.Module):
    width: int = 32
    heads: int = 4
    layers: int = 2
    dropout: float = 0.1

    @nn.compact
    def __call__(self, tokens, train=False):
        x = nn.Embed(VOCAB, self.width)(tokens)
        position = self.param("position", nn.initializers.normal(0.2), (128, self.width))
        x = x + position[: tokens.shape[1]]
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            h = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=self.heads)(h, h, mask=mask)
            h = nn.Dense(4 * self.width)(nn.LayerNorm()(x))
            x = x + nn.Dropout(self.dropout, deterministic=not train)(nn.Dense(self.width)(nn.swish(h)))
        return nn.Dense(VOCAB)(nn.RMSNorm()(x))


def make(seed=0):
    module = Decoder()
    variables = weights.init(module, ((1, 8), "int32"), seed=seed)
    return module, variables
