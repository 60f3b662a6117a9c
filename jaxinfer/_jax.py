"""Every use of JAX that depends on its version or has no public door, in one place; tested on the oldest and newest
supported JAX."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src import config as _config
from jax._src.interpreters import pxla as _pxla
from jax._src.lib import xla_client as _xla  # pyright: ignore[reportPrivateImportUsage]
from jax.core import ShapedArray as _ShapedArray
from jax.extend import core

from jaxinfer.errors import TraceError

# Equations that only call another jaxpr, and the parameter that holds it.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "call": "call_jaxpr",
    "custom_vmap_call": "call",
    "composite": "jaxpr",
    "eval_jaxpr": "jaxpr",
}


def called(equation: Any) -> tuple[core.Jaxpr, list[Any]] | None:
    """(jaxpr, its consts) that an equation calls, or None where it is no plain call."""
    key = CALLS.get(equation.primitive.name)
    if key is None or key not in equation.params:
        return None
    inner = equation.params[key]
    return (inner.jaxpr, list(inner.consts)) if isinstance(inner, core.ClosedJaxpr) else (inner, [])


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """(constants, carries) of a scan equation; its other operands are scanned over."""
    if "ft_in" in params:  # JAX 0.12 on
        constants, carries, _ = params["ft_in"].unpack()
        return len(constants), len(carries)
    return params["num_consts"], params["num_carry"]


def dtype_of(value: Any) -> np.dtype:
    """dtype of an array, ShapeDtypeStruct or Python scalar, as JAX would take it."""
    return np.dtype(jax.dtypes.canonicalize_dtype(value.dtype if hasattr(value, "dtype") else np.result_type(value)))


def source_line(equation: Any) -> str:
    """ "file.py:12 (function)" of the user's code that made an equation, or "" where JAX kept none."""
    traceback = equation.source_info.traceback
    if traceback is None:
        return ""
    # Raw frames: `frames` finds out the line of every frame of JAX's own, too.
    for code, place in zip(*traceback.raw_frames(), strict=True):
        if _of_user(name := code.co_filename):
            line = type(traceback).code_addr2line(code, place)
            return f"{name.rsplit('/', 1)[-1]}:{line} ({code.co_qualname})"
    return ""


@cache
def _of_user(file_name: str) -> bool:
    others = ("/site-packages/", "/lib/python", "<frozen", "/jaxinfer/tracing.py")
    return not any(part in file_name for part in others)


# What jax.lax.associative_scan leaves besides the equations of the operator that it was given; the two that move or
# broadcast dims are vmap's.
_TREE = frozenset({"add", "broadcast_in_dim", "concatenate", "or", "pad", "rev", "slice", "transpose"})


def scope(equation: Any) -> str:
    """ "associative_scan" where that function's own code made an equation, and not its operator's; otherwise ""."""
    traceback = equation.source_info.traceback
    if equation.primitive.name not in _TREE or traceback is None:
        return ""
    for code in traceback.raw_frames()[0]:  # from the innermost out; 5 us, against 50 us for a look at every line
        if "/jax/_src/" not in code.co_filename or code.co_name == "combine":  # combine calls the operator
            return ""
        if code.co_name == "associative_scan":
            return "associative_scan"
    return ""


def evaluate(closed: core.ClosedJaxpr, *arguments: Any) -> list[Any]:
    """Runs a jaxpr's equations, inside a trace or not."""
    return core.jaxpr_as_fun(closed)(*arguments)


def check_single_assignment(closed: core.ClosedJaxpr) -> None:
    """Every value is defined exactly once, and before its use."""
    jaxpr = closed.jaxpr
    defined = set(jaxpr.invars) | set(jaxpr.constvars)
    for number, equation in enumerate(jaxpr.eqns):
        for atom in equation.invars:
            if not isinstance(atom, core.Literal) and atom not in defined:
                raise TraceError(f"equation {number} ({equation.primitive.name}) uses a value before it is defined")
        for out in equation.outvars:
            if out in defined:
                raise TraceError(f"equation {number} ({equation.primitive.name}) defines a value a second time")
            if type(out).__name__ != "DropVar":
                defined.add(out)
    for out in jaxpr.outvars:
        if not isinstance(out, core.Literal) and out not in defined:
            raise TraceError("the program returns a value that no equation defines")


def pretty(closed: core.ClosedJaxpr, axis_name: Callable[[int], str | int], width: int) -> str:
    """One line an equation: result: dtype[named dims] = primitive(operands)."""
    names: dict[Any, str] = {}

    def name(atom: Any) -> str:
        if isinstance(atom, core.Literal):
            return str(atom.val) if np.ndim(atom.val) == 0 else f"const{np.shape(atom.val)}"
        return names.setdefault(atom, f"v{len(names)}")

    def typed(var: Any) -> str:
        dims = " ".join(str(axis_name(d)) for d in var.aval.shape)
        return f"{name(var)}: {var.aval.dtype}[{dims}]"

    lines = []
    for equation in closed.jaxpr.eqns:
        label = str(equation.params.get("name", "")) if called(equation) else ""
        text = f"{', '.join(map(typed, equation.outvars))} = {equation.primitive.name}"
        text += (f"<{label}>" if label else "") + f"({', '.join(map(name, equation.invars))})"
        where = source_line(equation)
        room = width - len(where) - 4
        lines.append(f"{text[:room]:<{room}}  # {where}" if where else text[:width])
    lines.append(f"return {', '.join(map(name, closed.jaxpr.outvars))}")
    return "\n".join(lines)


class _Compiles:
    """Counts XLA's compiles in this process, as jax.monitoring reports them; a hit in JAX's own cache is none."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._duration)
        jax.monitoring.register_event_listener(self._event)

    def _duration(self, event: str, duration_secs: float, **keywords: Any) -> None:
        del duration_secs, keywords
        self.count += event == "/jax/core/compile/backend_compile_duration"

    def _event(self, event: str, **keywords: Any) -> None:
        del keywords
        self.count -= event == "/jax/compilation_cache/cache_hits"


_COMPILES = _Compiles()


def compiles() -> int:
    """XLA compiles in this process so far."""
    return _COMPILES.count


def compile_lowered(lowered: Any, device: Any, *, runs_seldom: bool) -> Any:
    """Compiles; for a CPU and a program that runs seldom, without YNNPACK.

    XLA:CPU gives products to YNNPACK, which builds a pipeline for each when it is first run: 1.0 s for the 270 products
    of a 30-layer model, against 60 ms saved in each later run on 16 rows (JAX 0.10.2; 95 against 155 ms).
    """
    # These programs are kept in our own cache. XLA:CPU serialises an executable that came out of JAX's cache without
    # its code, so what JAX's cache holds could never move into ours.
    with _config.persistent_cache_min_compile_time_secs(1e9):
        if not runs_seldom or device.platform != "cpu":
            return lowered.compile()
        try:
            return lowered.compile(compiler_options={"xla_cpu_experimental_ynn_fusion_type": ""})
        except (jax.errors.JaxRuntimeError, ValueError):  # an XLA that doesn't know the option
            return lowered.compile()


class Scan(NamedTuple):
    """What a scan equation does: its operands are `consts` constants, `carry` initial carries, then stacked arrays."""

    consts: int
    carry: int
    length: int
    reverse: bool
    body: core.ClosedJaxpr  # (consts, carry, elements) -> (carry, results)


def scan_parts(params: dict[str, Any]) -> Scan:
    """Reads a scan equation's parameters, which changed their names between JAX 0.10 and 0.12."""
    return Scan(*scan_counts(params), params["length"], params["reverse"], params["jaxpr"])


def machine_code(compiled: Any) -> bytes:
    """XLA's own serialisation of a compiled function.

    `jax.experimental.serialize_executable` pickles this and what JAX knows beside it; here what JAX knows is made anew
    by `load_machine_code`, so that nothing is ever unpickled.

    Raises:
        ValueError: the backend or this program can't be serialised.
    """
    unloaded = getattr(compiled._executable, "_unloaded_executable", None)
    if unloaded is None or compiled._params.const_args or unloaded.mut is not None or unloaded.host_callbacks:
        raise ValueError("this program can't be serialised: it calls back into Python or closes over references")
    try:
        return unloaded.backend.serialize_executable(unloaded.xla_executable)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise ValueError(f"this program can't be serialised: {error}") from error


def load_machine_code(
    code: bytes, inputs: Sequence[jax.ShapeDtypeStruct], outputs: Sequence[jax.ShapeDtypeStruct], device: Any
) -> Any:
    """The compiled flat function of flat arrays, on any device of the kind that `machine_code` came from.

    Raises:
        ValueError: the code, or this version of JAX, is another than it was made by.
    """
    # The code itself is assigned to the device that it was compiled for.
    options = _xla.CompileOptions()
    options.device_assignment = _xla.DeviceAssignment.create(np.array([[device.id]]))
    devices = _xla.DeviceList((device,))
    sharding = jax.sharding.SingleDeviceSharding(device)
    avals_in, avals_out = ([_ShapedArray(a.shape, a.dtype) for a in side] for side in (inputs, outputs))
    try:
        loaded = device.client.deserialize_executable(code, executable_devices=devices, compile_options=options)
        unloaded = _pxla.UnloadedMeshExecutable(
            xla_executable=loaded,
            device_list=devices,
            backend=device.client,
            input_avals=avals_in,
            input_shardings=[sharding] * len(avals_in),
            output_avals=avals_out,
            output_shardings=[sharding] * len(avals_out),
            committed=True,
            name="jaxinfer",
            unordered_effects=[],
            ordered_effects=[],
            keepalive=[],
            host_callbacks=[],
            kept_var_idx=set(range(len(avals_in))),
            mut=None,
            xla_in_layouts=[None] * len(avals_in),
            dispatch_in_layouts=[None] * len(avals_in),
            xla_out_layouts=[None] * len(avals_out),
            all_args_info=None,
            pgle_profiler=None,
        )
        in_tree = jax.tree.structure((tuple(avals_in), {}))
        info = in_tree.unflatten([jax.stages.ArgInfo(aval, False) for aval in avals_in])
        out_tree = jax.tree.structure(tuple(avals_out))
        return jax.stages.Compiled(unloaded.load(), [], info, out_tree, no_kwargs=True)
    except (jax.errors.JaxRuntimeError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"compiled code doesn't load: {error}") from error
