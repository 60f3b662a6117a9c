"""A bidirectional LSTM (Graves and Schmidhuber 2005) of linen's own parts: the backward half reads what comes later."""

import flax.linen as nn

from forwards import weights

VOCAB, WIDTH = 31, 20


class Tagger(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCAB, WIDTH, embedding_init=nn.initializers.normal(1.0))(tokens)
        forward, backward = nn.RNN(nn.LSTMCell(WIDTH)), nn.RNN(nn.LSTMCell(WIDTH))
        return nn.Dense(7)(nn.Bidirectional(forward, backward)(x))


def make(seed=0):
    module = Tagger()
    return module, weights.init(module, ((1, 4), "int32"), seed=seed)
