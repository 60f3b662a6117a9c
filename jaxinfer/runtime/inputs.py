"""A request's whole inputs (an encoder's tokens, an image): checked against their specs, and stacked for the slots."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxinfer.errors import RequestError, TraceError
from jaxinfer.specs import Spec

Inputs = Mapping[str, np.ndarray]  # of one request, without a batch dim
Sizes = tuple[tuple[str, int], ...]  # of their named dims


def checked_specs(specs: Mapping[str, Spec]) -> dict[str, Spec]:
    """What a LanguageModel's `inputs` may be: a spec each, with a batch dim and without time."""
    for name, spec in specs.items():
        if not isinstance(spec, Spec):
            raise TraceError(f"inputs[{name!r}] should be a ji.spec, got {type(spec).__name__}")
        if "batch" not in spec.names or "time" in spec.names:
            raise TraceError(f"inputs[{name!r}] is {spec}: a request's input has a 'batch' dim and no 'time'")
    return dict(specs)


def checked(specs: Mapping[str, Spec], given: Mapping[str, Any] | None) -> tuple[dict[str, np.ndarray], Sizes]:
    """(arrays, sizes of their named dims) of one request.

    Raises:
        RequestError: another set of names, another shape or kind of number than the spec's.
    """
    given = {} if given is None else given
    if not isinstance(given, Mapping) or set(given) != set(specs):
        names = sorted(given) if isinstance(given, Mapping) else type(given).__name__
        raise RequestError(f"a request of this model has the inputs {sorted(specs)}, got {names}: give {{name: array}}")
    arrays, sizes = {}, {}
    for name, spec in specs.items():
        array = np.asarray(given[name])
        dims = [d for d in spec.dims if d != "batch"]
        if array.ndim != len(dims) or not np.can_cast(array.dtype, spec.dtype, "same_kind"):
            wanted = f"{spec.dtype}[{' '.join(map(str, dims))}]"
            raise RequestError(f"inputs[{name!r}] should be {wanted}, got {array.dtype}{list(array.shape)}")
        for dim, size in zip(dims, array.shape, strict=True):
            expected = dim if isinstance(dim, int) else sizes.setdefault(dim, size)
            if size != expected or not size:
                raise RequestError(f"inputs[{name!r}]: {dim} should be {expected or 'at least 1'}, got {size}")
        arrays[name] = array.astype(spec.dtype)
        if array.dtype.kind in "iu" and spec.dtype.kind in "iu" and (arrays[name] != array).any():
            raise RequestError(f"inputs[{name!r}]: {array[arrays[name] != array][0]} doesn't fit {spec.dtype}")
    return arrays, tuple(sorted(sizes.items()))


def stacked(specs: Mapping[str, Spec], requests: Sequence[Inputs], slots: int) -> list[np.ndarray]:
    """For each input, [slots, ...] with the batch dim of 1 where the forward has it; unused slots repeat the first."""
    padded = [*requests, *[requests[0]] * (slots - len(requests))]
    return [
        np.stack([np.expand_dims(request[name], spec.dims.index("batch")) for request in padded])
        for name, spec in sorted(specs.items())  # as jax flattens a dict
    ]
