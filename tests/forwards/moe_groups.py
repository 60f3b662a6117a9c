"""GShard's grouping (Lepikhin et al. 2020, arXiv:2006.16668): the capacity buffers of `moe_capacity` filled within one
sequence, so that rows of the batch don't compete."""

import jax
import numpy as np

from forwards import moe_capacity
from forwards.moe_capacity import VOCAB, WIDTH, attention, norm, switch

__all__ = ["VOCAB", "forward", "make"]


def make(seed=0):
    return forward, moe_capacity.make(seed)[1]


def forward(params, tokens):
    x = params["embed"][tokens] + params["position"][: tokens.shape[1]]
    x = x + attention(params, norm(x))
    x = x + jax.vmap(lambda group: switch(params, group))(norm(x))
    return norm(x) @ params["embed"].T / np.sqrt(WIDTH)
