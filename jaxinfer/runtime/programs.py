"""The compiled programs that generation is made of: prefill, decode, score and grow, one for each bucket met.

    prefill(k, slots, length)   a chunk of k prompt tokens a slot; draws the first new token where a prompt ends
    decode(slots, length)       up to STEPS new tokens a slot in one call; how many is an argument, so one program
                                streams token by token and also runs ahead where no one watches
    logits / score              every row's logits, or the log probability of the given next tokens
    grow(slots, length)         moves the state of shorter sequences into a longer one

`length` is the room for rows in the state; reads are bounded by it, so it follows what is in use, in buckets.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import cache, specs
from jaxinfer.aot import CompileReport, Pending
from jaxinfer.buckets import bucket_for, ladder
from jaxinfer.passes.incremental import Step, incremental
from jaxinfer.program import Program
from jaxinfer.runtime.inputs import Inputs, stacked
from jaxinfer.runtime.sampling import SamplingState, sample, top_logprobs

Array = jax.Array

STEPS = 32  # tokens that one decode call may emit a slot
STOP_IDS = 8  # stop tokens a slot has room for; more are looked for on the host
TOP_LOGPROBS = 20  # most alternatives that are reported for each token
SLOTS = (1, 2, 4, 8, 16, 32)
CHUNKS = (16, 32, 64, 128, 256, 512)
_SMALL_PREFILL = 64  # rows up to which a short first run counts for more than 60 ms a prompt
_CHUNK_TOKENS = 4096  # rows of one prefill call over all slots: bounds its activations


class Slots(NamedTuple):
    """Where every slot stands; numpy on the host, arrays in a program. A leading slots dim each."""

    token: Any  # int32: the newest token, not yet in the state
    position: Any  # int32: its index in the sequence
    live: Any  # bool: wants more tokens
    remaining: Any  # int32: how many more at most
    stop_ids: Any  # int32 [slots, STOP_IDS], -1 where unused


class Emitted(NamedTuple):
    """New tokens: token i of a slot is real where i < count."""

    tokens: Any  # int32 [slots, STEPS]
    count: Any  # int32 [slots]
    logprob: Any  # float32 [slots, STEPS], and the most likely tokens beside them:
    top_logprobs: Any  # float32 [slots, STEPS, TOP_LOGPROBS]
    top_ids: Any  # int32 [slots, STEPS, TOP_LOGPROBS]; the last three have no STEPS rows unless asked for


class Programs:
    """Compiles what is met, once, and keeps it; on disk too."""

    def __init__(
        self,
        program: Program,
        params: Sequence[jax.Array],
        max_len: int,
        device: Any,
        assume: bool,
        sizes: Mapping[str, int],
        report: CompileReport,
    ):
        self.program, self.params, self.max_len, self.device = program, list(params), max_len, device
        self.assume_causal, self.sizes, self.report = assume, dict(sizes), report
        self._compiled: dict[tuple[Any, ...], Any] = {}

    @cached_property
    def step(self) -> Step:
        """The derived step; made only when something has to be compiled."""
        return incremental(self.program, length=self.max_len, sizes=self.sizes, assume_causal=self.assume_causal)

    @cached_property
    def _templates(self) -> list[tuple[tuple[int | None, ...], np.dtype]]:
        """(shape with None for time, dtype) of each state array; cached on disk since deriving it needs a trace."""
        name = {"what": "state", **self._name}
        key = cache.key_of(self.program.fingerprint, name, self.device)
        known = cache.load_note(key)
        if known is None:
            known = [[list(s.template), s.node.dtype.name] for s in self.step.state_specs]
            cache.store_note(key, known)
        return [(tuple(shape), np.dtype(dtype)) for shape, dtype in known]

    @property
    def _name(self) -> dict[str, Any]:
        return {"max_len": self.max_len, "assume_causal": self.assume_causal, "sizes": self.sizes}

    @cached_property
    def lengths(self) -> list[int]:
        """Buckets of the state's length; one where no array of it grows."""
        grows = any(None in shape for shape, _ in self._templates)
        return ladder(self.max_len, min(128, self.max_len)) if grows else [self.max_len]

    def state_structs(self, slots: int, length: int) -> list[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the state."""
        return [
            jax.ShapeDtypeStruct((slots, *(length if n is None else n for n in shape)), dtype)
            for shape, dtype in self._templates
        ]

    @property
    def bytes_per_token(self) -> int:
        """State that one token of one sequence takes."""
        return sum(math.prod(s.shape) * s.dtype.itemsize for s in self.state_structs(1, 1))

    def empty_state(self, slots: int, length: int) -> list[jax.Array]:
        """State for new sequences; made on the host, so that nothing is compiled for it."""
        return [jax.device_put(np.zeros(s.shape, s.dtype), self.device) for s in self.state_structs(slots, length)]

    def started_state(self, requests: Sequence[Inputs], slots: int, length: int) -> list[jax.Array]:
        """State for new sequences, with what their own inputs decide."""
        state = self.empty_state(slots, length)
        if len(self.program.inputs) == 1:
            return state
        inputs = stacked(self.program.inputs[1], requests, slots)
        return self.begin(slots, length)(*inputs, state)[0]

    def chunk_for(self, tokens: int, slots: int) -> int:
        """The prefill bucket for a prompt with so many tokens to go."""
        most = max(CHUNKS[0], min(CHUNKS[-1], _CHUNK_TOKENS // slots))
        return bucket_for(min(tokens, most), CHUNKS)

    def prefill(self, k: int, slots: int, length: int, first: bool, logprobs: bool) -> Callable[..., Any]:
        """(tokens [slots, k], counts [slots], ends [slots], Slots, SamplingState, state) -> (Slots, Emitted, state)

        `first`: every slot stands at position 0, so that attention reaches over the chunk alone.
        """
        sampling = _abstract_sampling(slots)
        arguments = (_ints(slots, k), _ints(slots), _bools(slots), _abstract_slots(slots), sampling)

        def run(params: Any, arguments: Any, state: Any) -> tuple[Any, ...]:
            tokens, counts, ends, at, sampling = arguments
            reach = k if first else None
            logits, state = self._step(params, tokens, at.position, counts, state, last=True, reach=reach)
            position = at.position + counts
            emitted = _no_tokens(slots, 1, logprobs)
            # `at` stands before the prompt's next token; drawing moves on to the first new one where the prompt ends.
            at, emitted = _draw(
                at._replace(position=position - 1, live=ends & at.live), logits[:, 0], sampling, 0, emitted
            )
            return at._replace(position=position), emitted, state

        name = {"what": "prefill", "k": k, "slots": slots, "length": length, "first": first, "logprobs": logprobs}
        return self._ready(name, run, arguments)

    def decode(self, slots: int, length: int, logprobs: bool) -> Callable[..., Any]:
        """(Slots, SamplingState, steps [], state) -> (Slots, Emitted, state)"""
        arguments = (_abstract_slots(slots), _abstract_sampling(slots), jax.ShapeDtypeStruct((), np.int32))

        def run(params: Any, arguments: Any, state: Any) -> tuple[Any, ...]:
            at, sampling, steps = arguments

            def more(carry: Any) -> Array:
                i, at, _, _ = carry
                return (i < steps) & jnp.any(at.live)

            def one(carry: Any) -> Any:
                i, at, emitted, state = carry
                counts = at.live.astype(jnp.int32)
                token = at.token[:, None]  # not a sequence's first: a prompt stands before it
                logits, state = self._step(params, token, at.position, counts, state, last=False, starts=False)
                at, emitted = _draw(at, logits[:, 0], sampling, i, emitted)
                return i + 1, at, emitted, state

            start = (jnp.int32(0), at, _no_tokens(slots, STEPS, logprobs), state)
            return jax.lax.while_loop(more, one, start)[1:]

        return self._ready({"what": "decode", "slots": slots, "length": length, "logprobs": logprobs}, run, arguments)

    def logits(self, k: int, slots: int, length: int) -> Callable[..., Any]:
        """(tokens [slots, k], counts [slots], positions [slots], state) -> (logits [slots, k, vocab], state)"""

        def run(params: Any, arguments: Any, state: Any) -> tuple[Any, ...]:
            tokens, counts, positions = arguments
            return self._step(params, tokens, positions, counts, state, last=False)

        arguments = (_ints(slots, k), _ints(slots), _ints(slots))
        return self._ready({"what": "logits", "k": k, "slots": slots, "length": length}, run, arguments)

    def score(self, k: int, slots: int, length: int) -> Callable[..., Any]:
        """(tokens, next tokens [slots, k], counts, positions [slots], state) -> (log probs [slots, k], state)"""

        def run(params: Any, arguments: Any, state: Any) -> tuple[Any, ...]:
            tokens, following, counts, positions = arguments
            logits, state = self._step(params, tokens, positions, counts, state, last=False)
            logits = logits.astype(jnp.float32)
            picked = jnp.take_along_axis(logits, following[..., None], axis=-1)[..., 0]
            return picked - jax.nn.logsumexp(logits, axis=-1), state

        arguments = (_ints(slots, k), _ints(slots, k), _ints(slots), _ints(slots))
        return self._ready({"what": "score", "k": k, "slots": slots, "length": length}, run, arguments)

    def begin(self, slots: int, length: int) -> Callable[..., Any]:
        """(the request's inputs, [slots, ...] each, state) -> (state,) with what they decide in it"""
        leaves = [leaf for leaf in specs.leaves(self.program.inputs) if "time" not in leaf.dims]
        shapes = [leaf.shape({**self.sizes, "batch": 1}) for leaf in leaves]

        def run(params: Any, arguments: Any, state: Any) -> tuple[Any, ...]:
            return (list(self.step.begin(params, arguments, state)),)

        arguments = tuple(jax.ShapeDtypeStruct((slots, *s), leaf.dtype) for s, leaf in zip(shapes, leaves, strict=True))
        return self._ready({"what": "begin", "slots": slots, "length": length}, run, arguments)

    def grow(self, slots: int, before: int, length: int) -> Callable[..., Any]:
        """(state,) -> (state,) with room for `length` rows in place of `before`"""
        new = self.state_structs(slots, length)

        def run(params: Any, arguments: Any, state: Any) -> tuple[Any, ...]:
            del params, arguments
            return (
                [
                    jnp.pad(s, [(0, b - a) for a, b in zip(s.shape, n.shape, strict=True)])
                    for s, n in zip(state, new, strict=True)
                ],
            )

        return self._ready({"what": "grow", "slots": slots, "before": before, "length": length}, run, (), donate=False)

    def _step(
        self,
        params: Any,
        tokens: Array,
        positions: Array,
        counts: Array,
        state: Any,
        *,
        last: bool,
        reach: int | None = None,
        starts: bool = True,
    ) -> Any:
        """Logits [slots, rows, vocab] and the state after a chunk, whether the forward has a batch dim or not."""
        leaf = self.program.inputs[0]
        rows = jnp.expand_dims(tokens, 1 + leaf.dims.index("batch")) if "batch" in leaf.dims else tokens
        options: dict[str, Any] = {"last": last, "reach": reach, "starts": starts}
        (logits,), state = self.step(params, [rows], positions, tuple(state), counts, **options)
        return logits.reshape(*tokens.shape[:1], -1, logits.shape[-1]), list(state)

    def _ready(self, name: Mapping[str, Any], run: Callable[..., Any], arguments: Any, donate: bool = True) -> Any:
        """`run(params, arguments, state)` over flat arrays: a function of (*arguments, state), ready once called."""
        key = tuple(name.values())
        if key not in self._compiled:
            self._compiled[key] = self._compile(name, run, arguments, donate)
        return self._compiled[key]

    def _compile(self, name: Mapping[str, Any], run: Callable[..., Any], arguments: Any, donate: bool) -> Any:
        slots, length = name["slots"], name.get("before", name["length"])
        state = self.state_structs(slots, length)
        weights = [jax.ShapeDtypeStruct(p.shape, p.dtype) for p in self.params]
        weights = weights if name["what"] != "grow" else []
        flat_arguments, tree = jax.tree.flatten(arguments)
        held, given = len(weights), len(weights) + len(flat_arguments)
        results = self._results(name)
        out_tree = jax.tree.structure(results)

        def flat(*arrays: Any) -> tuple[Any, ...]:
            outputs = run(arrays[:held], jax.tree.unflatten(tree, arrays[held:given]), list(arrays[given:]))
            assert jax.tree.structure(outputs) == out_tree, (jax.tree.structure(outputs), out_tree)
            return tuple(jax.tree.leaves(outputs))

        pending = Pending(
            flat,
            [*weights, *flat_arguments, *state],
            out_tree.num_leaves,
            program=self.program.fingerprint,
            bucket={**name, **self._name},
            device=self.device,
            donate=range(given, given + len(state)) if donate else (),
            runs_seldom=name["what"] == "prefill" and name["k"] * slots <= _SMALL_PREFILL,
            report=self.report,
        )

        def call(*arguments_and_state: Any) -> Any:
            *arguments, state = arguments_and_state
            parameters = self.params if held else []
            placed = jax.device_put(jax.tree.leaves(tuple(arguments)), self.device)
            return jax.tree.unflatten(out_tree, pending.result()(*parameters, *placed, *state))

        return call

    def _results(self, name: Mapping[str, Any]) -> Any:
        """What a program returns, as a tree of placeholders: known without tracing it."""
        state: list[Any] = [0] * len(self._templates)
        if name["what"] in ("prefill", "decode"):
            return Slots(*(0,) * 5), Emitted(*(0,) * 5), state
        return (state,) if name["what"] in ("grow", "begin") else (0, state)


def _draw(at: Slots, logits: Array, sampling: SamplingState, i: Any, emitted: Emitted) -> tuple[Slots, Emitted]:
    """Draws each live slot's next token, records it as token i, and moves the slot on to it."""
    logits = logits.astype(jnp.float32)
    token = jnp.where(at.live, sample(logits, at.position + 1, sampling), at.token)
    live = at.live.astype(jnp.int32)
    stopped = jnp.any(token[:, None] == at.stop_ids, axis=-1)
    moved = Slots(
        token,
        at.position + live,
        at.live & ~stopped & (at.remaining > 1),
        at.remaining - live,
        at.stop_ids,
    )
    tokens = jax.lax.dynamic_update_slice(emitted.tokens, token[:, None], (0, i))
    emitted = emitted._replace(tokens=tokens, count=emitted.count + live)
    if emitted.top_ids.shape[1]:
        logprob, values, ids = top_logprobs(logits, token, emitted.top_ids.shape[-1])
        emitted = emitted._replace(
            logprob=jax.lax.dynamic_update_slice(emitted.logprob, logprob[:, None], (0, i)),
            top_logprobs=jax.lax.dynamic_update_slice(emitted.top_logprobs, values[:, None], (0, i, 0)),
            top_ids=jax.lax.dynamic_update_slice(emitted.top_ids, ids[:, None], (0, i, 0)),
        )
    return moved, emitted


def _no_tokens(slots: int, steps: int, logprobs: bool) -> Emitted:
    rows = steps if logprobs else 0
    return Emitted(
        jnp.zeros((slots, steps), jnp.int32),
        jnp.zeros((slots,), jnp.int32),
        jnp.zeros((slots, rows), jnp.float32),
        jnp.zeros((slots, rows, TOP_LOGPROBS), jnp.float32),
        jnp.zeros((slots, rows, TOP_LOGPROBS), jnp.int32),
    )


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.int32)


def _bools(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.bool_)


def _abstract_slots(slots: int) -> Slots:
    return Slots(_ints(slots), _ints(slots), _bools(slots), _ints(slots), _ints(slots, STOP_IDS))


def _abstract_sampling(slots: int) -> SamplingState:
    return SamplingState(*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in SamplingState.stack([], slots)))
