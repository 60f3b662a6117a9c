"""An LSTM language model in Haiku: hk.dynamic_unroll of an hk.DeepRNN, time first as Haiku has it."""

import haiku as hk
import jax

from forwards import weights

VOCAB, WIDTH, HIDDEN = 31, 20, 24


def language_model(tokens):
    x = hk.Embed(VOCAB, WIDTH, w_init=hk.initializers.RandomNormal(1.0))(tokens)
    core = hk.DeepRNN([hk.LSTM(HIDDEN), jax.nn.relu, hk.LSTM(HIDDEN)])
    x, _ = hk.dynamic_unroll(core, x, core.initial_state(tokens.shape[0]), time_major=False)
    return hk.Linear(VOCAB, w_init=hk.initializers.RandomNormal(1.0))(x)


def make(seed=0):
    model = hk.without_apply_rng(hk.transform(language_model))
    return model.apply, weights.init(model, ((1, 4), "int32"), seed=seed)
