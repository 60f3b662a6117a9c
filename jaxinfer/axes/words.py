"""Why an equation mixes rows, said in the words of who wrote the model."""

from collections.abc import Callable, Mapping

from jaxinfer.axes.blocked import BLOCKED
from jaxinfer.axes.factors import known_primitives, misunderstood
from jaxinfer.graph import Equation, Graph

_TELLS: dict[str, str] = {
    "sort": "sorts the rows of '{axis}'",
    "top_k": "picks the largest among the rows of '{axis}'",
    "approx_top_k": "picks the largest among the rows of '{axis}'",
    "argmax": "takes the argmax over '{axis}'",
    "argmin": "takes the argmin over '{axis}'",
    "rev": "reverses the order of the rows of '{axis}'",
    "fft": "is a Fourier transform over '{axis}'",
    "reshape": "regroups '{axis}' with other dims so that the rows are no longer told apart",
    "slice": "takes some rows of '{axis}' by their place",
    "dynamic_slice": "takes some rows of '{axis}' by their place",
    "dynamic_update_slice": "overwrites some rows of '{axis}' by their place",
    "unstack": "takes single rows of '{axis}' by their place",
    "split": "cuts '{axis}' into pieces",
    "concatenate": "joins other rows to '{axis}'",
    "pad": "adds rows to '{axis}'",
    "gather": "indexes the rows of '{axis}', so that a row can read any other",
    "scan": "scans over '{axis}' and carries a value from row to row",
    "while": "loops until a condition over all rows of '{axis}' holds",
    "cond": "takes a branch by a condition over several rows of '{axis}'",
    "conv_general_dilated": "is a convolution across the rows of '{axis}'",
    "reduce_window": "slides a window across the rows of '{axis}'",
    "scatter": "writes where an index over the rows of '{axis}' says, so that rows can overwrite each other",
}
_FAMILIES: Mapping[str, str] = {
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max", "reduce_window_min"), "reduce_window"),
    **dict.fromkeys(("scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max"), "scatter"),
}


def mixing(equation: Equation, axis: str, graph: Graph, dim: int | None = None) -> str:
    """What an equation does to the rows of an axis, as a clause without subject.

    Args:
        dim: the operand's dim in which the rows lie, where it is known.
    """
    name = _FAMILIES.get(equation.name, equation.name)
    special: dict[str, Callable[[], str]] = {
        "reduce_sum": lambda: _sum(axis),
        "reduce_max": lambda: _maximum(equation, axis, graph, dim),
        "dot_general": lambda: _contraction(equation, axis, dim),
    }
    if name in special:
        return special[name]()
    if name in BLOCKED:
        return f"{BLOCKED[name]}; so '{axis}' can't be followed through it"
    if name not in known_primitives() and name not in ("scan", "while", "cond", "custom_linear_solve"):
        return f"has no axis rule: jaxinfer doesn't know what {name} does to the rows of '{axis}'"
    if name in known_primitives() and (strange := misunderstood(equation)):
        told = ", ".join(f"{p}={equation.params[p]!r}" for p in strange)
        return f"has parameters that no axis rule understands ({told}), so '{axis}' can't be followed through it"
    if name.startswith("cum"):
        return f"is a cumulative operation over '{axis}': a row adds to those after it"
    general = f"reduces over '{axis}'" if name.startswith("reduce") else f"needs '{axis}' as a whole"
    return _TELLS.get(name, general).format(axis=axis)


def _sum(axis: str) -> str:
    """A sum over rows. Statistics over a batch are nearly always BatchNorm that was left in training mode."""
    hint = ""
    if axis == "batch":
        hint = ": BatchNorm in training mode? Call model.eval(), or pass use_running_average=True"
    return f"sums or averages over '{axis}'{hint}"


def _maximum(equation: Equation, axis: str, graph: Graph, dim: int | None) -> str:
    """A maximum that is then subtracted before exp is a softmax."""
    reach, seen = {equation.outputs[0]}, 0
    for other in graph.equations:
        if any(node in reach for node in other.inputs):
            if other.name == "exp":
                where = f" (dim {dim})" if dim is not None else ""
                return f"is a softmax over '{axis}'{where}; give axis= the dim of the classes, not of the rows"
            reach.update(other.outputs)
            seen += 1
            if seen > 8:
                break
    return f"takes the maximum over '{axis}'"


def _contraction(equation: Equation, axis: str, dim: int | None) -> str:
    (left, right), _ = equation.params["dimension_numbers"]
    if dim is not None and (dim in left or dim in right):
        return f"multiplies and sums over '{axis}': every row adds to the result (attention or a product across rows?)"
    return f"pairs every row of '{axis}' with every other"
