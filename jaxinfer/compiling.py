"""`compile`: a Program and its buckets to an Executable, compiled ahead of time or taken from the cache on disk."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import _jax
from jaxinfer.aot import CompileReport
from jaxinfer.errors import TraceError
from jaxinfer.executable import Executable, check_values
from jaxinfer.padding import Padding
from jaxinfer.passes.prepared import Prepared, UnsharedWeightsError
from jaxinfer.program import Program


def compile(
    program: Program,
    *,
    buckets: Mapping[str, Sequence[int]],
    dtype: Any = None,
    device: Any = None,
    ahead: bool = True,
    passes: Iterable[str] | None = None,
    masked: Iterable[str] = (),
) -> Executable:
    """Compiles a Program for one device.

    Args:
        buckets: for each named dim of the program, the sizes to compile.
        dtype: cast floating parameters to this first (and trace again at it); as they are by default.
        device: where to run; JAX's default device if not given.
        ahead: compile every bucket now, so that no call compiles. False compiles a bucket when it is first met.
        passes: names of the rewrites to run (`jaxinfer.passes.PIPELINE`), those that are on by default if not given.
            With none, [], the forward is compiled as it was traced and keeps all its weights.
        masked: named dims along which rows mix, but only as far as a mask among the inputs lets them: they are padded
            with zeros, which the model's own mask hides. It is checked by comparing runs.

    Raises:
        TraceError: a named dim without buckets or the reverse, or outputs in which named dims are merged.
    """
    if set(buckets) != set(program.axes):
        raise TraceError(f"{program.name} has the named dims {sorted(program.axes)}, got buckets for {sorted(buckets)}")
    if dtype is not None:
        program = replace(program, params=_cast(program.params, np.dtype(dtype)), _traces={})
    for dims in jax.tree.leaves(program.output_axes):
        for dim in dims:
            if isinstance(dim, str) and dim not in program.axes:
                raise TraceError(
                    f"an output of {program.name} merges named dims ({dim}); return them as dims of their own"
                )
    sizes = {name: sorted(set(buckets[name])) for name in program.axes}
    if any(not ladder or ladder[0] < 1 for ladder in sizes.values()):
        raise TraceError(f"buckets must be sizes of at least 1, got {dict(buckets)}")
    if unknown := set(masked := frozenset(masked)) - set(program.axes):
        raise TraceError(f"masked names {sorted(unknown)}; the named dims of {program.name} are {sorted(program.axes)}")
    device = device or jax.local_devices()[0]
    check_values(program.params)
    padding = Padding(program, sizes, masked, device)
    try:
        return _prepared(program, padding, passes, ahead)
    except UnsharedWeightsError:
        # A forward that branches on its shapes reads other weights in another bucket: then all are kept.
        return _prepared(program, padding, (), ahead)


def _prepared(program: Program, padding: Padding, passes: Iterable[str] | None, ahead: bool) -> Executable:
    prepared, report, device = Prepared(program, passes), CompileReport(), padding.device
    weights = prepared.weights(program.params, device, report)
    bare = prepared.without_values(program)
    executable = Executable(bare, padding.buckets, device, weights, prepared, replace(padding, program=bare), report)
    if ahead:
        executable.warm_up()
    return executable


def _cast(params: Any, dtype: np.dtype) -> Any:
    def one(leaf: Any) -> Any:
        if not jnp.issubdtype(_jax.dtype_of(leaf), np.floating):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, dtype)
        return np.asarray(leaf).astype(dtype)

    return jax.tree.map(one, params)
