"""What every rewrite is made with: a copy of a Graph in which some values are made otherwise.

    rewriter = Rewriter(graph)
    rewriter.replace(node, lambda new: new.emit(jnp.multiply, new(a), new(b)))    # old nodes in, new nodes out
    graph = rewriter.finish()

A Graph is never changed: inputs and constants are shared by the old and the new one, everything else is copied.
"""

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from jaxinfer.errors import TraceError
from jaxinfer.graph import Equation, Graph, Node, copies, flatten, needed

Make = Callable[["Rewriter"], Node]


class Rewriter:
    """Copies a graph; `replace` says which values are made otherwise, called with an old node gives the new one."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.consumers = graph.consumers()
        self._outputs = set(graph.outputs)
        self._made: dict[Node, Node] = {node: node for node in graph.inputs}
        self._instead: dict[Node, Make] = {}
        self._equations: list[Equation] = []

    def only_reader(self, node: Node) -> Equation | None:
        """The equation that alone reads a value, once; None where there are more readers or it is an output."""
        readers = self.consumers.get(node, ())
        return readers[0] if len(readers) == 1 and node not in self._outputs else None

    def only_read_by(self, node: Node, equations: Collection[Equation]) -> bool:
        """Whether none but these equations read a value, and it is no output."""
        return node not in self._outputs and all(reader in equations for reader in self.consumers.get(node, ()))

    def replace(self, node: Node, make: Make) -> None:
        """From now on `node` is what `make(rewriter)` returns; it may ask for any value that doesn't depend on it."""
        self._instead[node] = make

    def __call__(self, node: Node) -> Node:
        if node.constant:
            return node
        if node not in self._made:
            self._require(node)
        return self._made[node]

    def _require(self, node: Node) -> None:
        waiting = [node]
        while waiting:
            top = waiting[-1]
            if top in self._made:
                waiting.pop()
            elif top in self._instead:
                self._made[top] = self._instead[top](self)
            else:
                assert top.equation is not None
                missing = [n for n in top.equation.inputs if not n.constant and n not in self._made]
                if missing:
                    waiting += missing
                else:
                    copies = self.copy(top.equation, [self(n) for n in top.equation.inputs])
                    for old, new in zip(top.equation.outputs, copies, strict=True):
                        if old not in self._instead:
                            self._made[old] = new

    def copy(self, equation: Equation, inputs: Sequence[Node]) -> tuple[Node, ...]:
        """The equation on other operands of the same shapes and dtypes."""
        outputs = tuple(Node(n.shape, n.dtype, n.weak) for n in equation.outputs)
        return self._add(equation.primitive, equation.params, inputs, outputs, equation.source, equation.scope)

    def emit(self, function: Callable[..., Any], *nodes: Node, source: str = "", **static: Hashable) -> Node:
        """The equations of `function(*arrays, **static)`, a function of the module's own with one result."""
        template = _template(function, tuple((n.shape, n.dtype, n.weak) for n in nodes), tuple(sorted(static.items())))
        made: dict[Node, Node] = dict(zip(template.inputs, nodes, strict=True))
        added = copies(template.equations, made)
        for equation in added:
            equation.source = source  # the user's line, not that of the function here
        self._equations += added
        (result,) = template.outputs
        return made.get(result, result)

    def add(self, primitive: Any, params: dict[str, Any], inputs: Sequence[Node], like: Node, source: str) -> Node:
        """One equation whose single result has the shape and dtype of `like`."""
        return self._add(primitive, params, inputs, (Node(like.shape, like.dtype, like.weak),), source)[0]

    def _add(
        self,
        primitive: Any,
        params: dict[str, Any],
        inputs: Sequence[Node],
        outputs: tuple[Node, ...],
        source: str,
        scope: str = "",
    ) -> tuple[Node, ...]:
        equation = Equation(primitive, params, tuple(inputs), outputs, source, scope=scope)
        for node in outputs:
            node.equation = equation
        self._equations.append(equation)
        return outputs

    def finish(self) -> Graph:
        """The new graph, without what nothing needs any more; the old one where nothing was replaced."""
        return self.copied() if self._instead else self.graph

    def copied(self) -> Graph:
        """The new graph, a copy whether anything was replaced or not."""
        for equation in self.graph.equations:  # in the old order, so that nothing deep is waiting
            for node in equation.outputs:
                self(node)
        return live(self.graph.inputs, tuple(map(self, self.graph.outputs)), self._equations)


def live(inputs: tuple[Node, ...], outputs: tuple[Node, ...], equations: Sequence[Equation]) -> Graph:
    """The graph of those equations that the outputs need, numbered."""
    kept = needed(outputs, equations)
    for number, equation in enumerate(kept):
        equation.number = number
    return Graph(inputs, outputs, kept)


def part(graph: Graph, inputs: tuple[Node, ...], outputs: tuple[Node, ...]) -> Graph:
    """A copy of what makes `outputs` out of `inputs`."""
    rewriter = Rewriter(Graph(inputs, outputs, needed(outputs, graph.equations)))
    return rewriter.copied()


@lru_cache(4096)
def _template(function: Callable[..., Any], avals: tuple[Any, ...], static: tuple[tuple[str, Any], ...]) -> Graph:
    """Traced once for all layers that are alike: a trace costs a millisecond, a copy a few microseconds."""
    structs = [jax.ShapeDtypeStruct(shape, dtype, weak_type=weak) for shape, dtype, weak in avals]
    return flatten(jax.make_jaxpr(lambda *arrays: function(*arrays, **dict(static)))(*structs))


def static_nodes(graph: Graph, params: int) -> set[Node]:
    """The values that no input but the first `params` reaches: what weights and constants alone decide."""
    found = set(graph.inputs[:params])
    for equation in graph.equations:
        if all(n.constant or n in found for n in equation.inputs) and "callback" not in equation.name:
            found.update(equation.outputs)
    return found


def splat(node: Node) -> Any:
    """The one number that a value is filled with, where that is known without running anything; else None."""
    while not node.constant and node.equation is not None and node.equation.name in ("broadcast_in_dim", "reshape"):
        node = node.equation.inputs[0]
    if not node.constant or np.size(node.value) != 1:
        return None
    return np.asarray(node.value).reshape(())[()]


def nbytes(nodes: Iterable[Node]) -> int:
    """Bytes of some values together."""
    return sum(int(np.prod(n.shape, dtype=np.int64)) * n.dtype.itemsize for n in nodes)


def verify(graph: Graph) -> Graph:
    """Checks that each value is made once, before its use, by an equation that gives its shape and dtype.

    Raises:
        TraceError: naming the equation that breaks the rule.
    """
    defined = set(graph.inputs)
    for equation in graph.equations:
        for node in equation.inputs:
            if not node.constant and node not in defined:
                raise TraceError(f"{equation} uses a value before it is made")
        for node, found in zip(equation.outputs, _results(equation), strict=True):
            if node in defined or node.equation is not equation:
                raise TraceError(f"{equation} makes a value that something else makes too")
            if node.shape != found.shape or node.dtype != found.dtype:
                raise TraceError(f"{equation} makes {found.dtype}{list(found.shape)}, not {node.dtype}{node.shape}")
            defined.add(node)
    for node in graph.outputs:
        if not node.constant and node not in defined:
            raise TraceError("the graph returns a value that no equation makes")
    return graph


def _results(equation: Equation) -> Iterator[Any]:
    structs = [jax.ShapeDtypeStruct(n.shape, n.dtype) for n in equation.inputs]
    found = jax.eval_shape(lambda *operands: equation.primitive.bind(*operands, **equation.params), *structs)
    return iter(found if equation.primitive.multiple_results else (found,))
