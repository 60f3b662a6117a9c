"""Dims followed through transposes and reshapes: each dim is a list of atoms, and a reshape that splits a dim splits
its atom for everybody that has it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp

from jaxinfer.axes.factors import reshape_groups
from jaxinfer.graph import Equation, Node


@dataclass(eq=False)
class Atom:
    """An index with so many values; once split, the parts stand for it, the slowest first."""

    size: int
    parts: list["Atom"] = field(default_factory=list)


Dims = list[list[Atom]]  # for each dim of a value; dims of size 1 have no atoms


def fresh(shape: Iterable[int]) -> Dims:
    """A new atom for each dim."""
    return [[Atom(n)] if n != 1 else [] for n in shape]


def settled(dims: Iterable[list[Atom]]) -> Dims:
    """The dims with the parts in place of what was split."""
    return [list(_parts(atoms)) for atoms in dims]


def flat(dims: Iterable[list[Atom]]) -> list[Atom]:
    """All atoms in order."""
    return [atom for dim in settled(dims) for atom in dim]


def _parts(atoms: Iterable[Atom]) -> Iterable[Atom]:
    for atom in atoms:
        if atom.parts:
            yield from _parts(atom.parts)
        else:
            yield atom


def moved(equation: Equation, dims: Dims) -> Dims | None:
    """The dims of the result of a transpose or reshape; None for a reshape that cuts across, as 4 x 6 to 6 x 4."""
    before, after = equation.inputs[0].shape, equation.outputs[0].shape
    if equation.name == "transpose":
        return [dims[d] for d in equation.params["permutation"]]
    return regrouped(dims, before, after)


def regrouped(dims: Dims, before: tuple[int, ...], after: tuple[int, ...]) -> Dims | None:
    """The dims after a reshape, splitting atoms where it splits dims."""
    out: Dims = [[] for _ in after]
    for mine, theirs in reshape_groups(before, after):
        atoms = flat(dims[d] for d in mine)
        for d in theirs:
            wanted = after[d]
            while wanted > 1:
                if not atoms:
                    return None
                atom = atoms.pop(0)
                if wanted % atom.size == 0:
                    out[d].append(atom)
                    wanted //= atom.size
                elif atom.size % wanted == 0:
                    atom.parts = [Atom(wanted), Atom(atom.size // wanted)]
                    out[d].append(atom.parts[0])
                    atoms.insert(0, atom.parts[1])
                    wanted = 1
                else:
                    return None
    return out


def dot_dims(equation: Equation, left: Dims, right: Dims) -> tuple[Dims, list[Atom], bool]:
    """Of a dot_general: (dims of the result, contracted atoms, whether the operands' dims pair up atom for atom)."""
    contracted, batch = equation.params["dimension_numbers"]
    pairs = [*zip(*contracted, strict=True), *zip(*batch, strict=True)]
    paired = all(flat([left[a]]) == flat([right[b]]) for a, b in pairs)
    free = [
        [d for d in range(len(side)) if d not in contracted[i] and d not in batch[i]]
        for i, side in enumerate((left, right))
    ]
    out = [left[d] for d in batch[0]] + [left[d] for d in free[0]] + [right[d] for d in free[1]]
    return out, flat(left[d] for d in contracted[0]), paired


def unrepeated(node: Node, dims: Dims) -> tuple[Node, Dims, set[Atom]]:
    """Follows a value back through moves and broadcasts to what it repeats: (that value, its dims, the atoms along
    which it is repeated). The value itself where nothing is repeated."""
    found = (node, dims, set[Atom]())
    repeated: set[Atom] = set()
    while not node.constant and (made := node.equation) is not None and made.inputs:
        source = made.inputs[0]
        if made.name == "transpose":
            back: Dims = [[] for _ in dims]
            for d, place in enumerate(made.params["permutation"]):
                back[place] = dims[d]
        elif made.name in ("reshape", "squeeze", "expand_dims"):
            regroup = regrouped(dims, node.shape, source.shape)
            if regroup is None:
                break
            back = regroup
        elif made.name == "broadcast_in_dim" and len(made.inputs) == 1:
            to = made.params["broadcast_dimensions"]
            back = [dims[d] if n != 1 else [] for n, d in zip(source.shape, to, strict=True)]
            kept = flat(back)
            gone = [a for a in flat(dims) if a not in kept]
            repeated.update(gone)
        else:
            break
        node, dims = source, back
        if repeated:
            found = (node, dims, repeated)
    return found


def arrange(x: Any, sizes: tuple[int, ...], order: tuple[int, ...], groups: tuple[Any, ...]) -> Any:
    """x reshaped to atoms of these sizes, put in this order, and grouped: for each dim of the result the sizes of its
    atoms, negative for one that x doesn't have. A group of which x has no atom gets size 1."""
    x = jnp.transpose(x.reshape(sizes), order)
    single = tuple(1 if n < 0 else n for group in groups for n in group)
    whole = tuple(abs(n) if any(m > 0 for m in group) else 1 for group in groups for n in group)
    shape = []
    for group in groups:
        size = 1
        for n in group:
            size *= abs(n) if any(m > 0 for m in group) else 1
        shape.append(size)
    return jnp.broadcast_to(x.reshape(single), whole).reshape(shape)


def arrangement(dims: Dims, groups: Sequence[Sequence[Atom]]) -> dict[str, Any] | None:
    """The arguments of `arrange` that bring a value of these dims into groups; None if it has other atoms too."""
    mine = flat(dims)
    wanted = [a for group in groups for a in group]
    if len(set(mine)) != len(mine) or not set(mine) <= set(wanted):
        return None
    return {
        "sizes": tuple(a.size for a in mine),
        "order": tuple(mine.index(a) for a in wanted if a in mine),
        "groups": tuple(tuple(a.size if a in mine else -a.size for a in group) for group in groups),
    }
