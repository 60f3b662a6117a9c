"""Finds calls of jax.lax.associative_scan in a graph.

JAX unrolls a call on T rows into a tree. Each level combines pairs of rows, scans the T // 2 results by the next level,
combines those with the rows left over, and interleaves the two. What is relied on is only that interleaving and that
first combination; that the whole tree is a prefix scan is then computed: every row of every value is an interval of the
scanned rows, the operator joins two adjacent ones, and row t of the result has to be [0, t].
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxinfer.graph import Equation, Graph, Node
from jaxinfer.passes.recognise_cut import Unrecognised, cut
from jaxinfer.passes.recognise_equation import scan_equation
from jaxinfer.passes.recognise_rows import Rows, Symbolic
from jaxinfer.passes.recognise_tree import SCOPE, Call, Change, Side, match, sliced, tree_equation


def find(graph: Graph) -> list[Change]:
    """For each call, its equation in its place."""
    calls: list[Call] = []
    known: dict[Any, Rows] = {}
    for node in results(graph):
        try:
            calls.append(_follow(node, known))
        except Unrecognised:
            continue
    readers = graph.consumers()
    return [scan_equation(call, readers) for call in _merged(calls)]


def results(graph: Graph) -> list[Node]:
    """Where trees end: values that no further level interleaves."""
    ends, inner = [], set()
    for equation in graph.equations:
        if (pads := _pads(equation)) is not None:
            ends.append(equation.outputs[0])
            inner.update(_still(p.inputs[0]) for p in pads if any(low for low, _, _ in p.params["padding_config"]))
    return [node for node in ends if node not in inner]


def _pads(equation: Equation) -> list[Equation] | None:
    """The paddings of the even and odd rows that an equation adds, as the end of each level does."""
    if equation.scope != SCOPE or equation.name not in ("add", "or"):
        return None
    pads = [n.equation for n in map(_still, equation.inputs) if n.equation is not None]
    return pads if len(pads) == 2 and all(p.scope == SCOPE and p.name == "pad" for p in pads) else None


def _still(node: Node) -> Node:
    """A value before it was moved to other dims."""
    while node.equation is not None and node.equation.scope == SCOPE:
        if node.equation.name not in ("transpose", "broadcast_in_dim"):
            break
        node = node.equation.inputs[0]
    return node


def _halves(node: Node) -> tuple[Node, Node, int]:
    """The even and the odd rows that were interleaved, and along which dim."""
    pads = _pads(node.equation) if node.equation is not None else None
    if pads is None or node.equation is None or any(p.outputs[0] not in node.equation.inputs for p in pads):
        raise Unrecognised("not interleaved")
    dims = {d for p in pads for d, c in enumerate(p.params["padding_config"]) if any(c)}
    if len(dims) != 1:
        raise Unrecognised("not interleaved along one dim")
    dim = dims.pop()
    even, odd = sorted(pads, key=lambda p: int(p.params["padding_config"][dim][0]))
    return even.inputs[0], odd.inputs[0], dim


def _follow(root: Node, known: dict[Any, Rows]) -> Call:
    """Recognises the call that ends in one result."""
    levels, node, dim = [], root, _halves(root)[2]
    while node.shape[dim] > 1:
        even, node, along = _halves(node)
        if along != dim:
            raise Unrecognised("interleaved along two dims")
        levels.append(sliced(tree_equation(tree_equation(even, "concatenate").inputs[0], "slice"), dim, 0))
    levels.append(node)  # a single row: what the last combination made
    if any(n.shape[dim] != root.shape[dim] >> k for k, n in enumerate(levels)):
        raise Unrecognised("not halved")
    call = Call(root.shape[dim], {levels[0]: dim}, roots={levels[0]: root})
    for level, node in enumerate(levels[1:], 1):
        _unroll(call, node, levels[0], level)
    if call.first.keys() != call.dims.keys():
        raise Unrecognised("too few rows to see the whole operator")
    result = Symbolic(call, known).rows(root, levels[0])
    if result.first.any() or not np.array_equal(result.last, np.arange(call.rows)):
        raise Unrecognised("not a prefix scan")
    return call


def _unroll(call: Call, node: Node, source: Node, level: int) -> None:
    """Follows what the first combination of a level made back to the first level of all, which shows the operator."""
    todo, seen = [(node, source, level)], set()
    while todo:
        node, source, level = todo.pop()
        if (node, source) in seen:
            continue
        seen.add((node, source))
        if level == 1:
            _see(call, node, source)
        elif source in call.first:
            for (_, operand), end in match(call, source, node).items():
                todo.append((sliced(tree_equation(end, "slice"), call.dims[operand]), operand, level - 1))
        else:
            raise Unrecognised("an operand that the first level lacks")


def _see(call: Call, node: Node, source: Node) -> None:
    """Notes what the first combination makes of one operand, and the operands that it reads for it."""
    if call.first.setdefault(source, node) is not node:
        raise Unrecognised("two values for one operand")
    if source in call.cuts:
        return

    def is_end(value: Node, dim: int) -> bool:
        equation = value.equation
        if equation is None or equation.scope != SCOPE or equation.name != "slice":
            return False
        operand, p = sliced(equation, dim), equation.params
        if operand.shape[dim] != call.rows or (p["strides"] or (1,) * len(operand.shape))[dim] != 2:
            return False
        side: Side = (int(p["start_indices"][dim]), operand)
        if side[0] > 1 or call.ends.setdefault(value, side) != side or call.dims.setdefault(operand, dim) != dim:
            raise Unrecognised("rows are taken in two ways")
        return True

    dim = call.dims[source]
    found = cut(node, dim, is_end)
    shapes = [tuple(n for d, n in enumerate(v.shape) if d != dim) for v in (node, source)]
    if shapes[0] != shapes[1] or node.dtype != source.dtype:
        raise Unrecognised("the operator changes an operand's shape")
    if len(set(call.ends.values())) != len(call.ends):
        raise Unrecognised("one array is scanned twice in one call")
    call.cuts[source] = found


def _merged(calls: Sequence[Call]) -> list[Call]:
    """One call for all results that came of the same combination."""
    by_end: dict[Node, Call] = {}
    merged: list[Call] = []
    for call in calls:
        others = {id(o): o for end in call.ends if (o := by_end.get(end)) is not None}
        for other in others.values():
            merged.remove(other)
            if any(call.first.get(s, n) is not n for s, n in other.first.items()):
                call.ambiguous = True  # one array, scanned twice in one call
            call.ambiguous |= other.ambiguous
            for name in ("dims", "first", "ends", "cuts", "roots"):
                getattr(call, name).update(getattr(other, name))
        merged.append(call)
        by_end.update(dict.fromkeys(call.ends, call))
    return [call for call in merged if not call.ambiguous]
