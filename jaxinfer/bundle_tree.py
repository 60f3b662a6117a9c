"""Pytrees of dict, list, tuple and None as JSON, so that a bundle restores them without a pickle.

A node is null, {"dict": [[key, node], ...]}, {"list": [node, ...]}, {"tuple": [node, ...]} or {"leaf": anything}.
"""

from collections.abc import Callable
from typing import Any

import jax

from jaxinfer.errors import CheckpointError

_DEPTH = 100  # deeper trees would run into Python's own limit


def encode(tree: Any, leaf: Callable[[Any], Any], what: str) -> Any:
    """The JSON of a pytree; `leaf` makes that of a leaf.

    Raises:
        CheckpointError: a container that a bundle can't restore; `what` says where it was met.
    """
    return _encode(tree, leaf, what, "", _DEPTH)


def _encode(tree: Any, leaf: Callable[[Any], Any], what: str, path: str, room: int) -> Any:
    def inner(value: Any, key: Any) -> Any:
        return _encode(value, leaf, what, f"{path}[{key!r}]", room - 1)

    if room == 0:
        raise CheckpointError(f"{what} is nested deeper than the {_DEPTH} levels that a bundle holds; flatten it.")
    if tree is None:
        return None
    if jax.tree_util.all_leaves([tree]):
        return {"leaf": leaf(tree)}
    kind = type(tree)
    if kind is dict:
        for key in tree:
            if type(key) not in (str, int):
                raise CheckpointError(
                    f"{what}{path} has the key {key!r:.60}; a bundle restores dicts with str and int keys. Rename it."
                )
        return {"dict": [[key, inner(value, key)] for key, value in tree.items()]}
    if kind is list or kind is tuple:
        return {kind.__name__: [inner(value, i) for i, value in enumerate(tree)]}
    hint = "its ._asdict()" if hasattr(tree, "_fields") else "a dict, e.g. dict(...) or flax.core.unfreeze(...),"
    raise CheckpointError(
        f"{what}{path} is a {kind.__module__}.{kind.__qualname__}. A bundle is loaded without the code that defines "
        f"it, and restores dict, list, tuple and None. Use {hint} in its place in the forward that you trace."
    )


def decode(node: Any, leaf: Callable[[Any], Any], what: str) -> Any:
    """The pytree of `encode`'s JSON; `leaf` makes a leaf, and raises CheckpointError where it can't.

    Raises:
        CheckpointError: `what` names the place.
    """
    return _decode(node, leaf, what, _DEPTH)


def _decode(node: Any, leaf: Callable[[Any], Any], what: str, room: int) -> Any:
    if room == 0:
        raise CheckpointError(f"{what} is nested deeper than {_DEPTH} levels.")
    match node:
        case None:
            return None
        case {"leaf": value, **rest} if not rest:
            return leaf(value)
        case {"list": list(nodes), **rest} if not rest:
            return [_decode(n, leaf, what, room - 1) for n in nodes]
        case {"tuple": list(nodes), **rest} if not rest:
            return tuple(_decode(n, leaf, what, room - 1) for n in nodes)
        case {"dict": list(items), **rest} if not rest and all(_is_item(item) for item in items):
            found = {key: _decode(n, leaf, what, room - 1) for key, n in items}
            if len(found) == len(items) and len(set(map(type, found))) <= 1:  # JAX sorts keys: of one type
                return found
    raise CheckpointError(f"{what} holds {node!s:.80}, which is no node of a tree.")


def _is_item(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 2 and type(item[0]) in (str, int)
