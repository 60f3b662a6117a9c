"""A stacked LSTM language model (Zaremba et al. 2014, arXiv:1409.2329) of linen's own parts."""

import flax.linen as nn

from forwards import weights

VOCAB, WIDTH, HIDDEN, LAYERS = 35, 24, 28, 2


class LanguageModel(nn.Module):
    @nn.compact
    def __call__(self, tokens, train=False):
        x = nn.Embed(VOCAB, WIDTH, embedding_init=nn.initializers.normal(1.0))(tokens)
        for _ in range(LAYERS):
            x = nn.RNN(nn.OptimizedLSTMCell(HIDDEN))(nn.Dropout(0.5, deterministic=not train)(x))
        return nn.Dense(VOCAB, kernel_init=nn.initializers.normal(1.0))(x)


def make(seed=0):
    module = LanguageModel()
    return module, weights.init(module, ((1, 4), "int32"), seed=seed)
