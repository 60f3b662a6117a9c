"""Rewrites of a traced forward, each a Graph -> Graph that can be switched off by name and says what it did.

    simplify   equal equations made one, no-ops removed
    fold       scales and shifts by weights moved into the weights before them (BatchNorm)
    merge      products of one value with several weights made one (QKV, gate and up); off by default, see the module
    precision  products on bfloat16, everything else in float32; off by default, since it changes the results
    attention  softmax(QK^T)V, in any spelling, made one equation

`optimise` runs the pipeline; `stage` then splits a graph into what weights alone decide, which is run once at load, and
the rest.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from jaxinfer.errors import TraceError
from jaxinfer.graph import Graph, uncollected
from jaxinfer.passes.attention import attention
from jaxinfer.passes.fold import fold
from jaxinfer.passes.merge import merge
from jaxinfer.passes.precision import precision
from jaxinfer.passes.report import Note, Report
from jaxinfer.passes.simplify import simplify
from jaxinfer.passes.stage import Staged, stage

__all__ = ["PIPELINE", "Note", "Pass", "Report", "Staged", "chosen", "optimise", "stage"]


@dataclass(frozen=True)
class Pass:
    """A rewrite: `run(graph, params)` takes a Graph whose first `params` inputs are weights and leaves it unchanged."""

    name: str
    run: Callable[[Graph, int], tuple[Graph, list[Note]]]
    default: bool = True


# In this order: simplify takes away what stands between equations that the others look for.
PIPELINE = (
    Pass("simplify", simplify),
    Pass("fold", fold),
    Pass("merge", merge, default=False),
    Pass("precision", precision, default=False),
    Pass("attention", attention),
)


def chosen(names: Iterable[str] | None) -> tuple[str, ...]:
    """The names of the passes to run, in the pipeline's order; None takes those that run by default.

    Raises:
        TraceError: a name that no pass has.
    """
    if names is None:
        return tuple(p.name for p in PIPELINE if p.default)
    names = [names] if isinstance(names, str) else list(names)
    known = [p.name for p in PIPELINE]
    for name in names:
        if name not in known:
            raise TraceError(f"no pass is called {name!r}; there are {', '.join(known)}")
    return tuple(name for name in known if name in names)


def optimise(
    graph: Graph, params: int, names: Iterable[str] | None = None, check: Callable[[Graph], object] | None = None
) -> tuple[Graph, list[Report]]:
    """Runs the passes of these names (see `chosen`) over a Graph whose first `params` inputs are weights.

    `check` is called with the graph after each pass: tests hand in `rewriting.verify`.
    """
    wanted, reports = set(chosen(names)), []
    for step in PIPELINE:
        if step.name in wanted:
            before = len(graph.equations)
            with uncollected():
                graph, notes = step.run(graph, params)
            if check is not None:
                check(graph)
            reports.append(Report(step.name, before, len(graph.equations), tuple(notes)))
    return graph, reports
