"""Choosing the next token on the device, inside the compiled step.

One program serves every setting: options travel as arrays with a row a slot. A sample depends on (seed, sample index,
position) and on its own row of logits, never on the slot, the batch size or the neighbours, so a request draws the same
tokens alone, in a full batch, and after it was moved to another replica.

Filters run in the order of transformers' `generate`: temperature, top-k, top-p (of what top-k left), min-p.
"""

import numbers
import operator
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.errors import RequestError

Array = jax.Array

_FLOAT32_MAX = float(np.finfo(np.float32).max)

# Thresholds are looked for among so many of the largest logits first. lax.top_k takes 5 ms for 32 x 49152 on 2 cores, a
# search through whole rows 10 to 25; both are exact, so which one ran can't be seen in the sample.
_CANDIDATES = 256


@dataclass(frozen=True)
class SamplingOptions:
    """How one request's tokens are chosen.

    temperature: 0 takes the most likely token; it is rounded to float32.
    top_k: how many of the most likely tokens may be drawn; 0 is off.
    top_p: the least probability mass that the most likely tokens kept must reach; 1 is off, 0 keeps one.
    min_p: the least probability of a token, as a share of the most likely one's; 0 is off.
    seed: 0 <= seed < 2**64; None for one that `seeded` draws.

    Raises:
        RequestError: a value that is no number of its kind, not finite, or out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, numbers.Real, _FLOAT32_MAX, "0 takes the most likely token")
        _check("top_k", self.top_k, numbers.Integral, 2**31 - 1, "0 is off")
        _check("top_p", self.top_p, numbers.Real, 1, "1 is off")
        _check("min_p", self.min_p, numbers.Real, 1, "0 is off")
        if self.seed is not None:
            _check("seed", self.seed, numbers.Integral, 2**64 - 1, "None draws one")

    def seeded(self) -> "SamplingOptions":
        """These options with a seed: their own, or one drawn from the system's entropy."""
        # 53 bits, so that a seed told to a user survives JSON readers that hold numbers as float64.
        return self if self.seed is not None else replace(self, seed=secrets.randbits(53))


def _check(name: str, value: Any, kind: type, most: float, hint: str) -> None:
    # NaN fails the comparison too, and bool, though an int to Python, is a slip when it stands for a number.
    if not isinstance(value, kind) or isinstance(value, bool) or not 0 <= value <= most:
        limit = f"at most {most:g}" if most <= 1 else f"at most {most!r}" if kind is numbers.Integral else "finite"
        noun = "an integer" if kind is numbers.Integral else "a number"
        raise RequestError(f"{name} must be {noun}, at least 0 and {limit} ({hint}); got {value!r}")


class SamplingState(NamedTuple):
    """The options of every slot, as the compiled step takes them.

    `key` is raw threefry2x32 key data derived from (seed, sample index); the draw for a token folds in its position.
    """

    temperature: Any  # Float32[slots]; 0: greedy
    top_k: Any  # Int32[slots]; 0: off
    top_p: Any  # Float32[slots]; 1: off
    min_p: Any  # Float32[slots]; 0: off
    key: Any  # UInt32[slots, 2]

    @classmethod
    def stack(cls, rows: Sequence[tuple[SamplingOptions, int, int]], slots: int | None = None) -> "SamplingState":
        """NumPy arrays from a row (options, seed, sample index) a slot; slots past the rows are greedy.

        The seed is given apart from the options since theirs may be None, see `SamplingOptions.seeded`.
        """
        empty = (slots or 0) - len(rows)
        if slots is not None and empty < 0:
            raise ValueError(f"{len(rows)} rows don't fit in {slots} slots")
        options = [row[0] for row in rows] + [SamplingOptions()] * empty
        keys = np.zeros((len(options), 2), np.uint32)
        for slot, (option, seed, sample) in enumerate(rows):
            if option.temperature > 0:
                # On the host, in NumPy: jax.random here would compile, and dispatch, for each admitted request.
                # SeedSequence's output is fixed by NumPy's compatibility policy.
                keys[slot] = np.random.SeedSequence([operator.index(seed), sample]).generate_state(2, np.uint32)
        return cls(
            np.array([option.temperature for option in options], np.float32),
            np.array([option.top_k for option in options], np.int32),
            np.array([option.top_p for option in options], np.float32),
            np.array([option.min_p for option in options], np.float32),
            keys,
        )


def sample(logits: Array, positions: Array, state: SamplingState) -> Array:
    """The next token of each slot.

    Greedy slots take the lowest index among the largest logits. The others draw by Gumbel-max (Gumbel 1954; Maddison et
    al. 2014, arXiv:1411.0030) from the softmax of logits / temperature over the tokens that the filters keep. Only the
    differences between a row's logits matter, so they may be as large as float32 goes; -inf bans a token. A row with a
    NaN has no meaning here, its token is arbitrary.

    Args:
        logits: Float[Array, "slots vocab"]
        positions: Int[Array, "slots"], the position of the token drawn within its sequence.
        state: a row a slot; top_k above the vocabulary's size is the same as off.

    Returns:
        Int32[Array, "slots"]
    """
    logits = logits.astype(jnp.float32)
    greedy = _first_largest(logits)
    sampling = state.temperature > 0

    def draw(_: None) -> Array:
        weights = _weights(logits, state.temperature)
        kept = _filter(logits, weights, state, sampling)
        # The exponential form of Gumbel-max: argmax(log w - log E) = argmax(w / E), one logarithm fewer. A weight that
        # underflows to 0 can't win: the largest is 1 and E is below 17.
        scores = jnp.where(kept, weights / _exponentials(state.key, positions, logits.shape[-1]), -1.0)
        return jnp.where(sampling, _first_largest(scores), greedy)

    return lax.cond(jnp.any(sampling), draw, lambda _: greedy, None)


def top_logprobs(logits: Array, chosen: Array, n: int) -> tuple[Array, Array, Array]:
    """Log probabilities under the model's own distribution: no temperature, no filters.

    Args:
        logits: Float[Array, "slots vocab"]
        chosen: Int[Array, "slots"], the tokens to look up.
        n: how many of the most likely tokens to return, most likely first; lower index first on ties.

    Returns:
        chosen's log probability Float32[Array, "slots"], and the most likely tokens' log probabilities
        Float32[Array, "slots n"] and ids Int32[Array, "slots n"].
    """
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    values, ids = lax.top_k(logprobs, n)
    picked = jnp.take_along_axis(logprobs, chosen.astype(jnp.int32)[:, None], axis=-1)
    return picked[:, 0], values, ids.astype(jnp.int32)


def _first_largest(values: Array) -> Array:
    """argmax over the last axis, lowest index on ties: Float[..., vocab] -> Int32[...]"""
    # Not jnp.argmax: XLA:CPU doesn't vectorise its loop, and with the noise above fused into it, a draw took 40 ms
    # instead of 9 (32 x 49152).
    vocab = values.shape[-1]
    index = lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1)
    first = jnp.min(jnp.where(values == jnp.max(values, axis=-1, keepdims=True), index, vocab), axis=-1)
    return jnp.minimum(first, vocab - 1)  # a row with a NaN equals nothing: keep the id in range


def _weights(logits: Array, temperature: Array) -> Array:
    """Unnormalised probabilities, the largest exactly 1: Float32[slots, vocab]."""
    largest = jnp.max(logits, axis=-1, keepdims=True)
    # inf - inf is NaN, so the largest is set and not computed. The difference comes before the division: no overflow.
    below = jnp.where(logits == largest, 0.0, logits - largest)
    return jnp.exp(below / jnp.where(temperature > 0, temperature, 1.0)[:, None])


def _filter(logits: Array, weights: Array, state: SamplingState, sampling: Array) -> Array:
    """Which tokens top-k, top-p and min-p leave: Bool[slots, vocab]. The most likely one always stays."""
    cut_k = sampling & (state.top_k > 0) & (state.top_k < logits.shape[-1])
    cut_p = sampling & (state.top_p < 1)

    def thresholds(_: None) -> Array:
        best = lax.top_k(logits, min(_CANDIDATES, logits.shape[-1]))
        least = _top_k_threshold(logits, best[0], jnp.where(cut_k, state.top_k, 0))
        return lax.cond(
            jnp.any(cut_p),
            lambda least: jnp.where(cut_p, _top_p_threshold(logits, best, weights, least, state.top_p), least),
            lambda least: least,
            least,
        )

    none = jnp.full_like(state.min_p, -jnp.inf)
    least = lax.cond(jnp.any(cut_k | cut_p), thresholds, lambda _: none, None)
    return (logits >= least[:, None]) & (weights >= state.min_p[:, None])


def _top_k_threshold(logits: Array, best: Array, top_k: Array) -> Array:
    """Each row's top_k-th largest logit, -inf where top_k is 0: Float32[slots]. best: the row's largest, in order."""
    near = jnp.clip(top_k - 1, 0, best.shape[-1] - 1)
    found = jnp.take_along_axis(best, near[:, None], axis=-1)[:, 0]

    def search(_: None) -> Array:
        return _threshold(logits, jnp.ones(logits.shape, jnp.int32), jnp.maximum(top_k, 1))

    found = lax.cond(jnp.any(top_k > best.shape[-1]), search, lambda _: found, None)
    return jnp.where(top_k > 0, found, -jnp.inf)


def _top_p_threshold(logits: Array, best: Sequence[Array], weights: Array, least: Array, top_p: Array) -> Array:
    """The logit down to which each row's tokens, of those not below `least`, have the mass top_p: Float32[slots]."""
    masses = _integer_masses(jnp.where(logits >= least[:, None], weights, 0.0))
    total = jnp.sum(masses, axis=-1)
    wanted = jnp.clip(jnp.ceil(top_p * total.astype(jnp.float32)).astype(jnp.int32), 1, total)
    values, ids = best
    reached = jnp.cumsum(jnp.take_along_axis(masses, ids, axis=-1), axis=-1) >= wanted[:, None]
    found = jnp.take_along_axis(values, jnp.argmax(reached, axis=-1, keepdims=True), axis=-1)[:, 0]
    return lax.cond(jnp.all(reached[:, -1]), lambda _: found, lambda _: _threshold(logits, masses, wanted), None)


def _threshold(values: Array, masses: Array, wanted: Array) -> Array:
    """The largest threshold t of each row such that {values >= t} has at least the mass wanted: Float32[slots].

    Exact, without a sort: float32 has an image in uint32 that preserves order, and t's is found bit by bit, 32 masked
    sums. Values equal to t are all kept, so top-k may keep more than k tokens and top-p more than its smallest set when
    logits tie. Sorting 32 x 49152 takes XLA:CPU 400 ms, this 15.

    values: Float32[slots, vocab]; masses: Int32[slots, vocab], >= 0; wanted: Int32[slots], at most the row's sum.
    """

    def set_bit(step: Array, image: Array) -> Array:
        trial = image | (jnp.uint32(1 << 31) >> step.astype(jnp.uint32))
        # A trial past inf is a NaN, which nothing reaches, as it should be.
        mass = jnp.sum(jnp.where(values >= _from_image(trial)[:, None], masses, 0), axis=-1)
        return jnp.where(mass >= wanted, trial, image)

    # Started from the row's own zeros rather than jnp.zeros, so that the carry is batched alike under vmap.
    return _from_image(lax.fori_loop(0, 32, set_bit, jnp.zeros_like(wanted, jnp.uint32)))


def _from_image(image: Array) -> Array:
    """The float32 at a place in the order of all of them: -inf (the first 2**23 places), …, -0, 0, …, inf, NaNs."""
    sign, lowest = jnp.uint32(1 << 31), jnp.uint32(0x007FFFFF)
    # Below -inf are NaNs with a sign bit, which no value would reach though every value must: read them as -inf.
    image = jnp.maximum(image, lowest)
    return lax.bitcast_convert_type(jnp.where(image >= sign, image ^ sign, ~image), jnp.float32)


def _integer_masses(weights: Array) -> Array:
    """Weights as integers of a row sum below 2**31: Int32[slots, vocab].

    Integers add up alike in any order. XLA sums floats in an order that depends on the batch size, and a threshold must
    not. The scale is a power of two, so a last-bit change of the float sum below leaves it alone; a token of less than
    about 2**-30 of the row's mass counts as 0.
    """
    exponent = jnp.frexp(jnp.sum(weights, axis=-1))[1]  # sum < 2**exponent, up to rounding
    scale = jnp.exp2((30 - exponent).astype(jnp.float32))
    return jnp.round(weights * scale[:, None]).astype(jnp.int32)


def _exponentials(keys: Array, positions: Array, vocab: int) -> Array:
    """Exp(1) noise of each slot's own (key, position): Float32[slots, vocab], within [2**-33, 17)."""

    def bits(key: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), position)
        return jax.random.bits(key, (vocab,), jnp.uint32)

    # All 32 bits, and the float's fine end at u = 0 where E is small and w / E large: with 23 bits, as
    # jax.random.gumbel's default has, a token of probability below 2**-23 is never or too often drawn.
    uniform = (jax.vmap(bits)(keys, positions).astype(jnp.float32) + 0.5) * jnp.float32(2**-32)
    return -jnp.log1p(-jnp.minimum(uniform, jnp.float32(1 - 2**-24)))
