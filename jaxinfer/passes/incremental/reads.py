"""A scan over arange(time) whose body reads array[t] scans the array: brings the first into the form of the second."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxinfer import _jax
from jaxinfer.graph import Equation, Graph, Node, evaluate, flatten, in_place_of


def read_by_rows(scan: Equation, counters: Sequence[int], wanted: set[Node]) -> list[Equation] | None:
    """The scan with its `wanted` constants among what it scans over; None where one is read otherwise, or none is.

    Args:
        counters: numbers of the stacked operands that hold the step's own number.
        wanted: constants that depend on rows.
    """
    parts = _jax.scan_parts(scan.params)
    constants = [i for i, node in enumerate(scan.inputs[: parts.consts]) if node in wanted]
    if not counters or not constants:
        return None
    body = flatten(parts.body)
    number = _numbers(body, [body.inputs[i] for i in counters])
    dims: dict[int, int] = {}
    inputs = list(body.inputs)
    for i in constants:
        reads = [e for e in body.equations if body.inputs[i] in e.inputs]
        found = {_dim_read(e, body.inputs[i], number) for e in reads}
        if len(found) != 1 or None in found:
            return None
        (dim,) = found
        assert dim is not None
        if body.inputs[i].shape[dim] != parts.length:
            return None
        dims[i], inputs[i] = dim, _replaced(reads, dim)
    return _spliced(scan, parts, Graph(tuple(inputs), body.outputs, body.equations), dims)


def _numbers(body: Graph, counters: Sequence[Node]) -> set[Node]:
    """Values of a body that are the step's number, also after an index that might be negative was made good."""
    number, negative = set(counters), set()
    for equation in body.equations:
        first, *rest = equation.inputs or (None,)
        if equation.name in ("convert_element_type", "squeeze", "reshape", "copy") and first in number:
            number.update(equation.outputs)
        elif equation.name == "lt" and first in number and rest[0].constant and rest[0].value == 0:
            negative.update(equation.outputs)
        elif equation.name == "select_n" and first in negative and rest[0] in number:
            number.update(equation.outputs)
    return number


def _dim_read(equation: Equation, array: Node, number: set[Node]) -> int | None:
    """The dim of which an equation reads the row of the step's number, the others whole; None if it does otherwise."""
    if equation.name != "dynamic_slice" or equation.inputs[0] is not array or array in equation.inputs[1:]:
        return None
    sizes = equation.params["slice_sizes"]
    read = [d for d, index in enumerate(equation.inputs[1:]) if index in number and sizes[d] == 1]
    whole = [d for d in range(len(sizes)) if sizes[d] == array.shape[d] and d not in read]
    return read[0] if len(read) == 1 and len(whole) == len(sizes) - 1 else None


def _replaced(reads: Sequence[Equation], dim: int) -> Node:
    """Makes the reads of a row spread out an element in their place, which is returned."""
    shape = reads[0].outputs[0].shape
    kept = tuple(d for d in range(len(shape)) if d != dim)
    element = Node(tuple(shape[d] for d in kept), reads[0].outputs[0].dtype)
    for equation in reads:
        equation.primitive, equation.inputs = jax.lax.broadcast_in_dim_p, (element,)
        equation.params = {"shape": shape, "broadcast_dimensions": kept, "sharding": None}
    return element


def _spliced(scan: Equation, parts: _jax.Scan, body: Graph, dims: dict[int, int]) -> list[Equation]:
    """The new scan, ending in the old one's results."""

    def run(*operands: jax.Array) -> list[jax.Array]:
        rows = {i: jnp.moveaxis(operands[i], d, 0) for i, d in dims.items()}
        first, stacks = operands[parts.consts : parts.consts + parts.carry], operands[parts.consts + parts.carry :]

        def step(carry, elements):
            read, own = elements
            constants = [read[i] if i in read else operands[i] for i in range(parts.consts)]
            results = evaluate(body, [*constants, *carry, *own])
            return results[: parts.carry], results[parts.carry :]

        carry, results = jax.lax.scan(step, list(first), (rows, list(stacks)), parts.length, parts.reverse)
        return [*carry, *results]

    return in_place_of(scan.outputs, run, scan.inputs, scan.source)
