"""Proves that a region of chunks is causal, in two proofs of the same kind as the outer one.

From chunk to chunk: along N, with the Q rows of a chunk whole, no result looks ahead. This also says which values hold
chunks strictly before their own only (the state that a chunk starts from). Within a chunk: along Q, with those values
given and N any other dim, no result looks ahead either. So row (n, q) of a result depends on chunks before n, and of
chunk n on rows up to q: on no later row.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from jaxinfer.errors import NotCausalError
from jaxinfer.graph import Equation, Graph, Node, copies, needed
from jaxinfer.passes.incremental.chunks_apart import Apart
from jaxinfer.passes.incremental.chunks_find import Region
from jaxinfer.passes.incremental.chunks_recurrence import recurrences
from jaxinfer.passes.incremental.chunks_single import single

if TYPE_CHECKING:
    from jaxinfer.passes.incremental.causality import Timing

Prove = Callable[..., "Timing"]


def alone(region: Region, outer: "Timing") -> tuple[Graph, list[Node]]:
    """(the region as a graph of its own, what it reads of the rest)

    Its inputs are the blocks, then what it reads: parameters and what the request decides. What neither rows nor the
    request reach is made again inside, where it is seen to be a mask and sliced by chunks.
    """
    joined = [block for block, _, _ in region.joins]
    blocks = [block for _, block, _ in region.cuts]
    inside = {n for e in region.equations for n in e.outputs}
    reads: dict[Node, None] = {}

    def ends(node: Node) -> bool:
        if node in inside or node in blocks:
            return node in blocks
        if node in outer.dims:
            raise NotCausalError(f"chunks cut at {region.source} are combined with rows that aren't in chunks")
        if node.equation is None or node in outer.requests:
            reads[node] = None
            return True
        return False

    equations = recurrences(needed(joined, ordered(region.equations, ends)), region.labels)
    equations = needed(joined, equations)
    given = [*blocks, *reads]
    made = {n: Node(n.shape, n.dtype, n.weak) for n in given}
    new = copies(equations, made, region.source)
    return Graph(tuple(made[n] for n in given), tuple(made[n] for n in joined), new), list(reads)


def ordered(equations: Iterable[Equation], ends: Callable[[Node], bool] = lambda node: False) -> list[Equation]:
    """Equations and all that they need, each after what it reads.

    Args:
        ends: whether to look no further than a value.

    Raises:
        NotCausalError: there is no such order, since chunks are cut of what their own results were joined to.
    """
    done: dict[Equation, bool] = {}  # False while its operands are being made
    order: list[Equation] = []
    todo = list(equations)[::-1]
    makers = {node: e for e in todo for node in e.outputs}
    while todo:
        equation = todo[-1]
        if equation in done:
            todo.pop()
            if not done[equation]:
                done[equation] = True
                order.append(equation)
            continue
        done[equation] = False
        for node in equation.inputs:
            maker = makers.get(node, node.equation)
            if node.constant or ends(node) or maker is None or done.get(maker):
                continue
            if maker in done:
                raise NotCausalError(
                    f"{equation} cuts rows into chunks that are combined with other chunks from which these rows were "
                    "made; compute both from rows, or join all of them first"
                )
            todo.append(maker)
    return order


def proved(region: Region, graph: Graph, prove: Prove, *, assume_causal: bool) -> "Timing":
    """The proof from chunk to chunk, after the one within a chunk; of a single chunk the one within it.

    Raises:
        NotCausalError: one of them fails.
    """
    sources = {node: dim for node, (_, _, dim) in zip(graph.inputs, region.cuts, strict=False)}
    if region.count == 1:
        joins = {node: dim + 1 for node, (_, _, dim) in zip(graph.outputs, region.joins, strict=True)}
        cuts = {node: dim + 1 for node, dim in sources.items()}
        return _proved_within(region, single(graph), cuts, joins, prove, assume_causal)
    try:
        timing = prove(graph, sources, region.count, assume_causal=assume_causal)
    except NotCausalError as error:
        raise NotCausalError(f"{_where(region)}, from chunk to chunk: {error}") from error
    for node, (_, _, dim) in zip(timing.graph.outputs, region.joins, strict=True):
        if timing.of(node) != {dim}:
            raise NotCausalError(f"{_where(region)}: what is joined isn't the chunks in their order")
    try:
        inner = _within(timing, region)
    except NotCausalError as error:
        raise NotCausalError(f"{_where(region)}, within a chunk: {error}") from error
    for what in _proved_within(region, *inner, prove, assume_causal).assumptions:
        timing.assume(what)
    return timing


def _proved_within(
    region: Region, graph: Graph, cuts: dict[Node, int], joins: dict[Node, int], prove: Prove, assume_causal: bool
) -> "Timing":
    try:
        timing = prove(graph, cuts, region.size, assume_causal=assume_causal, derive=False)
    except NotCausalError as error:
        raise NotCausalError(f"{_where(region)}, within a chunk: {error}") from error
    for node, dim in joins.items():
        if timing.of(node) != {dim}:
            raise NotCausalError(f"{_where(region)}: what is joined isn't a chunk's rows in their order")
    return timing


def _where(region: Region) -> str:
    return f"time is cut into {region.count} chunks of {region.size} rows at {region.source}"


def _within(timing: "Timing", region: Region) -> tuple[Graph, dict[Node, int], dict[Node, int]]:
    """(the graph to prove within chunks, its sources and its outputs, each with Q's dim)

    What earlier chunks alone decide is an input of it. Outputs that nothing else reaches aren't among its own.
    """
    whole, apart = timing.graph, Apart.of(timing)
    given = {new for old, new in apart.made.items() if _before(old, timing)}
    for node in given:
        node.equation = None
    wanted = {apart.made[n] for n in whole.outputs} - given
    kept: list[Equation] = []
    for equation in reversed(apart.equations):
        if wanted.isdisjoint(equation.outputs):
            continue
        kept.append(equation)
        wanted.update(n for n in equation.inputs if n not in given)
        if equation in apart.makers:
            _check_chunks(apart.makers[equation], timing)
    kept.reverse()
    cuts, joins = (
        {apart.made[n]: dim + 1 for n, (_, _, dim) in zip(nodes, ends, strict=False)}
        for nodes, ends in ((whole.inputs, region.cuts), (whole.outputs, region.joins))
    )
    reached = set(cuts)
    for equation in kept:
        if not reached.isdisjoint(equation.inputs):
            reached.update(equation.outputs)
    joins = {node: dim for node, dim in joins.items() if node in reached}
    inputs = dict.fromkeys((*(apart.made[n] for n in whole.inputs), *apart.starts, *given))
    return Graph(tuple(inputs), tuple(joins), kept), cuts, joins


def _before(node: Node, timing: "Timing") -> bool:
    """Whether a value holds, for each chunk, only what earlier chunks decide."""
    return node in timing.dims and timing.ahead[node] < 0


def _check_chunks(equation: Equation, timing: "Timing") -> None:
    """What earlier chunks decide must not be moved to them from later ones, nor anything to an earlier chunk."""
    if any(timing.ahead.get(n, 0) > 0 for n in equation.outputs):
        raise NotCausalError(f"{equation} makes chunks of later ones; that they are moved back isn't followed")
    factors, reaches = timing.factors[equation], timing.summed.get(equation, {})
    gap = max([0, *(reach.gap for reach in reaches.values())])
    for number, node in enumerate(equation.inputs):
        if _before(node, timing):
            shifts = [factors.halo.get((number, d), (0, 0))[1] for d in timing.of(node)]
            if timing.ahead[node] + max([0, *shifts]) + gap >= 0:
                raise NotCausalError(f"{equation} moves what earlier chunks left to later ones, which isn't followed")
