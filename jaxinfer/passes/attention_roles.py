"""Which dims of an attention's operands are batch, heads, queries, keys and features, and the equation made of them."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxinfer.graph import Equation, Node
from jaxinfer.passes import atoms
from jaxinfer.passes.atoms import Atom, Dims
from jaxinfer.passes.attention_equation import ATTENTION, softcap
from jaxinfer.passes.rewriting import Rewriter

Operand = tuple[Node, Dims]


@dataclass
class Match:
    """What is put in place of an attention's last product."""

    result: Node
    what: str
    operands: list[tuple[Node, dict[str, Any]]]
    params: dict[str, Any]
    shape: tuple[int, ...]
    back: dict[str, Any]
    source: str

    def make(self, new: Rewriter) -> Node:
        operands = [new.emit(atoms.arrange, new(n), source=self.source, **how) for n, how in self.operands]
        like = Node(self.shape, self.result.dtype)
        result = new.add(ATTENTION, self.params, operands, like, self.source)
        return new.emit(_back, result, source=self.source, **self.back)


def _back(x: Any, sizes: tuple[int, ...], order: tuple[int, ...], shape: tuple[int, ...]) -> Any:
    return jnp.transpose(x.reshape(sizes), order).reshape(shape)


@dataclass
class Roles:
    """Which atoms are what."""

    q: Operand
    k: Operand
    v: Operand
    batch: list[Atom]
    groups: list[Atom]
    heads: list[Atom]
    query: list[Atom]
    keys: list[Atom]
    features: list[Atom]
    values: list[Atom]

    def match(self, product: Equation, others: list[Operand], params: dict[str, Any], result: Dims) -> Match | None:
        """The match, if every operand fits the layout."""
        layouts = [
            (self.q, (self.batch, self.query, self.groups, self.heads, self.features)),
            (self.k, (self.batch, self.keys, self.groups, self.features)),
            (self.v, (self.batch, self.keys, self.groups, self.values)),
        ]
        layouts += [(o, (self.batch, self.groups, self.heads, self.query, self.keys)) for o in others]
        operands = []
        for (node, dims), groups in layouts:
            how = atoms.arrangement(dims, groups)
            if how is None:
                return None
            operands.append((node, how))
        order = (self.batch, self.query, self.groups, self.heads, self.values)
        mine, theirs = [a for group in order for a in group], atoms.flat(result)
        if set(mine) != set(theirs) or len(mine) != len(theirs):
            return None
        out = product.outputs[0]
        back = {"sizes": tuple(a.size for a in mine), "order": tuple(map(mine.index, theirs)), "shape": out.shape}
        shape = tuple(int(np.prod([a.size for a in group])) for group in order)
        return Match(out, self._what(params["steps"], shape), operands, params, shape, back, product.source)

    def _what(self, steps: tuple[Any, ...], shape: tuple[int, ...]) -> str:
        names = [name for name, *_ in steps if name in ("mask", "bias", "factor", "less", "over")]
        names += ["softcap"] if softcap(steps) else []
        grouped = f" in {shape[2]} groups" if shape[3] > 1 else ""
        keys = int(np.prod([a.size for a in self.keys]))
        more = f" with {', '.join(names)}" if names else ""
        return f"attention of {shape[2] * shape[3]} heads{grouped}, {shape[1]} queries on {keys} keys{more}"


def assign(q: Operand, k: Operand, v: Operand, keys: list[Atom], features: set[Atom]) -> Roles | None:
    q, k, v = _without_repeats(q, k, v)
    mine, theirs, values = atoms.flat(q[1]), atoms.flat(k[1]), atoms.flat(v[1])
    shared = [a for a in mine if a in theirs and a in values]
    alone = [a for a in mine if a not in theirs and a not in values]
    contracted = [a for a in mine if a in theirs and a not in values]
    new = [a for a in values if a not in theirs and a not in mine]
    if set(theirs) != {*shared, *contracted, *keys} or set(values) != {*shared, *keys, *new}:
        return None
    if set(contracted) != {a for f in features for a in atoms.flat([[f]])} or set(mine) != {
        *shared,
        *alone,
        *contracted,
    }:
        return None
    query = _query(alone, q[1], k[1], keys)
    heads = [a for a in alone if a not in query]
    groups = shared[-1:] if len(shared) > 1 else []
    batch = [a for a in shared if a not in groups]
    return Roles(q, k, v, batch, groups, heads, query, keys, contracted, new)


def _query(alone: list[Atom], q: Dims, k: Dims, keys: list[Atom]) -> list[Atom]:
    """Which of the query's own atoms count its rows; the others are heads that share keys. Rows are as many as keys in
    self-attention, else they have the place in q that keys have in k. Whichever is taken, the result is the same; a
    kernel wants to know."""
    as_many = [a for a in alone if a.size == int(np.prod([b.size for b in keys]))]
    if len(as_many) == 1:
        return as_many
    place = next(d for d, dim in enumerate(k) if set(atoms.flat([dim])) & set(keys))
    there = [a for a in atoms.flat(q[place : place + 1]) if a in alone]
    return there or alone[:1]


def _without_repeats(q: Operand, k: Operand, v: Operand) -> tuple[Operand, Operand, Operand]:
    """Keys and values before their heads were repeated for the query heads, where both were repeated alike."""
    (keys, key_dims, key_gone), (values, value_dims, value_gone) = atoms.unrepeated(*k), atoms.unrepeated(*v)
    if key_gone and set(atoms.flat([list(key_gone)])) == set(atoms.flat([list(value_gone)])):
        return q, (keys, key_dims), (values, value_dims)
    return q, k, v
