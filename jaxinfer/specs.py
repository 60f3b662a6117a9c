"""What varies in an input: `spec("batch 224 224 3", "float32")`. A name is a dynamic dim, a number a fixed one."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import ml_dtypes  # noqa: F401  registers bfloat16 and the float8 types with numpy
import numpy as np

from jaxinfer import _jax
from jaxinfer.errors import TraceError


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of one array input; a str dim is named and dynamic, an int dim is fixed."""

    dims: tuple[str | int, ...]
    dtype: np.dtype

    @property
    def names(self) -> tuple[str, ...]:
        """The named dims, in order."""
        return tuple(d for d in self.dims if isinstance(d, str))

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The concrete shape under a size for each named dim."""
        return tuple(sizes[d] if isinstance(d, str) else d for d in self.dims)

    def struct(self, sizes: Mapping[str, int]) -> jax.ShapeDtypeStruct:
        """An abstract array of that shape."""
        return jax.ShapeDtypeStruct(self.shape(sizes), self.dtype)

    def __str__(self) -> str:
        return f"{self.dtype.name}[{' '.join(map(str, self.dims))}]"


class Dims(tuple[str | int, ...]):
    """For each dim of an output its name ("batch", "batch*time" where merged) or size. A leaf to jax.tree functions."""


def spec(dims: str, dtype: Any = "float32") -> Spec:
    """Declares one input of a forward pass.

    Args:
        dims: dims apart by blanks, e.g. "batch 32 32 3", "batch time"; "" for a scalar.
        dtype: anything numpy takes as a dtype, and "bfloat16".

    Raises:
        TraceError: a name twice, a negative size, a name that isn't an identifier, an unknown dtype.
    """
    parsed: list[str | int] = []
    for part in dims.split():
        if part.isdecimal():
            parsed.append(int(part))
        elif part.isidentifier():
            if part in parsed:
                raise TraceError(f"spec {dims!r} names {part!r} twice; give the two dims different names")
            parsed.append(part)
        else:
            raise TraceError(f"spec {dims!r}: {part!r} is neither a size nor a name; write e.g. 'batch 32 32 3'")
    try:
        return Spec(tuple(parsed), np.dtype(dtype))
    except TypeError as error:
        raise TraceError(f"spec {dims!r}: {dtype!r} is not a dtype; use e.g. 'float32', 'bfloat16', 'int32'") from error


def is_spec(value: Any) -> bool:
    """For jax.tree functions: a Spec is a leaf."""
    return isinstance(value, Spec)


def leaves(specs: Any) -> list[Spec]:
    """The Specs of a pytree, in flattening order; anything else in it is a TraceError."""
    found = jax.tree.leaves(specs, is_leaf=is_spec)
    for leaf in found:
        if not is_spec(leaf):
            raise TraceError(f"an input must be described by ji.spec(...), got {type(leaf).__name__}: {leaf!r}")
    return found


def names(specs: Any) -> tuple[str, ...]:
    """Every named dim of a pytree of Specs, each once, in order of appearance."""
    return tuple(dict.fromkeys(name for leaf in leaves(specs) for name in leaf.names))


def structs(specs: Any, sizes: Mapping[str, int]) -> Any:
    """The pytree of abstract inputs under a size for each named dim."""
    return jax.tree.map(lambda s: s.struct(sizes), specs, is_leaf=is_spec)


def shapes_of(tree: Any) -> Any:
    """A pytree's arrays as ShapeDtypeStructs, in the dtypes that JAX takes them in."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), _jax.dtype_of(x)), tree)


def fresh_primes(count: int, taken: Iterable[int]) -> list[int]:
    """Distinct primes >= 11 that divide none of `taken`: sizes that no other dim can be mistaken for."""
    sizes = [t for t in set(taken) if t > 1]
    found: list[int] = []
    candidate = 11
    while len(found) < count:
        prime = all(candidate % d for d in range(2, int(candidate**0.5) + 1))
        if prime and all(size % candidate for size in sizes):
            found.append(candidate)
        candidate += 2
    return found
