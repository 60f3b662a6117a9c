"""Which dims of which values are time, and the proof that no output looks ahead.

The invariant, kept by every equation: an element depends on the rows of the input up to the largest of its time
indices + `ahead`. Elementwise work and contractions over other dims keep `ahead`; slices, padding, concatenations and
convolutions shift it; a running result (cumsum, a scan over time) keeps it. A reduction over time keeps it only if a
mask hides, for each time index that remains, everything after it (see bands). Outputs must end with ahead <= 0.
"""

import math
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxinfer import _jax
from jaxinfer.axes import Factors, factors_of
from jaxinfer.errors import NotCausalError
from jaxinfer.graph import Equation, Graph, Node
from jaxinfer.passes.incremental import chunks, convolution, first_row
from jaxinfer.passes.incremental.bands import VERY_NEGATIVE, Bands, Beyond, Linear
from jaxinfer.passes.incremental.chunks_find import Regions
from jaxinfer.passes.incremental.chunks_prove import ordered
from jaxinfer.passes.incremental.chunks_solve import substituted
from jaxinfer.passes.incremental.reads import read_by_rows
from jaxinfer.passes.incremental.unroll import unrolled
from jaxinfer.passes.incremental.views import Views

# Equations whose parameters hold bodies of fixed shape: they can't be bound again on other sizes.
_BODIES = ("while", "cond", "shard_map", "custom_call", "pure_callback", "io_callback", "ffi_call", "pallas_call")
_NONE: frozenset[int] = frozenset()
_SHIFTS = ("slice", "pad", "concatenate", "conv_general_dilated")  # whose halo `emit` knows how to serve


class Reach(NamedTuple):
    """Which rows a reduction over time needs to make row t of its result."""

    behind: int | None  # the factor whose index t bounds them; None where only assumed
    window: int | None  # rows before t - window are hidden; None where all are seen
    extent: tuple[int, int] = (0, 0)  # rows that aren't time before and after those that are
    gap: int = 0  # rows after t that are seen; of values that lag behind, or the reduction would be refused


@dataclass(eq=False)
class Timing:
    """What is known of time in a graph. Values that no row of the time inputs reaches aren't in `dims` or `ahead`."""

    graph: Graph  # as given, with scans over other things than time unrolled
    capacity: int
    dims: dict[Node, frozenset[int]]  # the time dims of every value that depends on rows
    ahead: dict[Node, int]
    # (value, time dim) -> the same along that dim, where it is less: rows up to the largest of index + lead matter
    leads: dict[tuple[Node, int], int] = field(default_factory=dict)
    factors: dict[Equation, Factors] = field(default_factory=dict)
    summed: dict[Equation, dict[int, Reach]] = field(default_factory=dict)  # reduced factors that are time
    running: set[Equation] = field(default_factory=set)  # whose rows continue from the row before
    # (value, time dim) -> rows before and after time's own that no row of the input reaches; (0, 0) where absent
    extent: dict[tuple[Node, int], tuple[int, int]] = field(default_factory=dict)
    requests: set[Node] = field(default_factory=set)  # what the request's whole inputs decide, and no row
    assumptions: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what a user may want to know of the step's cost
    # What an equation of a kind asks of its operands: demand's memory, filled once for all layers that are alike.
    asked: dict[tuple[int, int, Views], tuple[Views, ...]] = field(default_factory=dict)
    _kinds: dict[Hashable, int] = field(default_factory=dict)
    _kind_of: dict[Equation, int] = field(default_factory=dict)

    def kind_of(self, equation: Equation) -> int:
        """Equal for equations that are alike in all that is known here of them: name, factors, where time lies."""
        kind = self._kind_of.get(equation)
        if kind is None:
            factors, extent = self.factors[equation], self.extent
            key = (
                equation.name,
                factors.inputs,
                factors.outputs,
                tuple(factors.halo.items()),
                tuple(factors.cumulative.items()),
                tuple([self.dims.get(n) for n in (*equation.inputs, *equation.outputs)]),
                tuple(self.summed[equation].items()) if equation in self.summed else (),
                tuple([(i, d, extent.get((n, d))) for i, n in enumerate(equation.inputs) for d in self.of(n)])
                if extent
                else (),
            )
            kind = self._kind_of[equation] = self._kinds.setdefault(key, len(self._kinds))
        return kind

    def of(self, node: Node) -> frozenset[int]:
        """The time dims of a value; empty for one that no row of the input reaches."""
        return self.dims.get(node, _NONE)

    def lead(self, node: Node, dim: int) -> int:
        """How far past its index along a time dim the rows lie that a value depends on."""
        return self.leads.get((node, dim), self.ahead[node])

    def assume(self, what: str) -> None:
        if what not in self.assumptions:
            self.assumptions.append(what)


def prove(
    graph: Graph,
    sources: dict[Node, int],
    capacity: int,
    *,
    requests: Sequence[Node] = (),
    assume_causal: bool = False,
    derive: bool = True,
) -> Timing:
    """Finds the time dims and proves causality.

    Args:
        sources: for each input that is made of rows in time, its time dim.
        requests: inputs that a sequence has once, as a whole.
        capacity: the size of the time dim in this trace.
        assume_causal: take a reduction over time without a proof as causal; a mask that leaks is still refused.
        derive: also refuse what is causal, but has no step.

    Raises:
        NotCausalError: naming the equation that looks ahead or that no rule understands, with its source line.
    """

    def timing(proof: _Proof) -> Timing:
        proof.timing.requests.update(requests)
        for equation in graph.equations:
            proof.visit(equation)
        proof.prove_chunks()
        for number, node in enumerate(graph.outputs):
            proof.check_output(number, node)
        proof.timing.graph = proof.finished(graph)
        return proof.timing

    first, second = (_Proof(graph, sources, capacity, assume_causal, derive, short) for short in (False, True))
    try:
        return timing(first)
    except NotCausalError:
        if first.regions.one_chunk:  # rows in chunks, too few of them to tell
            with suppress(NotCausalError):
                return timing(second)
        raise


class _Proof:
    """The facts so far, extended equation by equation."""

    def __init__(
        self, graph: Graph, sources: dict[Node, int], capacity: int, assume_causal: bool, derive: bool, short: bool
    ):
        dims = {node: frozenset({dim}) for node, dim in sources.items()}
        self.timing = Timing(graph, capacity, dims, dict.fromkeys(sources, 0))
        self.assume_causal, self.derive = assume_causal, derive
        self.regions = Regions(self.timing, short)
        self.bands = Bands()
        self.equations: list[Equation] = []
        self.blame: dict[Node, Equation] = {}  # what made a value look ahead
        self.finals: dict[Node, Equation] = {}  # values after the last row: nothing may read them
        self.used = {n for e in graph.equations for n in e.inputs} | set(graph.outputs)

    def visit(self, equation: Equation) -> None:
        """Takes in the next equation."""
        if self.regions.takes(equation):
            return
        timing = self.timing
        reached = [n for n in equation.inputs if n in timing.dims]
        if reached and equation.name == "scan":
            other = read_by_rows(equation, self._counters(equation), set(reached))
            if other is None and not self._over_time(equation):
                other = unrolled(equation, self.used)
                self.used.update(n for e in other for n in e.inputs)
            for inner in other or ():
                self.visit(inner)
            if other is not None:
                return
        self.equations.append(equation)
        factors = timing.factors[equation] = _OWN.get(equation.name, factors_of)(equation)
        self.bands.visit(equation, factors)
        if not reached:
            if any(n in timing.requests for n in equation.inputs):
                timing.requests.update(equation.outputs)
            return
        for node in reached:
            if node in self.finals:
                raise NotCausalError(
                    f"{equation} reads what {self.finals[node]} leaves after the last row: no earlier row can know it"
                )
        if equation.name == convolution.NAME:
            self._long(equation, reached)
            return
        if not self.derive and substituted(equation, timing, self.bands):
            return
        times = self._times(equation, factors)
        if equation.name == "scan":
            self._check_scan(equation)
        leads = self._leads(equation, factors)
        reaches = {f: self._reach(equation, factors, f, leads[f]) for f in sorted(times & factors.reduced)}
        if reaches:
            timing.summed[equation] = reaches
        others = [timing.ahead[n] for n in reached if not timing.dims[n]]
        for factor, reach in reaches.items():
            lead = leads.pop(factor) + reach.gap
            if reach.behind is None:
                others.append(lead)
            else:
                leads[reach.behind] = max(lead, leads.get(reach.behind, lead))
        ahead = max([*others, *leads.values()])
        times |= {r.behind for r in reaches.values() if r.behind is not None}
        if any(f in times for f in factors.cumulative):
            if len(times) > 1 and self.derive:
                raise NotCausalError(
                    f"{equation} runs along one time axis of a value that has another: values of pairs of rows have no "
                    "running state of bounded size"
                )
            timing.running.add(equation)
            if equation.name == "associative_scan":
                timing.assume(f"the operator of {equation} is associative, as whoever calls associative_scan says")
        for node, dims in zip(equation.outputs, factors.outputs, strict=True):
            if 0 in node.shape and not self.derive:
                continue  # nothing of no rows
            timing.dims[node] = frozenset(d for d, f in enumerate(dims) if f in times)
            timing.ahead[node] = ahead
            for d in timing.dims[node]:
                lead = max([*others, leads.get(dims[d], ahead)])
                if lead < ahead:
                    timing.leads[node, d] = lead
            self._extend(equation, factors, node, dims)
            if not timing.dims[node] and equation.name == "scan":
                self.finals[node] = equation
            blame = next((self.blame[n] for n in reached if n in self.blame), equation)
            if ahead > 0:
                self.blame[node] = blame

    def _extend(self, equation: Equation, factors: Factors, out: Node, dims: tuple[int | None, ...]) -> None:
        """Where rows that aren't time stand beside time: joined on by a concatenation, cut off again by a slice."""
        timing = self.timing
        for d in timing.of(out):
            found = set()
            for number, node in enumerate(equation.inputs):
                for e in timing.of(node):
                    if factors.inputs[number][e] == dims[d]:
                        before, after = timing.extent.get((node, e), (0, 0))
                        low, high = factors.halo.get((number, e), (0, 0))
                        if node.shape[e] - before - after != timing.capacity or low != high:
                            return
                        before -= low
                        found.add((before, out.shape[d] - timing.capacity - before))
            if len(found) == 1:
                (extent,) = found
                if min(extent) >= 0 and extent != (0, 0) and equation.name != "pad":
                    timing.extent[out, d] = extent

    def _long(self, equation: Equation, reached: list[Node]) -> None:
        """A long convolution is causal by what it is."""
        timing, (out,) = self.timing, equation.outputs
        factors, signal, time = convolution.factors_of_long(equation, reached)
        timing.factors[equation] = factors
        dim = next(d for dims in factors.inputs for d, f in enumerate(dims) if f == signal)
        if timing.of(reached[0]) != {dim} or reached[0].shape[dim] != timing.capacity or timing.ahead[reached[0]] > 0:
            raise NotCausalError(f"{equation}: its signal must be rows in time along dim {dim}, none looking ahead")
        timing.summed[equation] = {signal: Reach(time, None)}
        timing.dims[out], timing.ahead[out] = frozenset({time}), 0
        timing.notes.append(f"{equation} has no state of bounded size: every input is kept, and a token costs O(time)")

    def _over_time(self, scan: Equation) -> bool:
        parts = _jax.scan_parts(scan.params)
        return any(0 in self.timing.of(n) for n in scan.inputs[parts.consts + parts.carry :])

    def _counters(self, scan: Equation) -> list[int]:
        """Which stacked operands are arange."""
        parts = _jax.scan_parts(scan.params)
        counting = Linear((1.0,), 0.0)
        stacked = range(parts.consts + parts.carry, len(scan.inputs))
        return [i for i in stacked if self.bands.linear.get(scan.inputs[i]) == counting]

    def _check_scan(self, scan: Equation) -> None:
        """A scan over time may take rows only one by one, from the first on."""
        parts = _jax.scan_parts(scan.params)
        for number, node in enumerate(scan.inputs):
            dims = self.timing.of(node)
            if node in self.timing.dims and (number < parts.consts + parts.carry or dims != {0}):
                raise NotCausalError(
                    f"{scan} goes over time, but operand {number} of shape {list(node.shape)} depends on rows in "
                    "another way than row by row: its first carry and constants must not depend on the rows"
                )

    def _times(self, equation: Equation, factors: Factors) -> set[int]:
        """Factors of an equation that are time."""
        times: set[int] = set()
        for number, (node, dims) in enumerate(zip(equation.inputs, factors.inputs, strict=True)):
            for d in self.timing.of(node):
                factor = dims[d]
                shift = factors.halo.get((number, d), (0, 0))
                if factor is None or equation.name in _BODIES or (shift != (0, 0) and equation.name not in _SHIFTS):
                    raise NotCausalError(
                        f"{equation} needs the time axis (dim {d} of {list(node.shape)}) as a whole, and no rule says "
                        "how it treats later rows. Rewrite it with operations that work row by row, or mask explicitly"
                    )
                times.add(factor)
        for factor in times & set(factors.cumulative):
            if factors.cumulative[factor] != "forward":
                raise NotCausalError(f"{equation} runs from the last row to the first, so it looks at later rows")
        return times

    def _leads(self, equation: Equation, factors: Factors) -> dict[int, int]:
        """For each factor that is time, how far past its index the rows lie that the operands depend on."""
        found: dict[int, int] = {}
        for number, node in enumerate(equation.inputs):
            for d in self.timing.of(node):
                factor = factors.inputs[number][d]
                assert factor is not None
                lead = self.timing.lead(node, d) + factors.halo.get((number, d), (0, 0))[1]
                found[factor] = max(lead, found.get(factor, lead))
        return found

    def _reach(self, equation: Equation, factors: Factors, factor: int, ahead: int) -> Reach:
        """Proves that a reduction over time ignores rows after another time index."""
        timing, neutral = self.timing, _NEUTRAL[factors.reduction or "sum"]
        kept = {f for dims in factors.outputs for f in dims}
        leak = None
        for node, dims in zip(equation.inputs, factors.inputs, strict=True):
            if factor not in dims:
                continue
            s = dims.index(factor)
            extent = timing.extent.get((node, s), (0, 0))
            if node.shape[s] - sum(extent) != timing.capacity:
                raise NotCausalError(
                    f"{equation} combines {node.shape[s]} rows of a time axis of {timing.capacity}: a reduction over a "
                    "shortened or lengthened axis can't be derived; mask rows instead of cutting them off"
                )
            fact = self.bands.masks(node, s, (extent[0], extent[0] + timing.capacity), neutral)
            if fact is None or dims[fact.a] not in kept:
                continue
            if fact.gap + ahead <= 0:
                if self.derive and fact.gap > extent[0]:
                    raise NotCausalError(
                        f"{equation} sees {fact.gap} rows past its own, of values shifted by as many: a step hasn't "
                        "made them yet. Shift the mask instead of the values"
                    )
                if fact.assumed or (factors.reduction == "max" and not math.isinf(fact.fill)):
                    self._assume_scores(equation, fact)
                window = self.bands.window(node, s, fact.a, neutral)
                narrow = window is not None and window < timing.capacity - 1 and extent == (0, 0)
                counts = equation.name in ("argmax", "argmin", "top_k")  # a place in a window isn't one in the sequence
                return Reach(dims[fact.a], window if narrow and not counts else None, extent, fact.gap)
            leak = fact.gap + ahead
        if leak is not None:
            raise NotCausalError(
                f"{equation} reads up to {leak} rows ahead: its mask hides only what is more than {leak} rows later. "
                "A causal mask keeps s <= t"
            )
        if self.assume_causal and kept & {f for dims in factors.inputs for f in dims if f is not None}:
            timing.assume(f"{equation} ignores later rows (assume_causal=True)")
            return Reach(None, None)
        raise NotCausalError(
            f"{equation} combines all rows of the time axis, and no mask was found that hides later ones (a mask must "
            f"be exactly 0 in a sum, or -inf or at most {VERY_NEGATIVE:g} before a softmax). If the model is causal "
            "all the same, pass assume_causal=True"
        )

    def _assume_scores(self, equation: Equation, fact: Beyond) -> None:
        """A finite mask hides only if something else is seen: where every score is the mask's, all rows count alike."""
        if fact.gap < 0:
            raise NotCausalError(
                f"{equation}: the mask shows the first {-fact.gap} rows nothing, and its value is finite, so a softmax "
                "there is over all rows, later ones too. Mask with -inf, or let each row see itself"
            )
        self.timing.assume(f"scores stay above the mask value where {equation} reads them")

    def prove_chunks(self) -> None:
        """Proves what works on chunks of rows, and puts one equation in the place of each region of it."""
        timing = self.timing
        for region in self.regions.finished(timing.graph.outputs):
            equation, factors = chunks.equation_of(region, timing, prove, self.assume_causal)
            timing.factors[equation] = factors
            timing.running.add(equation)
            inner = equation.params["chunks"].timing
            cost = (
                f"time is cut into chunks of {region.size} rows at {region.source}: a token costs the work of one "
                "whole chunk there, wherever it stands"
            )
            timing.notes += [note for note in (cost, *inner.notes) if note not in timing.notes]
            for what in inner.assumptions:
                timing.assume(what)
            self.equations.append(equation)

    def check_output(self, number: int, node: Node) -> None:
        """An output must have one row for each row of the input, none of which looks ahead."""
        if node in self.finals:
            raise NotCausalError(
                f"output {number} of shape {list(node.shape)} is what {self.finals[node]} leaves after the last row; "
                "return a row for each row of the input"
            )
        dims = self.timing.of(node)
        if len(dims) != 1:
            raise NotCausalError(
                f"output {number} of shape {list(node.shape)} has {len(dims)} time axes; it must have one, "
                "a row for each row of the input (a pooled or summed output looks at later rows)"
            )
        (dim,) = dims
        if node.shape[dim] != self.timing.capacity:
            raise NotCausalError(
                f"output {number} has {node.shape[dim]} rows for {self.timing.capacity} rows of input; it must have a "
                "row for each"
            )
        if self.timing.ahead[node] > 0:
            raise NotCausalError(f"output {number} looks {self.timing.ahead[node]} rows ahead: {self.blame[node]}")

    def finished(self, graph: Graph) -> Graph:
        """The graph with its scans unrolled, equations numbered in order."""
        if self.regions.found:
            self.equations = ordered(self.equations)
        for number, equation in enumerate(self.equations):
            equation.number = number
        return Graph(graph.inputs, graph.outputs, self.equations)


def _picks(top_k: Equation) -> Factors:
    """Factors of top_k as the reduction that it is: masked rows aren't among the k largest, or are the mask's value."""
    factors, dims = factors_of(top_k), tuple(range(len(top_k.inputs[0].shape)))
    known = factors.inputs[0][:-1] == dims[:-1]
    return Factors((dims,), factors.outputs, reduction="max") if known else factors


def _row_by_row(scan: Equation) -> Factors:
    """Factors of a scan, of which the leading dims alone count here: the stacked arrays' and the stacked results'."""
    parts = _jax.scan_parts(scan.params)

    def dims(nodes: tuple[Node, ...], whole: int) -> tuple[tuple[int | None, ...], ...]:
        return tuple(
            tuple(0 if number >= whole and d == 0 else None for d in range(len(n.shape)))
            for number, n in enumerate(nodes)
        )

    direction = "reverse" if parts.reverse else "forward"
    inputs, outputs = dims(scan.inputs, parts.consts + parts.carry), dims(scan.outputs, parts.carry)
    return Factors(inputs, outputs, cumulative={0: direction})


_OWN = {"scan": _row_by_row, "top_k": _picks, first_row.NAME: first_row.factors_of_first}
_NEUTRAL = {
    "dot": lambda fill: fill == 0,
    "sum": lambda fill: fill == 0,
    "max": lambda fill: fill <= VERY_NEGATIVE,
    "min": lambda fill: fill >= -VERY_NEGATIVE,
    "and": lambda fill: fill == 1,
    "or": lambda fill: fill == 0,
    "prod": lambda fill: fill == 1,
}
