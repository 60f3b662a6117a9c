"""Factor rules of windowed reductions: dims that the window doesn't span are aligned, the others needed whole."""

from collections.abc import Sequence
from typing import Any

from jaxinfer.axes.factors import Factors, rule
from jaxinfer.graph import Equation


def _untouched(params: dict[str, Any]) -> list[bool]:
    """For each dim, whether windows are single elements, one for each element of the operand."""
    size, stride, padding = params["window_dimensions"], params["window_strides"], params["padding"]
    rank = len(size)
    base, window = (params.get(name) or (1,) * rank for name in ("base_dilation", "window_dilation"))
    return [size[d] == stride[d] == base[d] == window[d] == 1 and tuple(padding[d]) == (0, 0) for d in range(rank)]


_WINDOW = "window_dimensions window_strides padding base_dilation window_dilation"


@rule(
    "reduce_window_sum",
    "reduce_window_max",
    "reduce_window_min",
    "reduce_window",
    "select_and_gather_add",
    "select_and_scatter_add",
    "select_and_scatter",
    params=f"{_WINDOW} jaxpr consts select_prim select_jaxpr select_consts scatter_jaxpr scatter_consts",
)
def _windows(equation: Equation) -> Factors:
    dims = tuple(d if free else None for d, free in enumerate(_untouched(equation.params)))
    # A general reduction's initial values are scalars.
    inputs = tuple(dims if len(n.shape) == len(dims) else (None,) * len(n.shape) for n in equation.inputs)
    return Factors(inputs, (dims,) * len(equation.outputs))


def _without(rank: int, axes: Sequence[int]) -> tuple[int | None, ...]:
    return tuple(None if d in axes else d for d in range(rank))


@rule("reduce", params="computation jaxpr consts dimensions")
def _general_reduce(equation: Equation) -> Factors:
    """Any reduction function: which value is neutral to it is unknown, so that reduced dims are needed whole."""
    axes, rank = equation.params["dimensions"], len(equation.inputs[0].shape)
    dims = _without(rank, axes)
    kept = tuple(d for d in dims if d is not None)
    half = len(equation.inputs) // 2  # operands, then their initial values
    return Factors((dims,) * half + ((),) * half, (kept,) * len(equation.outputs))


@rule("reduce_xor", params="axes out_sharding")
def _reduce_xor(equation: Equation) -> Factors:
    dims = _without(len(equation.inputs[0].shape), equation.params["axes"])
    return Factors((dims,), (tuple(d for d in dims if d is not None),))


@rule(
    "approx_top_k",
    params="k reduction_dimension recall_target is_max_k reduction_input_size_override aggregate_to_topk",
)
def _approx_top_k(equation: Equation) -> Factors:
    rank = len(equation.inputs[0].shape)
    dims = _without(rank, [equation.params["reduction_dimension"] % rank])
    return Factors((dims,), (dims,) * len(equation.outputs))
