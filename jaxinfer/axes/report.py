"""The proof for a Program's named dims, and how it is told."""

from typing import TYPE_CHECKING, Any

from jaxinfer import specs
from jaxinfer.axes.proof import Verdict, prove
from jaxinfer.axes.sizes import Bodies
from jaxinfer.axes.states import Mixed, Rows, State
from jaxinfer.errors import TraceError
from jaxinfer.graph import Graph, flatten

if TYPE_CHECKING:
    from jaxinfer.program import Program


def verdict_of(program: "Program", axis: str) -> Verdict:
    """Proves a named dim on the analysis trace, held against a second trace at another size of it."""
    if axis not in program.axes:
        raise TraceError(f"{program.name} has no named dim {axis!r}; it has {list(program.axes)}")
    rows = program.analysis_sizes[axis]
    graph, sources = flatten(program.jaxpr), _sources(program, axis)
    other_rows = specs.fresh_primes(len(program.axes) + 1, _fixed_sizes(program))[-1]
    try:
        other = flatten(program.at({**program.analysis_sizes, axis: other_rows}).jaxpr)
    except TraceError as error:
        found = prove(axis, rows, graph, sources)
        text = f"the forward can't be traced at another size of '{axis}', so nothing is known of other sizes: {error}"
        return Verdict(axis, rows, found.outputs, found.mixed or Mixed(None, text, 0))
    return prove(axis, rows, graph, sources, other, other_rows)


def verdict_at(program: "Program", axis: str, size: int) -> Verdict:
    """The proof held against the trace at a size that is to be run: a forward may take another way there.

    The other named dims keep their sizes of the analysis, since a branch on two of them at once is too rare to pay a
    trace for each pair of buckets.
    """
    rows, graph = program.analysis_sizes[axis], flatten(program.jaxpr)
    other = flatten(program.at({**program.analysis_sizes, axis: size}).jaxpr)
    return prove(axis, rows, graph, _sources(program, axis), other, size)


def has_loops(program: "Program") -> bool:
    """Whether the forward has a loop whose length depends on values, which may never end on made-up inputs."""
    bodies = Bodies()

    def inside(graph: Graph) -> bool:
        return any(
            e.name == "while" or any(inside(g) for graphs in bodies.of(e).values() for g in graphs)
            for e in graph.equations
        )

    return inside(flatten(program.jaxpr))


def _sources(program: "Program", axis: str) -> list[int | None]:
    import jax

    held = len(jax.tree.leaves(program.abstract_params))
    leaves = specs.leaves(program.inputs)
    return [None] * held + [leaf.dims.index(axis) if axis in leaf.dims else None for leaf in leaves]


def _fixed_sizes(program: "Program") -> list[int]:
    import jax

    taken = [d for p in jax.tree.leaves(program.abstract_params) for d in p.shape]
    return taken + [d for leaf in specs.leaves(program.inputs) for d in leaf.dims if isinstance(d, int)]


def explain(program: "Program", verdict: Verdict) -> str:
    """The text of `Program.why`."""
    axis = verdict.axis
    if verdict.mixed is not None:
        return f"{axis}: {reason(program, verdict)}.\n{advice(axis)}"
    shared = [str(leaf) for leaf in specs.leaves(program.inputs) if axis not in leaf.dims]
    lines = [
        f"{axis}: rows don't mix. Row i of every output depends on row i of the inputs alone, however many there are."
    ]
    if shared:
        lines.append(f"Shared by all rows: the parameters and the inputs {', '.join(shared)}.")
    places = [f"output {n}: {_place(axis, s)}" for n, s in enumerate(verdict.outputs)]
    lines.append("; ".join(places[:8]) + ("; ..." if len(places) > 8 else "") + ".")
    lines.append(
        f"Followed through {verdict.equations} equations, each of which keeps '{axis}' in a dim of its own or a block "
        f"of one; they are the same at another size of '{axis}'."
    )
    return "\n".join(lines)


def reason(program: "Program", verdict: Verdict) -> str:
    """Which equation mixes rows, and how."""
    mixed = verdict.mixed
    assert mixed is not None
    if mixed.equation is None:
        return mixed.text
    equation = mixed.equation
    shapes = ", ".join(
        f"{node.dtype}[{' '.join(str(program.axis_name(d)) for d in node.shape)}]" for node in equation.inputs[:4]
    )
    where = f" at {equation.source}" if equation.source else ""
    return f"{equation.name}({shapes}){where} {mixed.text}"


def advice(axis: str) -> str:
    """What to do about rows that mix."""
    if axis == "batch":
        return (
            "So requests can't share a batch and a batch can't be padded: change that line, or compile the exact sizes "
            "that you call it with."
        )
    return (
        f"So '{axis}' can be padded safely only if the model's own mask hides the padding, which no proof can know. If "
        f'it does, say so: ji.compile(..., masked=("{axis}",)); it is then checked by running it. If not, compile the '
        "exact sizes that you call it with."
    )


def _place(axis: str, state: State | Any) -> str:
    if not isinstance(state, Rows):
        return "the same for all rows"
    if state.outer == state.inner == 1:
        return f"'{axis}' is dim {state.dim}"
    return f"'{axis}' is merged into dim {state.dim} ({state.outer} x {axis} x {state.inner})"
