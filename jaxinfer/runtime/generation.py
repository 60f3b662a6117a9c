"""The host's side of generation for a fixed group of sequences: prefill in chunks, then decode until all have ended.

1. every sequence takes a slot; prompts go through prefill chunk by chunk, shorter ones idle in the later chunks
2. the last chunk of a prompt draws its first token
3. decode calls emit up to `steps` tokens a slot; the state grows to the next bucket when a sequence needs room
4. after each call the new tokens are yielded; whoever reads them may end a sequence (a stop string) between calls
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxinfer.buckets import bucket_for
from jaxinfer.runtime.inputs import Inputs, Sizes
from jaxinfer.runtime.programs import SLOTS, STEPS, STOP_IDS, Emitted, Programs, Slots
from jaxinfer.runtime.sampling import SamplingOptions, SamplingState


@dataclass
class Generated:
    """One sequence being generated."""

    prompt: list[int]
    options: SamplingOptions
    seed: int
    sample: int  # which of its prompt's samples
    limit: int  # new tokens at most
    stop_ids: frozenset[int]
    inputs: Inputs = field(default_factory=dict)  # the request's whole inputs, and the sizes of their named dims
    sizes: Sizes = ()
    tokens: list[int] = field(default_factory=list)  # emitted so far
    logprobs: list[tuple[float, np.ndarray, np.ndarray]] = field(default_factory=list)
    ended: bool = False


class Group:
    """Sequences that share a batch from their first token to the last one's end."""

    def __init__(self, programs: Programs, sequences: Sequence[Generated], logprobs: bool):
        self.programs, self.sequences, self.logprobs = programs, sequences, logprobs
        self.slots = bucket_for(len(sequences), SLOTS, "slots")
        longest = max(len(s.prompt) for s in sequences)
        # Room for the prompt and the next STEPS tokens at least; growing costs a copy and a program, reading unused
        # room costs time at every token, so up to 256 tokens to come are given room at once.
        ahead = max(min(s.limit, 8 * STEPS) for s in sequences)
        self.length = bucket_for(min(longest + ahead, programs.max_len), programs.lengths, "sequence length")
        if max(s.limit for s in sequences) > 1:
            self._decode_program()  # if the cache has it, it loads beside the prefill
        self.state: Any = programs.started_state([s.inputs for s in sequences], self.slots, self.length)
        self.sampling = SamplingState.stack([(s.options, s.seed, s.sample) for s in sequences], self.slots)
        self.at = Slots(
            np.zeros(self.slots, np.int32),
            np.zeros(self.slots, np.int32),
            np.array([i < len(sequences) for i in range(self.slots)]),
            np.array([s.limit for s in sequences] + [0] * (self.slots - len(sequences)), np.int32),
            _stop_ids(sequences, self.slots),
        )

    def run(self, steps: int = STEPS) -> Iterator[list[list[int]]]:
        """Yields, after every call that emitted, the new tokens of each sequence."""
        yield from self._prefill()
        while any(not s.ended for s in self.sequences):
            self._make_room(steps)
            at, emitted, self.state = self._decode_program()(self.at, self.sampling, np.int32(steps), self.state)
            self.at = Slots(*map(np.array, at))
            yield self._take(emitted)

    def _decode_program(self) -> Callable[..., Any]:
        return self.programs.decode(self.slots, self.length, self.logprobs)

    def end(self, index: int) -> None:
        """Ends a sequence: it takes part in no further call."""
        self.sequences[index].ended = True
        self.at.live[index] = False

    def _prefill(self) -> Iterator[list[list[int]]]:
        wanted = np.array([len(s.prompt) for s in self.sequences] + [0] * (self.slots - len(self.sequences)))
        done = np.zeros(self.slots, int)
        while (done < wanted).any():
            k = self.programs.chunk_for(int((wanted - done).max()), self.slots)
            counts = np.minimum(wanted - done, k).astype(np.int32)
            tokens = np.zeros((self.slots, k), np.int32)
            for i, s in enumerate(self.sequences):
                tokens[i, : counts[i]] = s.prompt[done[i] : done[i] + counts[i]]
            ends = (counts > 0) & (done + counts == wanted)
            program = self.programs.prefill(k, self.slots, self.length, not done.any(), self.logprobs)
            before = self.at
            at, emitted, self.state = program(tokens, counts, ends, before, self.sampling, self.state)
            at = Slots(*map(np.array, at))
            # A sequence whose prompt goes on stays as it was but for its position.
            at.live[~ends] = before.live[~ends]
            self.at = at
            done += counts
            if ends.any():
                yield self._take(emitted)

    def _make_room(self, steps: int) -> None:
        ahead = self.at.position + np.minimum(self.at.remaining, steps)
        need = max(int(n) for n, s in zip(ahead, self.sequences, strict=False) if not s.ended)
        if need > self.length:
            length = bucket_for(need, self.programs.lengths, "sequence length")
            (self.state,) = self.programs.grow(self.slots, self.length, length)(self.state)
            self.length = length

    def _take(self, emitted: Emitted) -> list[list[int]]:
        tokens, count = np.asarray(emitted.tokens), np.asarray(emitted.count)
        fresh = []
        for i, s in enumerate(self.sequences):
            new = [] if s.ended else tokens[i, : count[i]].tolist()
            overlong = next((j for j, t in enumerate(new) if t in s.stop_ids), None)
            new = new if overlong is None else new[: overlong + 1]
            s.tokens += new
            if self.logprobs and new:
                parts = (np.asarray(p)[i] for p in (emitted.logprob, emitted.top_logprobs, emitted.top_ids))
                s.logprobs += list(zip(*(p[: len(new)] for p in parts), strict=True))
            if overlong is not None or (new and not self.at.live[i]):
                self.end(i)
            fresh.append(new)
        return fresh


def _stop_ids(sequences: Sequence[Generated], slots: int) -> np.ndarray:
    """The first STOP_IDS stop tokens of each sequence for the device; `_take` looks for all of them."""
    table = np.full((slots, STOP_IDS), -1, np.int32)
    for row, s in zip(table, sequences, strict=False):
        ids = sorted(s.stop_ids)[:STOP_IDS]
        row[: len(ids)] = ids
    return table
