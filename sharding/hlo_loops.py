"""How often an HLO while loop runs."""

import math
import re

from jaxinfer.sharding.hlo_text import Computation, Instruction, Module

__all__ = ["trip_count"]

_KNOWN = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"?(\d+)')
_SAME = ("copy", "bitcast", "convert", "reshape")

# What a scalar is: ("is", constant), ("state", index, offset) for an element of the loop's state plus a constant,
# ("compare", direction, left, right); None: unknown.
Value = tuple | None


def trip_count(loop: Instruction, caller: Computation, module: Module) -> int | None:
    """Of a while: XLA's known_trip_count or, where it kept none, from the condition's comparison of a counter with a
    constant, the counter's start and its step; None where that doesn't tell it."""
    if known := _KNOWN.search(loop.attributes):
        return int(known[1])
    names = loop.called("condition") + loop.called("body")
    if len(names) != 2 or not all(name in module.computations for name in names):
        return None
    condition, body = (module.computations[name] for name in names)
    if condition.root is None or body.root is None or body.root.opcode != "tuple":
        return None
    test = _value(condition.root.name, condition, module, None)
    if test is None or test[0] != "compare":
        return None
    _, direction, left, right = test
    if left[0] == "is":
        direction, left, right = _flipped(direction), right, left
    if left[0] != "state":
        return None
    index, offset = left[1:]
    step = _value(body.root.operands[index], body, module, None)
    start = _start(loop, caller, module, index)
    bound = right[1] if right[0] == "is" else _invariant(right, loop, caller, body, module)
    if step is None or step[:2] != ("state", index) or start is None or bound is None:
        return None
    return _runs(start + offset, bound, step[2], direction)


def _runs(start: int, bound: int, step: int, direction: str) -> int | None:
    """Times that `start`, growing by `step`, still compares true with `bound`."""
    distance = bound - start
    if direction in ("GT", "GE") or (direction == "NE" and step < 0):
        distance, step, direction = -distance, -step, {"GT": "LT", "GE": "LE"}.get(direction, direction)
    if direction not in ("LT", "LE", "NE"):
        return None
    if (distance < 0 and direction != "NE") or (distance == 0 and direction != "LE"):
        return 0
    if step <= 0 or (direction == "NE" and (distance < 0 or distance % step)):
        return None  # it doesn't end
    return math.ceil((distance + (direction == "LE")) / step)


def _flipped(direction: str) -> str:
    return {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE"}.get(direction, direction)


def _start(loop: Instruction, caller: Computation, module: Module, index: int) -> int | None:
    """An element of the state before the loop, if it is a constant."""
    state = caller.by_name.get(loop.operands[0])
    if state is None or state.opcode != "tuple" or index >= len(state.operands):
        return None
    value = _value(state.operands[index], caller, module, None)
    return value[1] if value and value[0] == "is" else None


def _invariant(value: tuple, loop: Instruction, caller: Computation, body: Computation, module: Module) -> int | None:
    """A bound that travels in the loop's state and is never changed."""
    if value[0] != "state" or body.root is None:
        return None
    kept = _value(body.root.operands[value[1]], body, module, None)
    start = _start(loop, caller, module, value[1])
    return start + value[2] if kept == ("state", value[1], 0) and start is not None else None


def _value(name: str, computation: Computation, module: Module, arguments: list[Value] | None) -> Value:
    """What a scalar is; `arguments` are those of a fused or called computation."""
    found = computation.by_name.get(name)
    if found is None:
        return None
    if found.opcode == "constant":
        number = found.text.strip().strip("{}")
        return ("is", int(number)) if re.fullmatch(r"-?\d+", number) else None
    if found.opcode == "parameter":
        place = int(found.text)
        return arguments[place] if arguments is not None and place < len(arguments) else None
    if found.opcode == "get-tuple-element":
        source = computation.by_name.get(found.operands[0])
        index = found.attribute("index")
        if source is None or source.opcode != "parameter" or arguments is not None or index is None:
            return None
        return ("state", int(index), 0)
    inputs = [_value(operand, computation, module, arguments) for operand in found.operands]
    if any(value is None for value in inputs):
        return None
    if found.opcode in _SAME:
        return inputs[0]
    if found.opcode in ("fusion", "call"):
        for called in found.called("calls") + found.called("to_apply"):
            inner = module.computations.get(called)
            if inner is not None and inner.root is not None:
                return _value(inner.root.name, inner, module, inputs)
        return None
    if found.opcode == "compare":
        return ("compare", found.attribute("direction"), *inputs)
    return _sum(found.opcode, inputs)


def _sum(opcode: str, inputs: list[Value]) -> Value:
    if opcode not in ("add", "subtract") or len(inputs) != 2:
        return None
    left, right = inputs
    if opcode == "add" and left and left[0] == "is":
        left, right = right, left
    if not left or not right or right[0] != "is" or left[0] not in ("is", "state"):
        return None
    change = right[1] if opcode == "add" else -right[1]
    return ("is", left[1] + change) if left[0] == "is" else ("state", left[1], left[2] + change)
