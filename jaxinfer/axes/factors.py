"""Factor rules: for each primitive, which dims of its operands and results are the same axis.

A factor is an index that the equation iterates. A dim of an operand and a dim of a result with the same factor are
aligned: index i of one goes with index i (+ shift) of the other. A factor that no result has is reduced. A dim without
a factor (None) is blocked: the equation needs it whole. What no rule understands is blocked, which is always safe.
"""

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxinfer.graph import Equation, Node

Dims = tuple[int | None, ...]


@dataclass(frozen=True)
class Factors:
    """The factor of each dim, for every operand and every result of one equation."""

    inputs: tuple[Dims, ...]
    outputs: tuple[Dims, ...]
    reduction: str | None = None  # how reduced factors combine: "dot", "sum", "max", "min", "and", "or", "prod"
    movement: bool = False  # only moves, broadcasts or applies an elementwise function: cheap enough to do again
    indexed: dict[int, int] = field(default_factory=dict)  # result dim of an iota -> 0, where values count along it
    # (operand, dim) -> (lo, hi): index i of the result reads the operand's rows i + lo .. i + hi; (0, 0) where absent.
    # Rows that the operand doesn't have are filled by the equation itself (padding, another piece of a concatenation).
    halo: Mapping[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    # factor -> "forward" | "reverse": index i of a result depends on every row up to i, or from i on.
    cumulative: Mapping[int, str] = field(default_factory=dict)

    @property
    def reduced(self) -> frozenset[int]:
        """Factors that operands have and no result has."""
        kept = {f for dims in self.outputs for f in dims}
        return frozenset(f for dims in self.inputs for f in dims if f is not None and f not in kept)


Rule = Callable[[Equation], Factors | None]
# A parameter's name -> whether its value is understood; None where every value is.
Params = Mapping[str, Callable[[Any], bool] | None]
_RULES: dict[str, tuple[Rule, Params]] = {}


def factors_of(equation: Equation) -> Factors:
    """The factors of an equation; all blocked where its primitive or one of its parameters isn't understood."""
    if equation.name not in _RULES or misunderstood(equation):
        return blocked(equation)
    return _RULES[equation.name][0](equation) or blocked(equation)


def misunderstood(equation: Equation) -> tuple[str, ...]:
    """Names of the parameters that the rule of a known primitive doesn't understand, by name or by value."""
    accepted = _RULES[equation.name][1]
    return tuple(
        name
        for name, value in equation.params.items()
        if name not in accepted or ((check := accepted[name]) is not None and not check(value))
    )


def known_primitives() -> frozenset[str]:
    """Names of the primitives that have a rule."""
    return frozenset(_RULES)


def blocked(equation: Equation) -> Factors:
    """Every dim needed whole."""
    inputs, outputs = (tuple((None,) * len(n.shape) for n in side) for side in (equation.inputs, equation.outputs))
    return Factors(inputs, outputs)


def rule(*names: str, params: str = "", **values: Callable[[Any], bool]) -> Callable[[Rule], Rule]:
    """Registers a function as the rule of these primitives.

    Args:
        params: names of the parameters that the rule understands whatever their value, apart by blanks.
        values: parameters of which it understands only the values that a function accepts. Any other name or value, as
            another JAX release may bring, blocks the equation.
    """
    accepted: Params = {**dict.fromkeys(params.split()), **values}

    def register(function: Rule) -> Rule:
        for name in names:
            if name in _RULES:
                raise ValueError(f"{name} has a rule already")
            _RULES[name] = function, accepted
        return function

    return register


def absent(value: Any) -> bool:
    """Accepts a parameter that is left at None, () or False."""
    return value is None or value is False or value == ()


def align(reference: Node, node: Node) -> Dims:
    """Factors of an operand that is elementwise with the result: size 1 against more is a broadcast, so no factor."""
    if not node.shape:
        return ()
    pairs = enumerate(zip(node.shape, reference.shape, strict=True))
    return tuple(d if mine == theirs else None for d, (mine, theirs) in pairs)


# fmt: off
ELEMENTWISE = (
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "bessel_i0e",
    "bessel_i1e", "cbrt", "ceil", "clamp", "clz", "complex", "conj", "convert_element_type", "copy", "copy_p",
    "cos", "cosh", "digamma", "div", "eq", "eq_to", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor",
    "ge", "gt", "igamma", "igammac", "imag", "integer_pow", "is_finite", "le", "le_to", "lgamma", "log", "log1p",
    "logistic", "lt", "lt_to", "max", "min", "mul", "ne", "neg", "nextafter", "not", "or", "population_count",
    "pow", "real", "reduce_precision", "regularized_incomplete_beta", "rem", "round", "rsqrt", "select_n",
    "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square",
    "stop_gradient", "sub", "tan", "tanh", "xor", "optimization_barrier", "name", "log2", "one_minus_square",
    "polynomial", "polygamma", "zeta", "igamma_grad_a", "mulhi",
)
# fmt: on


# None of these parameters changes which element of the result reads which elements of the operands.
_ELEMENTWISE_PARAMS = (
    "accuracy exponent_bits mantissa_bits new_dtype weak_type sharding y rounding_method out_dtype name unroll"
)


@rule(*ELEMENTWISE, params=_ELEMENTWISE_PARAMS)
def _elementwise(equation: Equation) -> Factors:
    if equation.name == "optimization_barrier":  # results pair with operands one to one
        base, inputs = 0, []
        for node in equation.inputs:
            inputs.append(tuple(range(base, base + len(node.shape))))
            base += len(node.shape)
        return Factors(tuple(inputs), tuple(inputs), movement=True)
    out = equation.outputs[0]
    inputs = tuple(align(out, node) for node in equation.inputs)
    return Factors(inputs, (tuple(range(len(out.shape))),), movement=True)


@rule("broadcast_in_dim", params="shape broadcast_dimensions sharding")
def _broadcast_in_dim(equation: Equation) -> Factors:
    operand, out = equation.inputs[0], equation.outputs[0]
    if len(equation.inputs) > 1:
        return blocked(equation)
    to = equation.params["broadcast_dimensions"]
    inputs = tuple(d if n == out.shape[d] else None for n, d in zip(operand.shape, to, strict=True))
    return Factors((inputs,), (tuple(range(len(out.shape))),), movement=True)


@rule("transpose", params="permutation")
def _transpose(equation: Equation) -> Factors:
    order = equation.params["permutation"]
    return Factors((tuple(range(len(order))),), (tuple(order),), movement=True)


@rule("squeeze", params="dimensions")
def _squeeze(equation: Equation) -> Factors:
    dims = range(len(equation.inputs[0].shape))
    gone = equation.params["dimensions"]
    inputs = tuple(None if d in gone else d for d in dims)
    return Factors((inputs,), (tuple(d for d in dims if d not in gone),), movement=True)


@rule("expand_dims", params="dimensions")
def _expand_dims(equation: Equation) -> Factors:
    out, new = equation.outputs[0], equation.params["dimensions"]
    kept = tuple(d for d in range(len(out.shape)) if d not in new)
    return Factors((kept,), (tuple(range(len(out.shape))),), movement=True)


@rule("reshape", params="new_sizes sharding", dimensions=absent)
def _reshape(equation: Equation) -> Factors | None:
    if equation.params.get("dimensions") is not None:
        return None
    before, after = equation.inputs[0].shape, equation.outputs[0].shape
    inputs: list[int | None] = [None] * len(before)
    outputs: list[int | None] = [None] * len(after)
    for number, (mine, theirs) in enumerate(reshape_groups(before, after)):
        if len(mine) == len(theirs) == 1:  # dims that stay as they are; merged and split ones are blocked
            inputs[mine[0]] = outputs[theirs[0]] = number
    return Factors((tuple(inputs),), (tuple(outputs),), movement=True)


def reshape_groups(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The smallest groups of dims with equal products, in order; dims of size 1 belong to none."""
    mine = [d for d, n in enumerate(before) if n != 1]
    theirs = [d for d, n in enumerate(after) if n != 1]
    if 0 in before:
        return []
    groups: list[tuple[list[int], list[int]]] = []
    while mine and theirs:
        left, right = [mine.pop(0)], [theirs.pop(0)]
        a, b = before[left[0]], after[right[0]]
        while a != b:
            if a < b:
                left.append(mine.pop(0))
                a *= before[left[-1]]
            else:
                right.append(theirs.pop(0))
                b *= after[right[-1]]
        groups.append((left, right))
    return groups


_REDUCTIONS = {
    "reduce_sum": "sum",
    "reduce_max": "max",
    "reduce_min": "min",
    "reduce_and": "and",
    "reduce_or": "or",
    "reduce_prod": "prod",
    "argmax": "max",
    "argmin": "min",
}


@rule(*_REDUCTIONS, params="axes index_dtype out_sharding")
def _reduce(equation: Equation) -> Factors:
    axes = equation.params["axes"]
    dims = tuple(range(len(equation.inputs[0].shape)))
    kept = tuple(d for d in dims if d not in axes)
    return Factors((dims,), (kept,), reduction=_REDUCTIONS[equation.name])


@rule("dot_general", params="dimension_numbers precision preferred_element_type out_sharding")
def _dot_general(equation: Equation) -> Factors:
    (left_sum, right_sum), (left_batch, right_batch) = equation.params["dimension_numbers"]
    left, right = (list(n.shape) for n in equation.inputs)
    names = iter(range(len(left) + len(right)))
    lhs: list[Any] = [None] * len(left)
    rhs: list[Any] = [None] * len(right)
    for a, b in [*zip(left_batch, right_batch, strict=True), *zip(left_sum, right_sum, strict=True)]:
        lhs[a] = rhs[b] = next(names)
    out = [lhs[d] for d in left_batch]
    for dims, dims_sum, dims_batch in ((lhs, left_sum, left_batch), (rhs, right_sum, right_batch)):
        for d in range(len(dims)):
            if d not in dims_sum and d not in dims_batch:
                dims[d] = next(names)
                out.append(dims[d])
    return Factors((tuple(lhs), tuple(rhs)), (tuple(out),), reduction="dot")


@rule("iota", params="dtype shape dimension sharding")
def _iota(equation: Equation) -> Factors:
    out = equation.outputs[0]
    return Factors((), (tuple(range(len(out.shape))),), movement=True, indexed={equation.params["dimension"]: 0})


def _all_but(equation: Equation, *axes: int, movement: bool = False) -> Factors:
    """Aligned dims on every operand and result, except `axes`, which are needed whole."""
    dims = tuple(None if d in axes else d for d in range(len(equation.outputs[0].shape)))
    return Factors((dims,) * len(equation.inputs), (dims,) * len(equation.outputs), movement=movement)


@rule("concatenate", params="dimension")
def _concatenate(equation: Equation) -> Factors:
    axis, dims = equation.params["dimension"], tuple(range(len(equation.outputs[0].shape)))
    halo, start = {}, 0
    for number, piece in enumerate(equation.inputs):
        halo[number, axis] = (-start, -start)
        start += piece.shape[axis]
    return Factors((dims,) * len(equation.inputs), (dims,), movement=True, halo=_moved(halo))


def _moved(halo: Mapping[tuple[int, int], tuple[int, int]]) -> dict[tuple[int, int], tuple[int, int]]:
    return {place: reach for place, reach in halo.items() if reach != (0, 0)}


@rule("stack", params="axis")
def _stack(equation: Equation) -> Factors:
    out, axis = equation.outputs[0], equation.params["axis"]
    dims = tuple(range(len(out.shape)))
    kept = tuple(d for d in dims if d != axis)
    return Factors((kept,) * len(equation.inputs), (dims,), movement=True)


@rule("unstack", params="axis")
def _unstack(equation: Equation) -> Factors:
    axis = equation.params["axis"]
    dims = tuple(None if d == axis else d for d in range(len(equation.inputs[0].shape)))
    kept = tuple(d for d in dims if d is not None)
    return Factors((dims,), (kept,) * len(equation.outputs), movement=True)


@rule("split", params="sizes axis")
def _split(equation: Equation) -> Factors:
    return _all_but(equation, equation.params["axis"], movement=True)


@rule("rev", params="dimensions")
def _rev(equation: Equation) -> Factors:
    return _all_but(equation, *equation.params["dimensions"], movement=True)


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", params="axis reverse")
def _cumulative(equation: Equation) -> Factors:
    dims = tuple(range(len(equation.outputs[0].shape)))
    direction = "reverse" if equation.params["reverse"] else "forward"
    return Factors((dims,), (dims,), cumulative={equation.params["axis"]: direction})


@rule("sort", params="dimension is_stable num_keys")
def _sort(equation: Equation) -> Factors:
    return _all_but(equation, equation.params["dimension"])


@rule("top_k", params="k axis is_stable")
def _top_k(equation: Equation) -> Factors | None:
    rank = len(equation.inputs[0].shape)
    if equation.params.get("axis", rank - 1) not in (-1, rank - 1):
        return None
    return _all_but(equation, rank - 1)


@rule("slice", params="start_indices limit_indices strides")
def _slice(equation: Equation) -> Factors:
    source, out = equation.inputs[0], equation.outputs[0]
    starts = equation.params["start_indices"]
    strides = equation.params["strides"] or (1,) * len(source.shape)
    kept = tuple(d if step == 1 or out.shape[d] == source.shape[d] else None for d, step in enumerate(strides))
    halo = {(0, d): (start, start) for d, start in enumerate(starts) if kept[d] is not None}
    return Factors((kept,), (kept,), movement=True, halo=_moved(halo))


@rule("pad", params="padding_config")
def _pad(equation: Equation) -> Factors:
    config = equation.params["padding_config"]
    kept = tuple(None if interior else d for d, (_, _, interior) in enumerate(config))
    halo = {(0, d): (-low, -low) for d, (low, _, _) in enumerate(config) if kept[d] is not None}
    return Factors((kept, ()), (kept,), movement=True, halo=_moved(halo))


@rule(
    "conv_general_dilated",
    params="window_strides padding lhs_dilation rhs_dilation dimension_numbers feature_group_count batch_group_count "
    "precision preferred_element_type out_sharding",
)
def _convolution(equation: Equation) -> Factors:
    """Spatial dims at stride 1 are a sliding window; channels are reduced unless grouped, then needed whole."""
    params = equation.params
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    rank = len(lhs_spec)
    lhs: list[int | None] = [None] * rank
    rhs: list[int | None] = [None] * rank
    out: list[int | None] = [None] * rank
    if params["batch_group_count"] == 1:
        lhs[lhs_spec[0]] = out[out_spec[0]] = 0
    if params["feature_group_count"] == params["batch_group_count"] == 1:
        rhs[rhs_spec[0]] = out[out_spec[1]] = 1
        lhs[lhs_spec[1]] = rhs[rhs_spec[1]] = 2
    halo = {}
    for number in range(rank - 2):
        a, b, c = lhs_spec[2 + number], rhs_spec[2 + number], out_spec[2 + number]
        if params["window_strides"][number] == params["lhs_dilation"][number] == 1:
            lhs[a] = out[c] = 3 + number
            low = params["padding"][number][0]
            last = (equation.inputs[1].shape[b] - 1) * params["rhs_dilation"][number]
            halo[0, a] = (-low, last - low)
    return Factors((tuple(lhs), tuple(rhs)), (tuple(out),), reduction="dot", halo=_moved(halo))


@rule("dynamic_slice", params="slice_sizes")
def _dynamic_slice(equation: Equation) -> Factors:
    source, out = equation.inputs[0], equation.outputs[0]
    kept = tuple(d if a == b else None for d, (a, b) in enumerate(zip(source.shape, out.shape, strict=True)))
    return Factors((kept, *((),) * (len(equation.inputs) - 1)), (kept,), movement=True)


@rule("gather", params="dimension_numbers slice_sizes unique_indices indices_are_sorted mode fill_value")
def _gather(equation: Equation) -> Factors | None:
    source, indices = equation.inputs
    out = equation.outputs[0]
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    results: list[int | None] = [None] * len(out.shape)
    operand: list[int | None] = [None] * len(source.shape)
    index: list[int | None] = [None] * len(indices.shape)
    batch_dims = [d for d in range(len(out.shape)) if d not in numbers.offset_dims]
    for factor, d in enumerate(batch_dims):
        results[d] = index[factor] = factor
    base = len(batch_dims)
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    for number, d in enumerate(k for k in range(len(source.shape)) if k not in dropped):
        if sizes[d] == source.shape[d]:  # whatever the start index: only 0 is within bounds
            operand[d] = results[numbers.offset_dims[number]] = base + number
    for mine, theirs in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        operand[mine] = index[theirs]
    return Factors((tuple(operand), tuple(index)), (tuple(results),), movement=True)


def describe(factors: Factors) -> str:
    """Einsum-like, for messages and tests: "ab,bc->ac"; a blocked dim is "_"."""

    def side(dims: Dims) -> str:
        return "".join("_" if f is None else string.ascii_letters[f % 52] for f in dims)

    return f"{','.join(map(side, factors.inputs))}->{','.join(map(side, factors.outputs))}"
