"""Moves transposes and broadcasts out of the trees of associative scans.

`vmap` along a dim that isn't the first leaves transposes all over a tree, and where one operand isn't mapped,
broadcasts: then no two applications of the operator look alike. Both are pulled up, through everything between a result
and what is scanned, to what is scanned: as if all of it had been mapped along one dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jax import lax

from jaxinfer.axes.factors import ELEMENTWISE
from jaxinfer.graph import Equation, Graph, Node
from jaxinfer.passes.recognise_tree import SCOPE, Change

Shape = tuple[int, ...]


@dataclass(frozen=True)
class View:
    """A value with its dims moved to `dims` of another shape, and broadcast to that."""

    shape: Shape
    dims: tuple[int, ...]

    @property
    def moves(self) -> bool:
        return self.dims != tuple(range(len(self.shape)))


Asked = tuple[Node, View]


def plain(node: Node) -> View:
    """A value as it is."""
    return View(node.shape, tuple(range(len(node.shape))))


def settled(graph: Graph, roots: Sequence[Node]) -> Change | None:
    """New equations that make the same roots; None where no dims are moved."""
    if not any(e.scope == SCOPE and e.name in ("transpose", "broadcast_in_dim") for e in graph.equations):
        return None
    inside: set[Node] = set()
    for equation in graph.equations:
        starts = equation.scope == SCOPE and equation.name in ("slice", "rev")
        if starts or any(n in inside for n in equation.inputs):
            inside.update(n for n in equation.outputs if n not in roots)
    asked: dict[Node, dict[View, _Plan]] = {}
    wanted: dict[Node, dict[View, None]] = {root: {plain(root): None} for root in roots}
    for equation in reversed(graph.equations):
        for node in equation.outputs:
            if node not in wanted or (node not in inside and node not in roots):
                continue
            for view in wanted[node]:
                plan = asked.setdefault(node, {})[view] = _plan(equation, node, view)
                for operand, theirs in plan.operands:
                    wanted.setdefault(operand, {})[theirs] = None
    made, before = _Made(), {}
    for equation in graph.equations:
        made.equations = before.setdefault(equation, [])
        for node in equation.outputs:
            for view, plan in asked.get(node, {}).items():
                made.add(equation, node, view, plan)
    return Change(before, {root: made.values[root, plain(root)] for root in roots})


@dataclass
class _Plan:
    """How an equation makes a view of its result: its parameters, its operands' views, the view that comes out."""

    params: dict[str, Any]
    operands: list[Asked]
    result: View


@dataclass
class _Made:
    equations: list[Equation] = field(default_factory=list)
    values: dict[Asked, Node] = field(default_factory=dict)

    def add(self, equation: Equation, node: Node, view: View, plan: _Plan) -> None:
        inputs = tuple(self._read(*o) for o in plan.operands)
        if equation.name in ("transpose", "broadcast_in_dim"):  # whose operand was asked for as the result
            self.values[node, view] = inputs[0]
            return
        at = equation.outputs.index(node)
        outputs = [Node(n.shape, n.dtype, n.weak) for n in equation.outputs]
        outputs[at] = Node(plan.result.shape, node.dtype, node.weak)
        self._emit(equation.primitive, plan.params, inputs, outputs, equation.source, equation.scope)
        self.values[node, plan.result] = outputs[at]
        if plan.result != view:
            self.values[node, view] = self._moved(outputs[at], view, equation.source)

    def _read(self, node: Node, view: View) -> Node:
        """A view that was made, or one of a value from outside."""
        if (node, view) not in self.values:
            source = node.equation.source if node.equation is not None else ""
            self.values[node, view] = self._moved(node, view, source)
        return self.values[node, view]

    def _moved(self, node: Node, view: View, source: str) -> Node:
        order = tuple(sorted(range(len(view.dims)), key=lambda d: view.dims[d]))
        if order != tuple(range(len(order))):
            turned = Node(tuple(node.shape[d] for d in order), node.dtype, node.weak)
            self._emit(lax.transpose_p, {"permutation": order}, (node,), [turned], source)
            node = turned
        if node.shape == view.shape:
            return node
        wide = Node(view.shape, node.dtype, node.weak)
        params = {"shape": view.shape, "broadcast_dimensions": tuple(sorted(view.dims)), "sharding": None}
        self._emit(lax.broadcast_in_dim_p, params, (node,), [wide], source)
        return wide

    def _emit(self, primitive: Any, params: Any, inputs: Any, outputs: Sequence[Node], source: str, scope: str = ""):
        equation = Equation(primitive, params, tuple(inputs), tuple(outputs), source, scope=scope)
        for node in outputs:
            node.equation = equation
        self.equations.append(equation)


def _plan(equation: Equation, node: Node, view: View) -> _Plan:
    name, p = equation.name, equation.params
    if name in ELEMENTWISE and len(equation.outputs) == 1:
        return _Plan(p, [(o, view if o.shape else plain(o)) for o in equation.inputs], view)
    if name == "transpose":
        dims = tuple(view.dims[p["permutation"].index(d)] for d in range(len(view.dims)))
        return _Plan(p, [(equation.inputs[0], View(view.shape, dims))], view)
    if name == "broadcast_in_dim" and len(equation.inputs) == 1:
        dims = tuple(view.dims[d] for d in p["broadcast_dimensions"])
        return _Plan(p, [(equation.inputs[0], View(view.shape, dims))], view)
    if name in ("slice", "pad", "concatenate", "rev") and (plan := _by_dim(equation, node, view)) is not None:
        return plan
    if name.startswith("reduce_") and "axes" in p and len(equation.inputs) == 1:
        return _reduced(equation, view)
    if name == "dot_general":
        return _product(equation, node)
    return _Plan(p, [(o, plain(o)) for o in equation.inputs], plain(node))


def _by_dim(equation: Equation, node: Node, view: View) -> _Plan | None:
    """Slices and the like, whose parameters go by dim. None where a dim that they change is broadcast."""
    p, operands = equation.params, [n for n in equation.inputs if n.shape]
    changed = {d for o in operands for d, n in enumerate(o.shape) if n != node.shape[d]}
    if any(view.shape[view.dims[d]] != node.shape[d] for d in changed):
        return None
    asked = []
    for operand in equation.inputs:
        shape = list(view.shape)
        for d in changed if operand.shape else ():
            shape[view.dims[d]] = operand.shape[d]
        asked.append((operand, View(tuple(shape), view.dims) if operand.shape else plain(operand)))
    moved = dict(p)
    if equation.name == "slice":
        shape = asked[0][1].shape
        strides = p["strides"] or (1,) * len(node.shape)
        moved["start_indices"] = _placed(p["start_indices"], view, [0] * len(shape))
        moved["strides"] = _placed(strides, view, [1] * len(shape))
        sliced = {view.dims[d] for d in changed}
        limits = _placed(p["limit_indices"], view, shape)
        moved["limit_indices"] = tuple(n if d in sliced else shape[d] for d, n in enumerate(limits))
    elif equation.name == "pad":
        moved["padding_config"] = _placed(p["padding_config"], view, [(0, 0, 0)] * len(view.shape))
    elif equation.name == "concatenate":
        moved["dimension"] = view.dims[p["dimension"]]
    else:
        moved["dimensions"] = tuple(view.dims[d] for d in p["dimensions"])
    return _Plan(moved, asked, view)


def _placed(values: Sequence[Any], view: View, otherwise: Sequence[Any]) -> tuple[Any, ...]:
    found = list(otherwise)
    for d, value in zip(view.dims, values, strict=True):
        found[d] = value
    return tuple(found)


def _reduced(equation: Equation, view: View) -> _Plan:
    operand, axes = equation.inputs[0], equation.params["axes"]
    last = iter(range(len(view.shape), len(view.shape) + len(axes)))
    kept = iter(view.dims)
    dims = tuple(next(last) if d in axes else next(kept) for d in range(len(operand.shape)))
    shape = (*view.shape, *(n for d, n in enumerate(operand.shape) if d in axes))
    params = {**equation.params, "axes": tuple(range(len(view.shape), len(shape)))}
    return _Plan(params, [(operand, View(shape, dims))], view)


def _product(equation: Equation, node: Node) -> _Plan:
    """A matrix product with its operands as [batch, free, summed] and [batch, summed, free]."""
    sums, batches = equation.params["dimension_numbers"]
    asked, numbers = [], []
    for operand, summed, batch, sums_last in zip(equation.inputs, sums, batches, (True, False), strict=True):
        free = [d for d in range(len(operand.shape)) if d not in summed and d not in batch]
        order = [*batch, *free, *summed] if sums_last else [*batch, *summed, *free]
        dims = tuple(order.index(d) for d in range(len(order)))
        asked.append((operand, View(tuple(operand.shape[d] for d in order), dims)))
        numbers.append((tuple(dims[d] for d in summed), tuple(range(len(batch)))))
    params = {**equation.params, "dimension_numbers": tuple(zip(*numbers, strict=True))}
    return _Plan(params, asked, plain(node))
