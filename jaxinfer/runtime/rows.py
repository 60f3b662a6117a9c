"""Every row of given sequences, through the derived step in chunks: logits, or log probabilities of the next tokens."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxinfer.buckets import bucket_for
from jaxinfer.results import Score
from jaxinfer.runtime.inputs import Inputs
from jaxinfer.runtime.programs import SLOTS, Programs

_SLOTS = 8  # sequences at a time
_ROWS = 1024  # rows of one call over all slots: each has logits over the whole vocabulary


Requests = Sequence[Inputs]  # the whole inputs of each sequence; {} each where the model has none


def logits_of(programs: Programs, sequences: Sequence[list[int]], requests: Requests) -> np.ndarray:
    """Logits of sequences of equal length: [sequences, time, vocab]."""

    def chunk(now: Any, following: Any, counts: Any, positions: Any, length: int, state: Any) -> Any:
        del following
        slots, k = now.shape
        return programs.logits(k, slots, length)(now, counts, positions, state)

    return np.stack([row for group in _groups(sequences, requests) for row in _rows(programs, *group, chunk)])


def scores_of(programs: Programs, sequences: Sequence[list[int]], requests: Requests) -> list[Score]:
    """Log probability of each token given those before it."""

    def chunk(now: Any, following: Any, counts: Any, positions: Any, length: int, state: Any) -> Any:
        slots, k = now.shape
        return programs.score(k, slots, length)(now, following, counts, positions, state)

    rows = [row for group in _groups(sequences, requests) for row in _rows(programs, *group, chunk)]
    return [Score(tuple(ids), row[:-1]) for ids, row in zip(sequences, rows, strict=True)]


def _groups(sequences: Sequence[list[int]], requests: Requests) -> Iterator[tuple[Sequence[list[int]], Requests]]:
    for start in range(0, len(sequences), _SLOTS):
        yield sequences[start : start + _SLOTS], requests[start : start + _SLOTS]


def _rows(
    programs: Programs, sequences: Sequence[list[int]], requests: Requests, chunk: Callable[..., Any]
) -> list[np.ndarray]:
    """One array [len(sequence), ...] for each sequence of a group that shares a batch."""
    slots = bucket_for(len(sequences), SLOTS, "slots")
    longest = max(map(len, sequences))
    length = bucket_for(longest, programs.lengths, "sequence length")
    table = np.zeros((slots, longest + 1), np.int32)
    wanted = np.zeros(slots, np.int32)
    for i, ids in enumerate(sequences):
        table[i, : len(ids)] = ids
        wanted[i] = len(ids)
    state, parts, done = programs.started_state(requests, slots, length), [], 0
    while done < longest:
        k = programs.chunk_for(min(longest - done, _ROWS // slots), slots)
        now, following = (_columns(table, done + shift, k) for shift in (0, 1))
        counts = np.clip(wanted - done, 0, k).astype(np.int32)
        rows, state = chunk(now, following, counts, np.full(slots, done, np.int32), length, state)
        parts.append(np.asarray(rows))
        done += k
    joined = np.concatenate(parts, axis=1)
    return [joined[i, : len(ids)] for i, ids in enumerate(sequences)]


def _columns(table: np.ndarray, start: int, k: int) -> np.ndarray:
    piece = table[:, start : start + k]
    return np.pad(piece, ((0, 0), (0, k - piece.shape[1])))
