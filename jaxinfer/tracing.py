"""`trace`: a plain function, Flax NNX module or Flax linen module, with Specs, to a Program."""

import sys
from collections.abc import Callable
from typing import Any

import jax

from jaxinfer import specs
from jaxinfer.errors import TraceError
from jaxinfer.graph import flatten
from jaxinfer.program import Program


def trace(forward: Any, *arguments: Any, method: Any = None, name: str | None = None, **keywords: Any) -> Program:
    """Traces a forward pass.

        trace(function, params, *specs)            function(params, *inputs) -> any pytree
        trace(linen_module, variables, *specs)     keywords (train=False) go to module.apply as static values
        trace(nnx_module, *specs)                  its state is its parameters

    Args:
        forward: the function or module. A module's `__call__` is traced, or `method`.
        arguments: the parameters (any pytree, also of jax.ShapeDtypeStruct), then a pytree of `ji.spec` for each input.
        method: name (linen, NNX) or function (linen) to call instead of `__call__`.
        name: what the Program is called; the function's or class's own name by default.

    Raises:
        TraceError: the forward raises, changes its own state, draws random bits, or an input isn't a spec.
    """
    function, params, inputs = _resolved(forward, arguments, method, keywords)
    return _traced(name or _name(forward), function, params, inputs, stateful=_is_nnx(forward))


def trace_named(forward: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Program:
    """Traces forward(*arguments, **named) where `named` are specs too: one more input of the Program, a dict."""
    function, params, inputs = _resolved(forward, arguments, None, {})

    def by_name(params: Any, *inputs: Any) -> Any:
        return function(params, *inputs[:-1], **inputs[-1])

    return _traced(_name(forward), by_name, params, (*inputs, named), stateful=_is_nnx(forward))


def _resolved(
    forward: Any, arguments: tuple[Any, ...], method: Any, keywords: dict[str, Any]
) -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
    """(function(params, *inputs, **named), params, specs of the inputs)"""
    if _is_nnx(forward):
        function, params = nnx_function(forward, method, keywords)
        inputs = arguments
    elif _is_linen(forward):
        function = _linen_function(forward, method, keywords)
        params, inputs = _params_first(arguments, "variables")
    elif callable(forward):
        if method is not None or keywords:
            unknown = ["method"] * (method is not None) + sorted(keywords)
            raise TraceError(f"{', '.join(unknown)}: only modules take these; close over values of a plain function")
        function = forward
        params, inputs = _params_first(arguments, "params")
    else:
        raise TraceError(f"a function or Flax module is wanted, got {type(forward).__name__}")
    return function, params, inputs


def _traced(
    name: str, function: Callable[..., Any], params: Any, inputs: tuple[Any, ...], *, stateful: bool
) -> Program:
    if not inputs:
        raise TraceError("no inputs: describe each positional input of the forward, e.g. ji.spec('batch 32 32 3')")
    for tree in inputs:
        specs.leaves(tree)
    program = Program(name, function, params, tuple(inputs))
    _ = program.jaxpr  # traced now, so that a forward that can't be traced says so here
    if stateful:
        _check_randomness(program)
    return program


def _params_first(arguments: tuple[Any, ...], what: str) -> tuple[Any, tuple[Any, ...]]:
    if not arguments:
        raise TraceError(f"the {what} come first: trace(forward, {what}, ji.spec(...), ...)")
    return arguments[0], arguments[1:]


def _name(forward: Any) -> str:
    return getattr(forward, "__name__", None) or type(forward).__name__


def _is_nnx(forward: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(forward, nnx.Module)


def _is_linen(forward: Any) -> bool:
    linen = sys.modules.get("flax.linen")
    return linen is not None and isinstance(forward, linen.Module)


def nnx_function(module: Any, method: str | None, keywords: dict[str, Any]) -> tuple[Callable[..., Any], Any]:
    """(function(params, *inputs), params) of an NNX module: its state as a nested dict, merged back for each call."""
    from flax import nnx

    graph, randomness, state = nnx.split(module, nnx.RngState, ...)

    def function(params: Any, *inputs: Any, **named: Any) -> Any:
        # Copies: replace_by_pure_dict writes in place, and a Variable of an outer trace must not be changed.
        filled, keys = (jax.tree.map(lambda leaf: leaf, tree) for tree in (state, randomness))
        nnx.replace_by_pure_dict(filled, params)
        live = nnx.merge(graph, keys, filled)
        before = dict(_leaves(live))
        output = (live if method is None else getattr(live, method))(*inputs, **named, **keywords)
        changed = [path for path, leaf in _leaves(live) if before.get(path) is not leaf]
        if changed:
            raise TraceError(
                f"{type(module).__name__} changes its own state when called ({', '.join(changed[:3])}): a forward to "
                "serve must not. Call model.eval() first (dropout left on draws random bits; BatchNorm collects)"
            )
        return output

    return function, nnx.to_pure_dict(state)


def _leaves(module: Any) -> list[tuple[str, Any]]:
    from flax import nnx

    _, _, state = nnx.split(module, nnx.RngState, ...)  # a count of keys drawn is no state: see _check_randomness
    return [(jax.tree_util.keystr(p), v) for p, v in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(state))]


_RANDOM = ("random_", "threefry", "rng_")


def _check_randomness(program: Program) -> None:
    """An NNX module may draw keys (nnx.RNN does, for a first carry of zeros) as long as no output depends on them.

    Raises:
        TraceError: naming the equation that draws.
    """
    for equation in flatten(program.jaxpr).equations:
        if equation.name.startswith(_RANDOM):
            raise TraceError(
                f"{program.name} draws random bits ({equation}): a forward to serve must not. Call model.eval() first, "
                "which turns dropout off"
            )


def _linen_function(module: Any, method: Any, keywords: dict[str, Any]) -> Callable[..., Any]:
    from flax import errors

    def function(variables: Any, *inputs: Any, **named: Any) -> Any:
        try:
            return module.apply(variables, *inputs, method=method, **named, **keywords)
        except (errors.InvalidRngError, errors.ModifyScopeVariableError) as error:
            raise TraceError(
                f"{type(module).__name__} draws random bits or changes its own state when called; a forward to serve "
                f"must not. Pass its own switch, e.g. train=False or deterministic=True ({error})"
            ) from error

    return function
