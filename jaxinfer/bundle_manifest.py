"""The manifest of a bundle: what it holds and how to call it, as JSON that is checked before anything else is read.

It ends with a digest of itself and names the SHA-256 of everything beside it. File names are made from places in its
lists, never read from it.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxinfer import bundle_tree, native, specs
from jaxinfer.buckets import padded_to
from jaxinfer.checkpoints.safetensors_file import parse_json
from jaxinfer.errors import CheckpointError, TraceError

FORMAT, VERSION = "jaxinfer-bundle", 1
MAX_BYTES = 64 << 20  # 100,000 weights take some 20 MB
HOST = ("jax", "jaxlib", "platform", "device_kind", "backend", "machine")


@dataclass(frozen=True)
class Stored:
    """One compiled program: digests of its two files, whose names are its place in the manifest."""

    code: str | None  # of the machine code; None where the backend can't serialise it
    stablehlo: str


@dataclass(frozen=True)
class Manifest:
    """Everything about an Executable but its weights' values and its programs."""

    name: str
    fingerprint: str
    host: Mapping[str, str]  # what the machine code was made by and for: see HOST
    x64: bool
    params: Any  # pytree of ShapeDtypeStruct
    inputs: tuple[Any, ...]  # pytrees of Spec
    outputs: Any  # pytree of (Dims, dtype name)
    buckets: Mapping[str, Sequence[int]]
    rows: Mapping[str, tuple[bool, str]]  # for each named dim: whether rows along it are independent, and why
    masked: Sequence[str]  # the named dims that the model masks itself
    padding: Mapping[tuple[str, int], str]  # (named dim, bucket padded up to) -> why it mustn't be, or ""
    kept: Sequence[int]  # places of the params that are weights as they are
    made: Sequence[tuple[int, Sequence[int]]]  # the weights after them: (place in preludes, params that it takes)
    weights: Sequence[tuple[jax.ShapeDtypeStruct, str]]  # with the digest of each
    programs: Sequence[tuple[Mapping[str, int], Stored]]  # one a combination of buckets
    preludes: Sequence[Stored]
    explanation: str

    def to_json(self) -> bytes:
        """UTF-8 JSON with the digest.

        Raises:
            CheckpointError: params, inputs or outputs in containers that can't be restored.
        """
        body = {
            "format": FORMAT,
            "version": VERSION,
            "name": self.name,
            "fingerprint": self.fingerprint,
            "host": dict(self.host),
            "x64": self.x64,
            "params": bundle_tree.encode(self.params, lambda s: native.described([s])[0], "the parameters' tree"),
            "inputs": bundle_tree.encode(self.inputs, _spec_json, "the inputs' tree"),
            "outputs": bundle_tree.encode(self.outputs, lambda o: [o.dtype, list(o.dims)], "the outputs' tree"),
            "buckets": {name: list(sizes) for name, sizes in self.buckets.items()},
            "rows": {name: list(known) for name, known in self.rows.items()},
            "masked": sorted(self.masked),
            "padding": [[name, bucket, refusal] for (name, bucket), refusal in self.padding.items()],
            "kept": list(self.kept),
            "made": [[program, list(operands)] for program, operands in self.made],
            "weights": [[*native.described([struct])[0], digest] for struct, digest in self.weights],
            "programs": [[dict(sizes), stored.code, stored.stablehlo] for sizes, stored in self.programs],
            "preludes": [[stored.code, stored.stablehlo] for stored in self.preludes],
            "explanation": self.explanation,
        }
        return json.dumps({**body, "digest": _digest(body)}, indent=1).encode()


@dataclass(frozen=True)
class Output:
    """One array that a program returns."""

    dims: specs.Dims
    dtype: str

    def struct(self, sizes: Mapping[str, int]) -> jax.ShapeDtypeStruct:
        return native.struct([self.dtype, [sizes[d] if isinstance(d, str) else d for d in self.dims]])


def _spec_json(leaf: specs.Spec) -> list[Any]:
    canonical = jax.dtypes.canonicalize_dtype(leaf.dtype)  # int64 without x64 is int32 wherever it is loaded
    return [canonical.name, list(leaf.dims)]


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def parse(data: bytes, what: str) -> Manifest:
    """The manifest of untrusted bytes.

    Raises:
        CheckpointError: `what` is damaged, of another version, or contradicts itself.
    """
    body = parse_json(data, f"the manifest of {what}")
    if body.get("format") != FORMAT:
        raise CheckpointError(f"{what} is no bundle: its manifest has the format {body.get('format')!r:.60}.")
    if body.get("version") != VERSION:
        raise CheckpointError(
            f"{what} has format version {body.get('version')!r:.60}; this jaxinfer reads version {VERSION}. Save it "
            "again with this jaxinfer, or load it with the one that wrote it."
        )
    digest = body.pop("digest", None)
    if digest != _digest(body):
        raise CheckpointError(f"the manifest of {what} is damaged: its digest differs. Copy the bundle again.")
    try:
        found = _read(body)
        _check(found)
        return found
    except (KeyError, TypeError, ValueError, TraceError) as error:  # a CheckpointError is a ValueError
        raise CheckpointError(f"the manifest of {what} is not one that save() writes: {error}") from None


def _read(body: dict[str, Any]) -> Manifest:
    def output(entry: Any) -> Output:
        dtype, dims = entry
        return Output(specs.Dims(_dims(dims)), _text(dtype))

    def spec(entry: Any) -> specs.Spec:
        dtype, dims = entry
        return specs.spec(" ".join(map(str, _dims(dims))), native.struct([dtype, []]).dtype)

    return Manifest(
        name=_text(body["name"]),
        fingerprint=_text(body["fingerprint"]),
        host={key: _text(_object(body["host"])[key]) for key in HOST},
        x64=body["x64"] is True,
        params=bundle_tree.decode(body["params"], native.struct, "the parameters' tree"),
        inputs=_inputs(bundle_tree.decode(body["inputs"], spec, "the inputs' tree")),
        outputs=bundle_tree.decode(body["outputs"], output, "the outputs' tree"),
        buckets={name: _sizes(sizes) for name, sizes in _object(body["buckets"]).items()},
        rows={name: (known is True, _text(why)) for name, (known, why) in _object(body["rows"]).items()},
        masked=[_text(name) for name in body["masked"]],
        padding={(_text(name), _size(bucket)): _text(refusal) for name, bucket, refusal in body["padding"]},
        kept=_sizes(body["kept"]),
        made=[(_size(program), _sizes(operands)) for program, operands in body["made"]],
        weights=[(native.struct([dtype, shape]), _sha(digest)) for dtype, shape, digest in body["weights"]],
        programs=[(_bucket(sizes), _stored(*stored)) for sizes, *stored in body["programs"]],
        preludes=[_stored(*stored) for stored in body["preludes"]],
        explanation=_text(body["explanation"]),
    )


def _check(found: Manifest) -> None:
    axes, params = specs.names(found.inputs), jax.tree.leaves(found.params)
    for what, named in (("buckets", found.buckets), ("rows", found.rows)):
        _rule(set(named) == set(axes), f"{what} for {sorted(named)}, and the inputs name {sorted(axes)}")
    for name, sizes in found.buckets.items():
        _rule(bool(sizes) and list(sizes) == sorted(set(sizes)) and sizes[0] > 0, f"buckets of {name}: {sizes!s:.80}")
    padded = {(name, b) for name, sizes in found.buckets.items() for b in padded_to(sizes)}
    _rule(set(found.padding) == padded, f"padding decided for {sorted(found.padding)!s:.80}")
    _rule(set(found.masked) <= set(axes), f"masked dims {found.masked}")
    for leaf in jax.tree.leaves(found.outputs):
        _rule(all(d in axes for d in leaf.dims if isinstance(d, str)), f"an output of {leaf.dims}")
    wanted = math.prod(len(sizes) for sizes in found.buckets.values())
    _rule(len(found.programs) == wanted, f"{len(found.programs)} programs for {wanted} combinations of buckets")
    seen = {tuple(sizes.get(name) for name in axes) for sizes, _ in found.programs}
    _rule(len(seen) == wanted and all(set(sizes) == set(axes) for sizes, _ in found.programs), "a bucket twice")
    for sizes, _ in found.programs:
        _rule(all(sizes[name] in found.buckets[name] for name in axes), f"a program for {sizes}, which is no bucket")
    _rule(len(found.weights) == len(found.kept) + len(found.made), "another number of weights than its programs take")
    _rule(all(i < len(params) for i in found.kept), "a weight of no parameter")
    for (struct, _), place in zip(found.weights, found.kept, strict=False):
        _rule(struct == params[place], f"the weight of parameter {place} as {struct}, not {params[place]}")
    for program, operands in found.made:
        _rule(program < len(found.preludes) and all(i < len(params) for i in operands), "a weight made of nothing")


def _rule(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _text(value: Any) -> str:
    _rule(isinstance(value, str), f"{value!r:.60} where text belongs")
    return value


def _sizes(values: Any) -> list[int]:
    _rule(
        isinstance(values, list) and all(type(v) is int and 0 <= v < 2**31 for v in values),
        f"{values!r:.60} where sizes belong",
    )
    return values


def _size(value: Any) -> int:
    return _sizes([value])[0]


def _dims(values: Any) -> list[str | int]:
    _rule(isinstance(values, list) and len(values) <= 32, f"{values!r:.60} where dims belong")
    for value in values:
        known = value.isidentifier() if isinstance(value, str) else type(value) is int and value >= 0
        _rule(known, f"{value!r:.60} where a dim belongs")
    return values


def _sha(value: Any) -> str:
    _rule(isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None, f"{value!r:.60} for a digest")
    return value


def _object(value: Any) -> dict[str, Any]:
    _rule(isinstance(value, dict), f"{value!r:.60} where an object belongs")
    return value


def _bucket(value: Any) -> dict[str, int]:
    _sizes([*_object(value).values()])
    return value


def _inputs(value: Any) -> tuple[Any, ...]:
    _rule(isinstance(value, tuple), "inputs that are no tuple")
    return value


def _stored(code: Any, stablehlo: Any) -> Stored:
    return Stored(None if code is None else _sha(code), _sha(stablehlo))
