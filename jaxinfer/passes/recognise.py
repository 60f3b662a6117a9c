"""Recognises idioms that leave no equation of their own, and puts one Composite equation in their place.

`recognise(graph)` knows two, and returns the graph itself where it finds none. Run it before any other rewrite: folding
or sharing parts of a scan's tree hides the rest.

associative_scan: what `jax.lax.associative_scan` unrolls to, made again of the user's operator.
    inputs   `count` scanned operands, then the extras: other values that the operator reads
    outputs  `count` results, shaped as the operands; those that nothing reads are made all the same
    params   operator   Operator: `operator(left, right, extras)`, each a list of arrays; left and right hold `count`
                        arrays with the same number of rows (any number) along `axes`, the result is `count` such
             axes       the scanned dim of each operand (and of its result); under vmap they may differ
             reverse    False: out[t] = x[0] * x[1] * ... * x[t]. True: out[t] = x[-1] * x[-2] * ... * x[t], where * is
                        the operator: the later row is the left one, as in JAX
             count      number of scanned operands
             carried    numbers of the operands whose last result is needed to go on from, for the results that
                        something reads: of Mamba's (a, b) only b. The operator's results in `carried`, and those that
                        something reads, depend on no other `left`
    Going on from a carry: out = operator([c broadcast to k rows], scan of the k new rows, extras), where c is the last
    row of the results so far. Exact, since the operator is associative: its user said so by calling associative_scan.

long_convolution: irfft(rfft(x, n) * rfft(h, n))[:T] with room for every product, n >= rows of x + rows of h - 1.
    y[t] = sum over s <= t of x[s] h[t - s], for t below the number of rows of x; h is 0 past its own rows.
    inputs   x, h. Which is the signal can't be told from here: x is the one with more rows, then with more elements
    outputs  y, one result
    params   x_dims, h_dims  for each dim of the operand, the dim of y that it is (it broadcasts from size 1, and along
                             y's other dims), or None for a dim of size 1 that is none of them
             time            y's dim of time, its last one; x's is x_dims.index(time), h's is h_dims.index(time)
             rank            number of dims of y
             dtype           of y; complex where the forward used fft rather than rfft
"""

from jaxinfer.graph import Equation, Graph, Node
from jaxinfer.passes import recognise_convolution, recognise_layout, recognise_scan
from jaxinfer.passes.recognise_tree import Change


def recognise(graph: Graph) -> Graph:
    """The graph with each associative scan and each causal long convolution as one equation.

    The graph's inputs stay the same nodes; every other value is a new node if anything was found.
    """
    if changes := recognise_scan.find(graph):
        graph = _changed(graph, changes)
    if moved := recognise_layout.settled(graph, recognise_scan.results(graph)):
        settled = _changed(graph, [moved])
        if changes := recognise_scan.find(settled):
            graph = _changed(settled, changes)
    if changes := recognise_convolution.find(graph):
        graph = _changed(graph, changes)
    return graph


def _changed(graph: Graph, changes: list[Change]) -> Graph:
    """A copy of the graph with changes, without what nothing reads then."""
    instead: dict[Node, Node] = {}
    before: dict[Equation, list[Equation]] = {}
    for change in changes:
        instead.update(change.instead)
        for equation, added in change.before.items():
            before.setdefault(equation, []).extend(added)
    ordered = [e for equation in graph.equations for e in (*before.get(equation, ()), equation)]
    wanted = {instead.get(n, n) for n in graph.outputs}
    kept: list[Equation] = []
    for equation in reversed(ordered):
        if any(n in wanted for n in equation.outputs):
            wanted.update(instead.get(n, n) for n in equation.inputs)
            kept.append(equation)
    new: dict[Node, Node] = {}
    equations = [_copied(e, number, instead, new) for number, e in enumerate(reversed(kept))]
    return Graph(graph.inputs, tuple(_read(n, instead, new) for n in graph.outputs), equations)


def _copied(equation: Equation, number: int, instead: dict[Node, Node], new: dict[Node, Node]) -> Equation:
    inputs = tuple(_read(n, instead, new) for n in equation.inputs)
    outputs = tuple(Node(n.shape, n.dtype, n.weak) for n in equation.outputs)
    new.update(zip(equation.outputs, outputs, strict=True))
    made = Equation(equation.primitive, equation.params, inputs, outputs, equation.source, number, equation.scope)
    for node in outputs:
        node.equation = made
    return made


def _read(node: Node, instead: dict[Node, Node], new: dict[Node, Node]) -> Node:
    node = instead.get(node, node)
    if node.equation is None:
        return node
    return new[node]
