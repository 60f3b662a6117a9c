"""Reads XLA's text of an optimised module: computations, their instructions, shapes, operands and source lines.

Reads what JAX 0.10 to 0.12 print for CPU, TPU and GPU. Only what costs time is kept; attributes stay text.
"""

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from jaxinfer.errors import PlanError

__all__ = ["Computation", "Instruction", "Leaf", "Module", "parse"]

_INDEX = re.compile(r"/\*index=\d+\*/")
_LEAF = re.compile(r"([a-z][a-z0-9]*)\[([^\]]*)\](\{[^}]*\})?")
_BITS = re.compile(r"\d+")
_SPACE = re.compile(r"S\((\d+)\)")
_OPCODE = re.compile(r"([a-z][\w\-]*)\(")
_ASSIGNED = re.compile(r"^\s+(ROOT )?%?(\S+) = ")
_HEADER = re.compile(r"^(ENTRY )?%?([^\s(]+).*\{$")
_ROW = re.compile(r"^(\d+) (.*)$")
_HOST = 5  # XLA's memory space for buffers on the host


@dataclass(frozen=True)
class Leaf:
    """An array within a shape: its dtype as HLO spells it, dims, and the memory space of its layout (0: main)."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Without the padding of tiled layouts."""
        return self.elements * bits(self.dtype) / 8


@functools.cache
def bits(dtype: str) -> int:
    """Bits of an element: 16 for "bf16", 8 for "f8e4m3fn" and "pred", 0 for tokens and opaque values."""
    if dtype == "pred":
        return 8
    digits = _BITS.search(dtype)
    return int(digits[0]) if digits and dtype not in ("token", "opaque") else 0


@dataclass(eq=False)
class Instruction:
    """`name = shape opcode(operands), attributes`; `text` is what stands between the parentheses."""

    name: str
    opcode: str
    shape: tuple[Leaf, ...]
    operands: tuple[str, ...]
    text: str
    attributes: str

    def attribute(self, key: str) -> str | None:
        """The value of key=value up to the next comma, braces and parentheses taken whole."""
        found = re.search(rf"(?:^|[\s,]){key}=", self._head)
        return None if found is None else next(_split(self._head[found.end() :]), "").strip()

    def called(self, key: str) -> tuple[str, ...]:
        """The computations that key= names, one or {several}."""
        value = self.attribute(key)
        return () if value is None else tuple(name.strip().lstrip("%") for name in value.strip("{}").split(",") if name)

    @functools.cached_property
    def _head(self) -> str:
        # What follows may hold anything, names of attributes included.
        return self.attributes.split(", metadata={")[0].split(", backend_config=")[0]


@dataclass(eq=False)
class Computation:
    name: str
    instructions: list[Instruction] = field(default_factory=list)
    by_name: dict[str, Instruction] = field(default_factory=dict)
    root: Instruction | None = None

    def leaves(self, operand: str) -> tuple[Leaf, ...]:
        """The shape of an operand, or () where the text doesn't define it."""
        found = self.by_name.get(operand)
        return found.shape if found else ()

    def sizes(self, instruction: Instruction) -> list[tuple[Leaf, ...]]:
        return [self.leaves(operand) for operand in instruction.operands]

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.text): i for i in self.instructions if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """name -> (instruction that reads it, as which operand)."""
        found: dict[str, list[tuple[Instruction, int]]] = {}
        for instruction in self.instructions:
            for position, operand in enumerate(instruction.operands):
                found.setdefault(operand, []).append((instruction, position))
        return found


@dataclass(eq=False)
class Module:
    """Attributes: devices: partitions, or replicas where there is one partition. tiled: a TPU's, whose memory spaces
    other than the main one and the host's are on the chip."""

    computations: dict[str, Computation]
    entry: Computation
    partitions: int
    replicas: int
    tiled: bool
    frames: dict[int, str]

    @property
    def devices(self) -> int:
        return self.partitions * self.replicas

    def memory(self, leaf: Leaf) -> float:
        """Bytes of a leaf that lie in the device's main memory."""
        return 0.0 if self.tiled and leaf.space not in (0, _HOST) else leaf.bytes

    def where(self, instruction: Instruction) -> tuple[str, str]:
        """(op_name, "file.py:12 (function)") of the metadata, each "" where there is none."""
        metadata = instruction.attributes.partition("metadata={")[2]
        op = re.search(r'op_name="((?:[^"\\]|\\.)*)"', metadata)
        name = op[1].replace('\\"', '"') if op else ""
        if frame := re.search(r"stack_frame_id=(\d+)", metadata):
            return name, self.frames.get(int(frame[1]), "")
        file, line = re.search(r'source_file="([^"]*)"', metadata), re.search(r"source_line=(\d+)", metadata)
        return name, f"{file[1].rsplit('/', 1)[-1]}:{line[1]}" if file and line else ""


def parse(text: str) -> Module:
    """The module that `compiled.as_text()` prints.

    Raises:
        PlanError: the text is no HLO module or has no entry computation.
    """
    lines = _INDEX.sub("", text).splitlines()
    head = next((line for line in lines if line.startswith("HloModule")), None)
    if head is None:
        raise PlanError(f"expected the text of an HLO module, as Compiled.as_text() gives, got {text[:60]!r}")
    computations: dict[str, Computation] = {}
    entry = current = None
    for line in lines:
        if current is not None and line.startswith(" "):
            _instruction(line, current)
        elif line.startswith("}"):
            current = None
        elif (match := _HEADER.match(line.rstrip())) and not line.startswith("HloModule"):
            current = computations[match[2]] = Computation(match[2])
            entry = current if match[1] else entry
    if entry is None:
        raise PlanError("the HLO module has no ENTRY computation: is its text cut off?")
    numbers = [
        int(n[1]) if (n := re.search(rf"{key}=(\d+)", head)) else 1 for key in ("num_partitions", "replica_count")
    ]
    return Module(computations, entry, numbers[0], numbers[1], ":T(" in text, _frames(lines))


def _instruction(line: str, computation: Computation) -> None:
    match = _ASSIGNED.match(line)
    if match is None:
        return
    rest = line[match.end() :]
    end = _closing(rest) if rest.startswith("(") else rest.find(" ")
    opcode = _OPCODE.match(rest, end + 1 if not rest.startswith("(") else end + 2)
    if opcode is None:
        return
    close = _closing(rest, opcode.end() - 1)
    text = rest[opcode.end() : close]
    plain = opcode[1] in ("constant", "parameter", "iota")
    operands = () if plain else tuple(part.split()[-1].lstrip("%") for part in _split(text) if part.strip())
    leaves = tuple(_leaf(found) for found in _LEAF.finditer(rest[: end + 1]))
    found = Instruction(match[2], opcode[1], leaves, operands, text, rest[close + 1 :])
    computation.instructions.append(found)
    computation.by_name[found.name] = found
    if match[1]:
        computation.root = found


def _leaf(match: re.Match[str]) -> Leaf:
    dims = tuple(
        int(d.strip().removeprefix("<=")) for d in match[2].split(",") if d.strip().removeprefix("<=").isdigit()
    )
    space = _SPACE.search(match[3]) if match[3] else None
    return Leaf(match[1], dims, int(space[1]) if space else 0)


def _closing(text: str, start: int = 0) -> int:
    """The place of the parenthesis that closes the one at `start`; quoted ones don't count."""
    depth, quoted, place = 0, False, start
    while place < len(text):
        character = text[place]
        if quoted:
            place += character == "\\"
            quoted = character != '"'
        elif character == '"':
            quoted = True
        elif character == "(":
            depth += 1
        elif character == ")":
            depth -= 1
            if not depth:
                return place
        place += 1
    return len(text)


def _split(text: str) -> Iterator[str]:
    """The parts between commas outside of brackets and quotes; ends at a bracket that closes more than was opened."""
    depth, start, quoted = 0, 0, False
    for place, character in enumerate(text):
        if character == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif character in "({[":
            depth += 1
        elif character in ")}]":
            depth -= 1
            if depth < 0:
                yield text[start:place]
                return
        elif character == "," and not depth:
            yield text[start:place]
            start = place + 1
    yield text[start:]


def _frames(lines: list[str]) -> dict[int, str]:
    """Stack frame -> "file.py:12 (function)", from the tables that precede the computations."""
    tables: dict[str, dict[int, str]] = {"FileNames": {}, "FunctionNames": {}, "FileLocations": {}, "StackFrames": {}}
    table = None
    for line in lines:
        if line in tables:
            table = tables[line]
        elif table is not None and (row := _ROW.match(line)):
            table[int(row[1])] = row[2]
        elif line and not line[0].isdigit():
            if line.startswith(("%", "ENTRY")):
                break
            table = None

    def number(text: str, key: str) -> int:
        found = re.search(rf"{key}=(\d+)", text)
        return int(found[1]) if found else 0

    frames = {}
    for frame, text in tables["StackFrames"].items():
        location = tables["FileLocations"].get(number(text, "file_location_id"), "")
        file = tables["FileNames"].get(number(location, "file_name_id"), "").strip('"').rsplit("/", 1)[-1]
        function = tables["FunctionNames"].get(number(location, "function_name_id"), "").strip('"')
        if file:
            frames[frame] = f"{file}:{number(location, 'line')}" + (f" ({function})" if function else "")
    return frames
