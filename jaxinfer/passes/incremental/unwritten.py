"""Rows of a cache that aren't written yet: 0, since Step clears what an ended sequence left. What is made of them?

A causal mask gives such rows the weight 0, which hides anything finite. But 0 times infinity is NaN, so an operand of a
reduction that may be infinite there (one over a stored 0) is masked row by row; any other is read as it is.
"""

from jaxinfer.graph import Equation, Node
from jaxinfer.passes.incremental.bands import SAME
from jaxinfer.passes.incremental.causality import Timing
from jaxinfer.passes.incremental.demand import Demands, How, operand_views
from jaxinfer.passes.incremental.views import Kind, Views, kinds

# Finite wherever their operands are of ordinary size, or -inf where a mask says so.
_FINITE = SAME | frozenset(
    (
        "abs", "add", "and", "argmax", "argmin", "ceil", "clamp", "concatenate", "cos", "dot_general", "eq", "erf",
        "exp", "exp2", "expm1", "floor", "ge", "gt", "iota", "le", "logistic", "lt", "max", "min", "mul", "ne", "neg",
        "not", "or", "pad", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_sum", "round", "select_n",
        "sign", "sin", "square", "sub", "tanh", "xor",
    )
)  # fmt: skip


def may_spoil(demands: Demands, timing: Timing, node: Node, views: Views) -> bool:
    """Whether a view of a value may be infinite or NaN at rows that aren't written."""
    if node.constant or node not in timing.dims or Kind.PREFIX not in kinds(views):
        return False
    made = demands.serving(node, views)
    equation = node.equation
    if demands.made[node][made] is not How.COMPUTE or equation is None:
        return False
    operands = operand_views(equation, node, made, timing)
    if equation.name == "div":
        return _differs(demands, timing, *operands[1]) or may_spoil(demands, timing, *operands[0])
    return not _finite(equation) or any(may_spoil(demands, timing, n, v) for n, v in operands)


def _finite(equation: Equation) -> bool:
    return equation.name in _FINITE or (equation.name == "integer_pow" and equation.params["y"] > 0)


def _differs(demands: Demands, timing: Timing, node: Node, views: Views) -> bool:
    """Whether a value differs along its rows so far: not where it was spread out over them, as a softmax's sum is."""
    if node.constant or node not in timing.dims or Kind.PREFIX not in kinds(views):
        return False
    made, equation = demands.serving(node, views), node.equation
    if demands.made[node][made] is not How.COMPUTE or equation is None or equation.name not in SAME:
        return True
    return _differs(demands, timing, *operand_views(equation, node, made, timing)[0])
