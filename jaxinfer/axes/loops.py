"""The batch proof through scan, while, cond and custom_linear_solve: a fixpoint over what is carried."""

from collections.abc import Sequence

from jaxinfer import _jax
from jaxinfer.axes.frozen import frozen_rows
from jaxinfer.axes.proof import Walk, special
from jaxinfer.axes.states import HERE, Free, Index, Mixed, Rows, State, merged, shifted
from jaxinfer.graph import Equation, Graph, Node


def join(walk: Walk, equation: Equation, node: Node, a: State, b: State) -> State:
    """What is known of a value that is one or the other."""
    if a == b or isinstance(a, Mixed):
        return a
    if isinstance(b, Mixed):
        return b
    if isinstance(a, Index) or isinstance(b, Index):
        return merged([a, b]) or a
    grown = walk.sizes.grown(node)
    if isinstance(a, Free) and isinstance(b, Free):
        both = a.uniform & b.uniform
        return Free(both) if grown <= both else walk.mix(equation)[0]
    if isinstance(b, Rows) and isinstance(a, Free):
        a, b = b, a
    if isinstance(a, Rows) and isinstance(b, Free) and (a == HERE or (a.dim in b.uniform and grown == {a.dim})):
        return a
    return walk.single_mix(
        equation, f"mixes the rows of '{walk.axis}': what it carries has them in other dims each time"
    )


def _fixpoint(walk: Walk, equation: Equation, body: Graph, fixed: list[State], carry: list[State], rest: list[State]):
    """(carry, other results) of a loop's body, once what is carried doesn't change any more."""
    nodes = body.inputs[len(fixed) : len(fixed) + len(carry)]
    while True:
        results = walk.run(body, [*fixed, *carry, *rest])
        after = [join(walk, equation, *each) for each in zip(nodes, carry, results[: len(carry)], strict=True)]
        if all(a == b for a, b in zip(after, carry, strict=True)):
            return carry, results[len(carry) :]
        carry = after


@special("scan")
def _scan(walk: Walk, equation: Equation, inputs: Sequence[State]) -> list[State]:
    consts, carried = _jax.scan_counts(equation.params)
    (body,) = walk.bodies.of(equation)["jaxpr"]
    fixed, carry, over = (
        list(inputs[:consts]),
        list(inputs[consts : consts + carried]),
        list(inputs[consts + carried :]),
    )
    scanned = [s for s in over if isinstance(s, Rows) and s.dim == 0]
    if scanned:
        return _over_rows(walk, equation, body, fixed, carry, over)
    if equation in walk.sizes.odd:
        return walk.mix(equation, f"repeats as often as there are rows of '{walk.axis}'")
    carry, others = _fixpoint(walk, equation, body, fixed, carry, [shifted(s, -1) for s in over])
    ys = [shifted(s, 1) for s in others]
    return [*carry, *(_whole(walk, equation, n, s) for n, s in zip(equation.outputs[carried:], ys, strict=True))]


def _whole(walk: Walk, equation: Equation, node: Node, state: State) -> State:
    """Results that are stacked over steps have no other dims that grow with the rows than those of each step."""
    known = {state.dim} if isinstance(state, Rows) else state.uniform if isinstance(state, Free) else None
    return state if state == HERE or known is None or walk.sizes.grown(node) <= known else walk.mix(equation)[0]


def _over_rows(
    walk: Walk, equation: Equation, body: Graph, fixed: list[State], carry: list[State], over: list[State]
) -> list[State]:
    """Each step sees one row (lax.map over the batch): whatever it does stays in that row, unless it is carried on."""
    place = next(s for s in over if isinstance(s, Rows) and s.dim == 0)
    if any(isinstance(s, Rows) and s != place for s in over):
        return walk.mix(equation, f"scans over rows of '{walk.axis}' beside values that hold all of them")
    if any(isinstance(s, Free) and 0 not in s.uniform for s in over):
        return walk.mix(equation, f"combines the rows of '{walk.axis}' with values that depend on a row's place")
    count = len(fixed)
    for number in range(len(carry)):
        if body.outputs[number] is not body.inputs[count + number]:
            return walk.mix(equation)
    steps: list[State] = [HERE if s == place else shifted(s, -1) for s in over]
    results = walk.run(body, [*fixed, *carry, *steps])
    found: list[State] = []
    for state in results[len(carry) :]:
        if state == HERE:
            found.append(place)
        elif isinstance(state, Free):
            found.append(Free(frozenset({0, *(d + 1 for d in state.uniform)})))
        elif isinstance(state, Mixed | Index):
            found.append(merged([state]) or state)
        else:
            return walk.mix(equation, f"repeats all rows of '{walk.axis}' for each of them")
    return [*carry, *found]


def _selected(walk: Walk, equation: Equation, node: Node, state: State, ends: Rows) -> State:
    """JAX's batched while: a condition of shape [batch, ...] keeps what is carried of each row that is done."""
    if isinstance(state, Free) and ends.dim in state.uniform and walk.sizes.grown(node) == {ends.dim}:
        return ends
    return state if state == ends else merged([state]) or walk.mix(equation)[0]


@special("while")
def _while(walk: Walk, equation: Equation, inputs: Sequence[State]) -> list[State]:
    first, second = equation.params["cond_nconsts"], equation.params["body_nconsts"]
    bodies = walk.bodies.of(equation)
    (condition,), (body,) = bodies["cond_jaxpr"], bodies["body_jaxpr"]
    asked, fixed = list(inputs[:first]), list(inputs[first : first + second])
    carry, _ = _fixpoint(walk, equation, body, fixed, list(inputs[first + second :]), [])
    (ends,) = walk.run(condition, [*asked, *carry])
    if isinstance(ends, Free):
        return carry
    if ends == HERE:
        return _here(walk, equation, carry)
    if isinstance(ends, Rows):
        return [_selected(walk, equation, n, s, ends) for n, s in zip(equation.outputs, carry, strict=True)]
    if frozen_rows(walk, equation, condition, body, [*asked, *carry]):
        return carry
    mixed = merged([ends])
    if mixed is None:
        return walk.mix(equation)
    text = f"loops until a condition over several rows of '{walk.axis}' holds, which {mixed.text}"
    return [s if isinstance(s, Mixed) else walk.single_mix(equation, text) for s in carry]


def _here(walk: Walk, equation: Equation, states: Sequence[State]) -> list[State]:
    """Results that one row chose: they belong to it, unless they hold all rows."""
    if any(isinstance(s, Rows) and s != HERE for s in states):
        return walk.mix(equation, f"lets one row of '{walk.axis}' decide over all of them")
    return [merged([s]) or HERE for s in states]


@special("cond")
def _cond(walk: Walk, equation: Equation, inputs: Sequence[State]) -> list[State]:
    index, *operands = inputs
    found: list[State] | None = None
    for branch in walk.bodies.of(equation)["branches"]:
        results = walk.run(branch, operands)
        nodes = equation.outputs
        found = (
            results
            if found is None
            else [join(walk, equation, *each) for each in zip(nodes, found, results, strict=True)]
        )
    assert found is not None
    if index == HERE:
        return _here(walk, equation, found)
    mixed = merged([index])
    return found if mixed is None else [mixed] * len(found)


@special("custom_linear_solve")
def _linear_solve(walk: Walk, equation: Equation, inputs: Sequence[State]) -> list[State] | None:
    """A forward pass runs its `solve` on the right-hand sides."""
    counts, jaxprs = equation.params["const_lengths"], equation.params["jaxprs"]
    graphs = walk.bodies.of(equation)["jaxprs"]
    names = [name for name in ("matvec", "vecmat", "solve", "transpose_solve") if getattr(jaxprs, name) is not None]
    if len(names) != len(graphs):
        return walk.mix(equation)
    start = counts.matvec + counts.vecmat
    given = [*inputs[start : start + counts.solve], *inputs[start + counts.solve + counts.transpose_solve :]]
    found = walk.run(graphs[names.index("solve")], given)
    return list(found) if len(found) == len(equation.outputs) else walk.mix(equation)
