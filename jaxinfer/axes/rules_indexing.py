"""Factor rules of scatter and dynamic_update_slice (gather and slices: factors.py), of placement and of random keys."""

from jaxinfer.axes.factors import Factors, align, rule
from jaxinfer.graph import Equation

_SCATTERS = ("scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max")


@rule(
    *_SCATTERS,
    params="update_jaxpr update_consts dimension_numbers indices_are_sorted unique_indices mode",
)
def _scatter(equation: Equation) -> Factors:
    """Dims of the operand that every update spans whole are aligned with the update's; so are batching dims.

    Dims that are indexed are needed whole, and so are the updates' own dims: which lands where depends on the indices.
    """
    operand, indices, updates = equation.inputs
    numbers = equation.params["dimension_numbers"]
    result: list[int | None] = [None] * len(operand.shape)
    update: list[int | None] = [None] * len(updates.shape)
    index: list[int | None] = [None] * len(indices.shape)
    dropped = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    windows = [d for d in range(len(operand.shape)) if d not in dropped]
    for theirs, mine in zip(numbers.update_window_dims, windows, strict=True):
        if mine not in numbers.scatter_dims_to_operand_dims and updates.shape[theirs] == operand.shape[mine]:
            update[theirs] = result[mine] = mine
    # The updates' other dims are the indices' dims in order, without the last, which holds the index vectors.
    places = [d for d in range(len(updates.shape)) if d not in numbers.update_window_dims]
    batching = zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True)
    for mine, theirs in batching:
        result[mine] = index[theirs] = update[places[theirs]] = mine
    return Factors((tuple(result), tuple(index), tuple(update)), (tuple(result),))


@rule("dynamic_update_slice", params="")
def _dynamic_update_slice(equation: Equation) -> Factors:
    """Dims that the update spans whole are aligned: their start index is clamped to 0."""
    operand, update, *starts = equation.inputs
    dims = tuple(d if a == b else None for d, (a, b) in enumerate(zip(operand.shape, update.shape, strict=True)))
    return Factors((dims, dims, *((),) * len(starts)), (dims,))


@rule("tile", params="reps")
def _tile(equation: Equation) -> Factors:
    dims = tuple(d if n == 1 else None for d, n in enumerate(equation.params["reps"]))
    return Factors((dims,), (dims,), movement=True)


@rule("bitcast_convert_type", params="new_dtype")
def _bitcast(equation: Equation) -> Factors:
    """Between types of other widths the last dim counts the pieces of one element."""
    operand, out = equation.inputs[0].shape, equation.outputs[0].shape
    shared = min(len(operand), len(out))
    dims = [(*range(shared), *(None,) * (len(shape) - shared)) for shape in (operand, out)]
    return Factors((dims[0],), (dims[1],))


@rule("device_put", params="devices srcs copy_semantics")
@rule("sharding_constraint", params="sharding layout resource_env unconstrained_dims context_mesh")
@rule("layout_constraint", params="layout")
@rule("reshard", params="dst_sharding concrete_mesh")
@rule("pvary", params="axes axis_name")
def _placement(equation: Equation) -> Factors:
    """Says where a value lies and leaves it as it is; results pair with operands."""
    dims, base = [], 0
    for node in equation.inputs:
        dims.append(tuple(range(base, base + len(node.shape))))
        base += len(node.shape)
    return Factors(tuple(dims), tuple(dims))


@rule("random_fold_in", params="")
@rule("threefry2x32", params="")
def _keys_and_data(equation: Equation) -> Factors | None:
    """Elementwise, with scalars for what is the same everywhere."""
    out = equation.outputs[0]
    if any(len(n.shape) not in (0, len(out.shape)) for n in equation.inputs):
        return None
    inputs = tuple(align(out, node) for node in equation.inputs)
    return Factors(inputs, (tuple(range(len(out.shape))),) * len(equation.outputs))


@rule("random_seed", "random_wrap", "random_unwrap", "random_clone", params="impl")
@rule("random_bits", params="bit_width shape")
@rule("random_split", params="shape")
def _keys(equation: Equation) -> Factors:
    """A key draws for itself alone; the dims that are drawn (the last ones) are one draw, not independent rows."""
    keys = equation.inputs[0].shape
    drawn = len(equation.params["shape"]) if "shape" in equation.params else 0
    out = equation.outputs[0].shape
    count = len(out) - drawn if drawn else min(len(keys), len(out))
    dims = [(*range(count), *(None,) * (len(n.shape) - count)) for n in (*equation.inputs, *equation.outputs)]
    return Factors(tuple(dims[: len(equation.inputs)]), tuple(dims[len(equation.inputs) :]))
