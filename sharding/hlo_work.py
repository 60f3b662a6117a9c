"""Arithmetic and memory traffic of one HLO instruction, worked out from its shapes."""

import math
import re

import numpy as np

from jaxinfer.sharding.hlo_text import Computation, Instruction, Leaf, Module

__all__ = ["flops_of", "traffic_of"]

# Instructions that move nothing: names for buffers, or work that is counted where it is done.
# fmt: off
_FREE = frozenset((
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id",
    "while", "conditional", "call", "async-start", "async-update", "async-done", "call-start", "call-done",
    "call-update", "opt-barrier", "domain", "add-dependency", "send", "send-done", "recv", "recv-done",
    "rng-get-and-update-state", "copy-done", "slice-done", "dynamic-slice-done",
))
# fmt: on
_FREE_CALLS = ("ConcatBitcast", "AllocateBuffer", "Async", "PrepareAsync", "Sharding", "SPMD", "annotate_device")
_SLICES = frozenset(("dynamic-slice", "slice", "gather"))
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # opcode -> which operand holds what is written
_GEMMS = ("__cublas$", "__onednn$matmul", "__triton_gemm")


def flops_of(instruction: Instruction, computation: Computation) -> tuple[float, str]:
    """(floating-point operations, operands' dtype) of a product or convolution, (0, "") of anything else.

    A multiplication and an addition count 2. Products that the backend hands to a library (cuBLAS, cuDNN, oneDNN) count
    as well; those inside other custom calls can't be seen.
    """
    sizes = computation.sizes(instruction)
    if len(sizes) < 2 or not sizes[0] or not sizes[1] or not instruction.shape:
        return 0.0, ""
    left, right, out = sizes[0][0], sizes[1][0], instruction.shape[0]
    if instruction.opcode == "dot":
        dims = _numbers(instruction.attribute("lhs_contracting_dims"))
        return 2.0 * out.elements * math.prod(left.dims[d] for d in dims), left.dtype
    if instruction.opcode == "convolution":
        return _convolution(instruction, left, right, out), left.dtype
    if instruction.opcode == "custom-call":
        target = instruction.attribute("custom_call_target") or ""
        if "conv" in target and instruction.attribute("dim_labels"):
            return _convolution(instruction, left, right, out), left.dtype
        if any(gemm in target for gemm in _GEMMS):
            found = re.search(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]', instruction.attributes)
            dims = _numbers(found[1]) if found else [len(left.dims) - 1]
            return 2.0 * out.elements * math.prod(left.dims[d] for d in dims), left.dtype
    return 0.0, ""


def traffic_of(instruction: Instruction, computation: Computation, module: Module) -> float:
    """Bytes that an instruction outside of fusions reads from and writes to the device's main memory.

    A fusion reads its operands, or the slices that it takes of them, and writes its result; where it updates a slice of
    an operand in place, the update is read and written and the rest isn't touched. Collectives count 0: what they move
    is told by their own bytes.
    """
    opcode = instruction.opcode
    if opcode in _FREE:
        return 0.0
    sizes = computation.sizes(instruction)
    if opcode == "custom-call":
        target = (instruction.attribute("custom_call_target") or "").strip('"')
        if target.startswith(_FREE_CALLS):
            return 0.0
    if opcode.endswith("-start"):
        return _moved(instruction, sizes, module)
    if opcode == "fusion" and (inner := module.computations.get(next(iter(instruction.called("calls")), ""))):
        read = sum(_read(inner, i, leaves, module) for i, leaves in enumerate(sizes))
        return read + _written(inner, inner.root, instruction.shape, module)
    if opcode in _SLICES:
        indices = sum(_total(leaves, module) for leaves in sizes[1:])
        return 2 * _total(instruction.shape, module) + indices
    if opcode in _UPDATES:
        update = _UPDATES[opcode]
        return _total(sizes[update], module) * 2 + sum(
            _total(s, module) for i, s in enumerate(sizes) if 0 < i != update
        )
    if opcode == "iota":
        return _total(instruction.shape, module)
    return sum(_total(leaves, module) for leaves in sizes) + _total(instruction.shape, module)


def _total(leaves: tuple[Leaf, ...], module: Module) -> float:
    return sum(module.memory(leaf) for leaf in leaves)


def _moved(instruction: Instruction, sizes: list[tuple[Leaf, ...]], module: Module) -> float:
    """Of an asynchronous copy or slice, (destination, source, context) in this order or with the first two swapped."""
    if not sizes or not sizes[0]:
        return 0.0
    source, ends = sizes[0][0], instruction.shape[:2]
    target = next((end for end in ends if end != source), source)
    piece = Leaf(target.dtype, target.dims, source.space)
    return module.memory(piece) + module.memory(target)


def _read(inner: Computation, place: int, given: tuple[Leaf, ...], module: Module) -> float:
    """Bytes that a fused computation reads of an operand."""
    whole = _total(given, module)
    parameter = inner.parameters.get(place)
    if parameter is None or not whole:
        return 0.0
    return min(whole, _used(inner, parameter.name, whole, module))


def _used(inner: Computation, name: str, whole: float, module: Module) -> float:
    total = 0.0
    for user, position in inner.users.get(name, ()):
        if user.opcode == "bitcast":
            total += _used(inner, user.name, whole, module)
        elif user.opcode in _SLICES and position == 0:
            total += sum(leaf.bytes for leaf in user.shape)
        elif user.opcode in _UPDATES and position == 0:
            total += _used(inner, user.name, whole, module)  # in place: only who reads what came of it reads the rest
        elif user is inner.root and user.opcode == "tuple":
            continue  # handed on as it is
        elif user.opcode == "fusion" and (nested := module.computations.get(next(iter(user.called("calls")), ""))):
            parameter = nested.parameters.get(position)
            total += _used(nested, parameter.name, whole, module) if parameter else 0.0
            if parameter is not None and _unwrapped(nested, nested.root) is parameter:  # TPUs wrap bitcasts in fusions
                total += _used(inner, user.name, whole, module)
        else:
            return whole
    return total


def _written(inner: Computation, root: Instruction | None, result: tuple[Leaf, ...], module: Module) -> float:
    """Bytes that a fused computation writes."""
    whole = _total(result, module)
    root = _unwrapped(inner, root)
    if root is None or not whole:
        return whole
    if root.opcode == "tuple" and len(root.operands) == len(result):
        parts = zip(root.operands, result, strict=True)
        return sum(_written(inner, inner.by_name.get(operand), (leaf,), module) for operand, leaf in parts)
    if root.opcode == "fusion" and (nested := module.computations.get(next(iter(root.called("calls")), ""))):
        return _written(nested, nested.root, result, module)
    if root.opcode in _UPDATES:
        return min(whole, sum(leaf.bytes for leaf in inner.leaves(root.operands[_UPDATES[root.opcode]])))
    return whole


def _unwrapped(inner: Computation, root: Instruction | None) -> Instruction | None:
    while root is not None and root.opcode == "bitcast":
        root = inner.by_name.get(root.operands[0])
    return root


def _numbers(text: str | None) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text or "")]


def _convolution(instruction: Instruction, left: Leaf, kernel: Leaf, out: Leaf) -> float:
    """Twice the products of elements that both lie inside: padding and the holes of dilation don't count, since XLA
    writes products with batch dims as dilated convolutions on TPU."""
    labels = instruction.attribute("dim_labels") or ""
    match = re.match(r"([^_]+)_([^-]+)->(.+)", labels)
    if match is None:
        return 0.0
    image, filters, result = match[1], match[2], match[3]
    total = 2.0 * out.dims[result.index("b")] * out.dims[result.index("f")] * kernel.dims[filters.index("i")]
    window = instruction.attribute("window") or ""
    spatial = sorted(c for c in filters if c.isdigit())
    for place, label in enumerate(spatial):
        n_in, n_out = left.dims[image.index(label)], out.dims[result.index(label)]
        taps = kernel.dims[filters.index(label)]
        total *= _valid(n_in, taps, n_out, {key: _window(window, key, place) for key in _WINDOW})
    return total


_WINDOW = {"stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1}


def _window(window: str, key: str, place: int) -> int:
    """One of a window's numbers: window={size=3x3 pad=1_1x1_1 stride=2x2}; of pads, the low one."""
    found = re.search(rf"(?:^|[\s{{]){key}=([-\dx_]+)", window)
    return int(found[1].split("x")[place].split("_")[0]) if found else _WINDOW[key]


def _valid(n_in: int, taps: int, n_out: int, window: dict[str, int]) -> float:
    """Pairs (place in the result, tap of the kernel) that meet an element of the input."""
    if n_out * taps > 1 << 24:
        return float(n_out) * min(taps, n_in)
    places = np.arange(n_out)[:, None] * window["stride"] + np.arange(taps) * window["rhs_dilate"] - window["pad"]
    inside = (places >= 0) & (places <= (n_in - 1) * window["lhs_dilate"]) & (places % window["lhs_dilate"] == 0)
    return float(np.count_nonzero(inside))
