"""A rewritten and staged program against the forward as it was traced."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.graph import evaluate, flatten
from jaxinfer.passes import optimise, stage
from jaxinfer.passes.rewriting import verify


def random_like(tree, seed=0, low=0.3):
    """Positive numbers, none near 0, for each array of a pytree: also variances must have a root."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(rng.uniform(low, 1.5, a.shape), a.dtype), tree)


def numbers(count, seed=1):
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


class Outcome:
    """One forward, rewritten by `passes`: `error` is the largest difference over the largest output."""

    def __init__(self, program, passes=None, seed=0, **keywords):
        graph = flatten(program.jaxpr)
        count = len(jax.tree.leaves(program.abstract_params))
        self.rewritten, self.reports = optimise(graph, count, passes, check=verify)
        self.staged = stage(self.rewritten, count, **keywords)
        self.prelude, self.main = verify(self.staged.prelude), verify(self.staged.main)
        self.params = jax.tree.leaves(random_like(program.params, seed))
        self.inputs = [self._input(n, i + 7) for i, n in enumerate(graph.inputs[count:])]
        self.want = jax.jit(lambda p, x: evaluate(graph, [*p, *x]))(self.params, self.inputs)
        self.values = jax.jit(lambda p: evaluate(self.prelude, p))(self.params)
        kept = [self.params[i] for i in self.staged.kept]
        self.got = jax.jit(lambda k, v, x: evaluate(self.main, [*k, *v, *x]))(kept, self.values, self.inputs)

    @staticmethod
    def _input(node, seed):
        rng = np.random.default_rng(seed)
        if node.dtype.kind in "iu":
            return jnp.asarray(rng.integers(0, 7, node.shape), node.dtype)
        if node.dtype.kind == "b":
            return jnp.asarray(rng.integers(0, 2, node.shape), node.dtype)
        return jnp.asarray(rng.standard_normal(node.shape), node.dtype)

    @property
    def error(self):
        worst = 0.0
        for want, got in zip(self.want, self.got, strict=True):
            assert (want.shape, want.dtype) == (got.shape, got.dtype)
            a, b = (np.asarray(x, np.float64) for x in (want, got))
            assert np.isfinite(a).all() and np.isfinite(b).all()
            worst = max(worst, float(np.abs(a - b).max() / np.abs(a).max()))
        return worst

    def names(self):
        """Primitives of the main graph."""
        return [e.name for e in self.main.equations]

    def notes(self, name):
        return [n.what for r in self.reports if r.name == name for n in r.notes]
