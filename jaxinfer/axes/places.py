"""Where rows go in what factor rules can't express: dims merged and split, blocks of rows, indexing by row number."""

from collections.abc import Sequence

import numpy as np

from jaxinfer.axes.factors import reshape_groups
from jaxinfer.axes.proof import Walk, special
from jaxinfer.axes.states import FREE, HERE, Free, Index, Mixed, Rows, State, merged, reshaped
from jaxinfer.graph import Equation


@special("optimization_barrier", "device_put", "sharding_constraint", "layout_constraint", "reshard", "pvary")
def _pairs(walk: Walk, equation: Equation, inputs: Sequence[State]) -> list[State] | None:
    """Results pair with operands."""
    return list(inputs) if len(inputs) == len(equation.outputs) else None


@special("reshape")
def _reshape(walk: Walk, equation: Equation, inputs: Sequence[State]) -> list[State] | None:
    (state,) = inputs
    before, out = equation.inputs[0].shape, equation.outputs[0]
    order = equation.params.get("dimensions")
    if order is not None:  # vmap of a convolution transposes first
        if not isinstance(state, Rows) or state == HERE:
            return None
        before = tuple(before[d] for d in order)
        state = Rows(tuple(order).index(state.dim), state.outer, state.inner)
    if isinstance(state, Index) and state.parts is None:
        place = reshaped(before, out.shape, Rows(state.dim), walk.rows)
        alone = place is not None and place.outer == place.inner == 1
        return [Index(place.dim, state.otherwise)] if place is not None and alone else [state.otherwise]
    if isinstance(state, Rows) and state != HERE:
        place = reshaped(before, out.shape, state, walk.rows)
        return [place] if place is not None else walk.mix(equation)
    if isinstance(state, Free) and state.uniform:
        return [_uniform(walk, equation, state)]
    return None


def _uniform(walk: Walk, equation: Equation, state: Free) -> State:
    """A value without rows that is constant along `uniform`: whole groups stay so, else it lies as rows would."""
    before, out = equation.inputs[0].shape, equation.outputs[0]
    grown = walk.sizes.grown(out)
    kept = {
        d for mine, theirs in reshape_groups(before, out.shape) if all(m in state.uniform for m in mine) for d in theirs
    }
    if grown <= kept:
        return Free(frozenset(grown), state.known)
    (dim, *more) = state.uniform
    size = before[dim] // walk.rows
    for inner in (n for n in range(1, size + 1) if size % n == 0):
        place = reshaped(before, out.shape, Rows(dim, size // inner, inner), walk.rows)
        if not more and place is not None and grown == {place.dim}:
            return place
    return walk.mix(equation)[0]


@special("broadcast_in_dim", "transpose", "squeeze", "expand_dims", "convert_element_type", "copy", "stop_gradient")
def _moves_index(walk: Walk, equation: Equation, inputs: Sequence[State]) -> list[State] | None:
    """Row numbers stay row numbers where they are only moved."""
    state = inputs[0]
    if not isinstance(state, Index) or state.parts is not None or len(inputs) > 1:
        return None
    out = equation.outputs[0]
    if equation.name == "convert_element_type" and out.dtype.kind not in "iu":
        return None
    dim = state.dim
    if equation.name == "broadcast_in_dim":
        dim = equation.params["broadcast_dimensions"][dim]
    elif equation.name == "transpose":
        dim = equation.params["permutation"].index(dim)
    elif equation.name == "squeeze":
        dim -= sum(d < dim for d in equation.params["dimensions"])
    elif equation.name == "expand_dims":
        dim = [d for d in range(len(out.shape)) if d not in equation.params["dimensions"]][dim]
    return [Index(dim, state.otherwise)] if walk.sizes.grown(out) == {dim} else [state.otherwise]


@special("lt", "select_n")
def _wrapped_index(walk: Walk, equation: Equation, inputs: Sequence[State]) -> list[State] | None:
    """jnp wraps negative indices, where(i < 0, i + n, i): row numbers never are negative."""
    if equation.name == "lt":
        zero = equation.inputs[1]
        if isinstance(inputs[0], Index) and inputs[0].parts is None and zero.constant and not np.any(zero.value):
            return [Free(walk.sizes.grown(equation.outputs[0]), known=False)]
        return None
    condition = inputs[0]
    if isinstance(condition, Free) and condition.known is not None:
        return [inputs[1 + condition.known]]
    return None


@special("concatenate")
def _concatenate(walk: Walk, equation: Equation, inputs: Sequence[State]) -> list[State] | None:
    """Whole blocks of rows behind each other ([x, x] along the batch), or index vectors put together."""
    axis = equation.params["dimension"]
    indices = [s for s in inputs if isinstance(s, Index)]
    if indices:
        return _index_vectors(walk, equation, inputs, indices[0], axis)
    places = [s for s in inputs if isinstance(s, Rows) and s.dim == axis]
    if not places or len({s.inner for s in places}) != 1 or any(isinstance(s, Mixed) for s in inputs):
        return None
    block, outer = walk.rows * places[0].inner, 0
    for node, state in zip(equation.inputs, inputs, strict=True):
        whole = isinstance(state, Free) and axis in state.uniform and node.shape[axis] % block == 0
        if not (whole or (isinstance(state, Rows) and state.dim == axis)):
            return None
        outer += node.shape[axis] // block
    if equation in walk.sizes.odd or walk.sizes.grown(equation.outputs[0]) != {axis}:
        return None
    return [Rows(axis, outer, places[0].inner)]


def _index_vectors(
    walk: Walk, equation: Equation, inputs: Sequence[State], first: Index, axis: int
) -> list[State] | None:
    out = equation.outputs[0]
    if axis != len(out.shape) - 1 or first.dim == axis or walk.sizes.grown(out) != {first.dim}:
        return None
    parts: set[int] = set()
    at = 0
    for node, state in zip(equation.inputs, inputs, strict=True):
        if isinstance(state, Index) and state.dim == first.dim and state.parts is None:
            parts.update(range(at, at + node.shape[axis]))
        elif not (state == Rows(first.dim) or (isinstance(state, Free) and walk.sizes.grown(node) <= state.uniform)):
            return None
        at += node.shape[axis]
    return [Index(first.dim, first.otherwise, frozenset(parts))]


@special("slice", "split")
def _blocks(walk: Walk, equation: Equation, inputs: Sequence[State]) -> list[State] | None:
    """Whole blocks of rows taken apart again, or every inner-th element of merged rows."""
    (state,) = inputs
    if not isinstance(state, Rows) or state == HERE:
        return None
    dim, block = state.dim, walk.rows * state.inner
    if equation.name == "split":
        sizes = equation.params["sizes"]
        if equation.params["axis"] != dim or any(n % block for n in sizes):
            return None
        return [Rows(dim, n // block, state.inner) for n in sizes]
    start, limit = equation.params["start_indices"][dim], equation.params["limit_indices"][dim]
    stride = (equation.params["strides"] or {dim: 1})[dim]
    moves = start == 0 or not walk.sizes.compared or equation in walk.sizes.moved
    if stride == 1 and start % block == 0 and limit % block == 0 and moves and equation not in walk.sizes.odd:
        return [Rows(dim, (limit - start) // block, state.inner)]
    count = equation.outputs[0].shape[dim]
    if stride == state.inner > 1 and start < stride and count == state.outer * walk.rows:
        return walk.mix(equation) if equation in walk.sizes.odd else [Rows(dim, state.outer, 1)]
    return None


@special("conv_general_dilated")
def _grouped(walk: Walk, equation: Equation, inputs: Sequence[State]) -> list[State] | None:
    """vmap of a convolution over kernels too: the rows are groups of features."""
    groups = equation.params["feature_group_count"]
    lhs_spec, rhs_spec, out_spec = equation.params["dimension_numbers"]
    if walk.sizes.compared and equation not in walk.sizes.moved:
        return None
    lhs, rhs = inputs
    places = [s if isinstance(s, Rows) and s.outer == 1 else None for s in (lhs, rhs)]
    if places[0] is None or places[1] is None or groups % walk.rows:
        return walk.mix(equation) if equation in walk.sizes.moved and merged(inputs) is None else None
    if (places[0].dim, places[1].dim) != (lhs_spec[1], rhs_spec[0]):
        return walk.mix(equation) if equation in walk.sizes.moved else None
    return [Rows(out_spec[1], 1, places[1].inner)]


@special("tile")
def _tile(walk: Walk, equation: Equation, inputs: Sequence[State]) -> list[State] | None:
    (state,) = inputs
    reps, out = equation.params["reps"], equation.outputs[0]
    if isinstance(state, Rows) and state != HERE:
        return [Rows(state.dim, state.outer * reps[state.dim], state.inner)]
    grown = walk.sizes.grown(out)
    if state is FREE and len(grown) == 1:  # a shared value repeated for every row
        (dim,) = grown
        each = equation.inputs[0].shape[dim]
        return [Free(grown) if each == 1 else Rows(dim, out.shape[dim] // (each * walk.rows), each)]
    return None


@special("gather")
def _gather(walk: Walk, equation: Equation, inputs: Sequence[State]) -> list[State] | None:
    """x[arange(batch), ...]: each row reads itself."""
    operand, index = inputs
    if isinstance(index, Mixed) and _wraps(walk, operand, index):
        return walk.blame(equation, index)
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    if not isinstance(index, Index) or not (isinstance(operand, Rows) and operand != HERE):
        return None
    if not _reads_itself(equation, index, operand, numbers.start_index_map) or sizes[operand.dim] != 1:
        return [index.otherwise]
    batch = [d for d in range(len(equation.outputs[0].shape)) if d not in numbers.offset_dims]
    if operand.dim not in numbers.collapsed_slice_dims or equation in walk.sizes.odd:
        return [index.otherwise]
    place = batch[index.dim]
    return [Rows(place)] if walk.sizes.grown(equation.outputs[0]) == {place} else [index.otherwise]


def _wraps(walk: Walk, operand: State, index: Mixed) -> bool:
    """Whether an index over rows was wrapped, where(i < 0, i + rows, i): that number of rows is not what mixes them."""
    if not isinstance(operand, Rows) or index.equation is None:
        return False
    wrap = index.equation
    return wrap.name == "add" and wrap.outputs[0].dtype.kind in "iu" and any(n in walk.sizes.odd for n in wrap.inputs)


def _reads_itself(equation: Equation, index: Index, operand: Rows, targets: Sequence[int]) -> bool:
    """Whether the index of the operand's rows, and it alone, is the number of the row."""
    rank = len(equation.inputs[1].shape)
    if operand.outer != 1 or operand.inner != 1 or operand.dim not in targets or index.dim == rank - 1:
        return False
    parts = index.parts if index.parts is not None else frozenset(range(equation.inputs[1].shape[-1]))
    return parts == {list(targets).index(operand.dim)}


@special("scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max")
def _scatter(walk: Walk, equation: Equation, inputs: Sequence[State]) -> list[State] | None:
    """x.at[arange(batch), ...].set(y): each row writes to itself."""
    operand, index, updates = inputs
    if isinstance(index, Mixed) and _wraps(walk, operand, index):
        return walk.blame(equation, index)
    numbers = equation.params["dimension_numbers"]
    if not isinstance(index, Index):
        return None
    out = equation.outputs[0]
    if isinstance(operand, Free) and operand.uniform and walk.sizes.grown(out) == operand.uniform:
        (dim,) = operand.uniform
        operand = Rows(dim) if out.shape[dim] == walk.rows else operand
    if not isinstance(operand, Rows) or operand == HERE:
        return [index.otherwise]
    places = [d for d in range(len(equation.inputs[2].shape)) if d not in numbers.update_window_dims]
    fits = (
        _reads_itself(equation, index, operand, numbers.scatter_dims_to_operand_dims)
        and operand.dim in numbers.inserted_window_dims
        and equation not in walk.sizes.odd
    )
    if not fits:
        return [index.otherwise]
    place = places[index.dim]
    own = updates == Rows(place) or (isinstance(updates, Free) and walk.sizes.grown(equation.inputs[2]) == {place})
    return [operand] if own or updates is FREE else [index.otherwise]
