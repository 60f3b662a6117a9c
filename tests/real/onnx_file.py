"""The weights of an ONNX file, read without the onnx package: of its Protocol Buffers messages six fields matter."""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_MODEL_GRAPH, _GRAPH_INITIALIZER = 7, 5  # ModelProto.graph, GraphProto.initializer
_DIMS, _TYPE, _NAME, _RAW = 1, 2, 8, 9  # of TensorProto
_FLOAT32 = 1


def initializers(path: Path) -> dict[str, np.ndarray]:
    """Every float32 initializer of the graph, by name."""
    weights = {}
    for number, graph in _fields(memoryview(path.read_bytes())):
        if number != _MODEL_GRAPH:
            continue
        for part, tensor in _fields(graph):
            if part == _GRAPH_INITIALIZER:
                name, array = _tensor(tensor)
                weights[name] = array
    return weights


def _tensor(message: memoryview) -> tuple[str, np.ndarray]:
    dims: list[int] = []
    name, raw = "", memoryview(b"")
    for number, value in _fields(message):
        if number == _DIMS:
            dims += [value] if isinstance(value, int) else _packed(value)
        elif number == _TYPE and value != _FLOAT32:
            raise ValueError(f"a float32 tensor is wanted, got ONNX type {value}")
        elif number == _NAME:
            name = bytes(value).decode()
        elif number == _RAW:
            raw = value
    return name, np.frombuffer(raw, "<f4").reshape(dims)


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of a message: an int, or the bytes of a string or an inner message."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(message, at)
        elif wire == 2:
            size, at = _varint(message, at)
            value, at = message[at : at + size], at + size
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            value, at = struct.unpack("<q" if size == 8 else "<i", message[at : at + size])[0], at + size
        else:
            raise ValueError(f"not an ONNX file: wire type {wire}")
        yield number, value


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
        if byte < 0x80:
            return value, at


def _packed(message: memoryview) -> list[int]:
    values, at = [], 0
    while at < len(message):
        value, at = _varint(message, at)
        values.append(value)
    return values
