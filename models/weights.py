"""From a checkpoint's tensors to a module's state, by a table. Every target is filled exactly once and every stored
tensor is used or ignored by name, or loading fails and names the key."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxinfer.checkpoints.base import Checkpoint, TensorInfo, converted
from jaxinfer.errors import CheckpointError

KeyPath = tuple[Any, ...]  # keys of a nested dict; ints are indices of a list of layers


@dataclass(frozen=True)
class Weight:
    """One row of a weight table. `{i}` stands for an index, the same on both sides."""

    target: str  # dotted path in the module's state, e.g. "model.layers.{i}.self_attn.q_proj.weight"
    hf: str | None  # name in a Hugging Face checkpoint; None: never stored there
    gguf: str | None = None  # name in a GGUF file
    from_gguf: Callable[[np.ndarray, Any], np.ndarray] | None = None  # (stored, config) -> as the module wants it
    tied_to: str | None = None  # a module without `target` uses this one: what is stored must repeat its values

    def name(self, naming: str) -> str | None:
        """The column for a checkpoint's naming, "hf" or "gguf"."""
        return {"hf": self.hf, "gguf": self.gguf}[naming]


def same_names(*names: str) -> list[Weight]:
    """Rows of tensors that Hugging Face checkpoints store under the name of their target."""
    return [Weight(name, name) for name in names]


def unpermute_rope(array: np.ndarray, n_heads: int) -> np.ndarray:
    """Undoes llama.cpp's reordering of q and k, which pairs rotated features as (0, 1), (2, 3), ... within a head;
    Hugging Face's rotation pairs feature j with j + head_dim / 2.

    Args:
        array: [n_heads * head_dim, in] or [n_heads * head_dim], stored order.
    Returns: same shape and dtype, Hugging Face's order.
    """
    rows = array.shape[0]
    if rows % (2 * n_heads):
        raise CheckpointError(f"{rows} rows of q or k can't be split into pairs for {n_heads} heads.")
    paired = array.reshape(n_heads, rows // n_heads // 2, 2, *array.shape[1:])
    return paired.swapaxes(1, 2).reshape(array.shape)


def load_params(
    abstract: Mapping[Any, Any],
    checkpoint: Checkpoint,
    table: Sequence[Weight],
    config: Any,
    dtype: Any,
    *,
    ignore: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
    check: bool = False,
) -> dict[Any, Any]:
    """The parameters of a module, read from `checkpoint` one tensor at a time: at its peak, memory holds the model and
    one tensor.

    Args:
        abstract: nested dict of jax.ShapeDtypeStruct, as nnx.to_pure_dict(nnx.state(module)) gives; only shapes count.
        table: which stored name fills which target.
        dtype: floating dtype of every parameter.
        ignore: regexes of stored names (matched whole) that hold nothing to load.
        progress: called with (bytes done, bytes in all), counted as stored.
        check: NaN or infinity in a tensor is an error.
    Returns: a nested dict of jax.Array like `abstract`, on JAX's default device; nothing aliases the file.

    Raises:
        CheckpointError: a target that is filled twice or not at all, a stored tensor that fits no row and no `ignore`,
            a wrong shape, integers for weights, or (with `check`) a value that is not finite.
    """
    dtype = np.dtype(dtype)
    targets = {_dotted(path): (path, leaf.shape) for path, leaf in _leaves(abstract)}
    sources, tied = _match(targets, checkpoint, table, ignore)
    for target, (info, row) in sources.items():
        _check_info(info, target, targets[target][1], transformed=_transform(row, checkpoint) is not None)
    # In the order of the file: reads are sequential.
    order = sorted(sources.items(), key=lambda item: (str(item[1][0].file), item[1][0].offset))
    total, done = sum(info.nbytes for info, _ in sources.values()), 0
    params: dict[Any, Any] = {}
    for target, (info, row) in order:
        path, shape = targets[target]
        _set(params, path, _load_one(checkpoint, info, row, config, dtype, shape, check=check))
        done += info.nbytes
        if progress is not None:
            progress(done, total)
    for info, target in tied:
        _check_tied(checkpoint, info, sources[target][0], dtype)
    return params


def _match(
    targets: Mapping[str, tuple[KeyPath, tuple[int, ...]]],
    checkpoint: Checkpoint,
    table: Sequence[Weight],
    ignore: Sequence[str],
) -> tuple[dict[str, tuple[TensorInfo, Weight]], list[tuple[TensorInfo, str]]]:
    """(target -> its tensor and row, tensors that repeat a target), every stored tensor and target accounted for."""
    ignored = [re.compile(pattern) for pattern in ignore]
    rows = [(_regex(name), row) for row in table if (name := row.name(checkpoint.naming)) is not None]
    sources: dict[str, tuple[TensorInfo, Weight]] = {}
    tied: list[tuple[TensorInfo, str]] = []
    unused: list[str] = []
    for name, info in checkpoint.tensors.items():
        if any(pattern.fullmatch(name) for pattern in ignored):
            continue
        found = [(row, match.groupdict()) for pattern, row in rows if (match := pattern.fullmatch(name))]
        if len(found) > 1:
            raise CheckpointError(
                f"tensor {name!r} matches {len(found)} rows of the weight table: {[r for r, _ in found]}."
            )
        if not found:
            unused.append(name)
            continue
        row, indices = found[0]
        target = row.target.format(**indices)
        if target in sources:
            raise CheckpointError(f"{target!r} is filled twice: by {sources[target][0].name!r} and by {name!r}.")
        if target in targets:
            sources[target] = info, row
        elif row.tied_to is not None and row.tied_to in targets:
            tied.append((info, row.tied_to))
        else:
            unused.append(name)
    _check_complete(checkpoint, targets.keys() - sources.keys(), unused)
    return sources, tied


def _check_complete(checkpoint: Checkpoint, missing: set[str], unused: list[str]) -> None:
    if not missing and not unused:
        return
    parts = []
    if missing:
        parts.append(f"{len(missing)} weight(s) of the model are missing: {_some(sorted(missing))}")
    if unused:
        parts.append(f"{len(unused)} stored tensor(s) have no place in the model: {_some(sorted(unused))}")
    raise CheckpointError(
        f"{checkpoint.path}: {'; '.join(parts)}. Do the files belong together, and does the config describe them?"
    )


def _check_info(info: TensorInfo, target: str, shape: tuple[int, ...], *, transformed: bool) -> None:
    same = np.prod(info.shape) == np.prod(shape) if transformed else info.shape == shape
    if not same:
        raise CheckpointError(f"tensor {info.name!r} has shape {info.shape}; the config asks {target!r} to be {shape}.")
    if info.dtype == "BOOL" or re.fullmatch(r"[IU]\d+", info.dtype):
        raise CheckpointError(
            f"tensor {info.name!r} is stored as {info.dtype}, which is no weight's dtype: quantised how?"
        )


def _transform(row: Weight, checkpoint: Checkpoint) -> Callable[[np.ndarray, Any], np.ndarray] | None:
    return row.from_gguf if checkpoint.naming == "gguf" else None


def _load_one(
    checkpoint: Checkpoint,
    info: TensorInfo,
    row: Weight,
    config: Any,
    dtype: np.dtype,
    shape: tuple[int, ...],
    *,
    check: bool,
) -> jax.Array:
    host = checkpoint.read(info.name, dtype)
    transform = _transform(row, checkpoint)
    if transform is not None:
        host = transform(host, config)
    if host.shape != shape or host.dtype != dtype:
        raise CheckpointError(f"tensor {info.name!r} came out as {host.dtype}{host.shape}, not as {dtype}{shape}.")
    # float16 is the one target whose range is below float32's and bfloat16's: a value that overflows must not pass.
    if (check or dtype == np.float16) and not _all_finite(host):
        raise CheckpointError(f"tensor {info.name!r} holds NaN or infinity in {dtype}; the checkpoint is damaged.")
    # device_put on CPU takes aligned memory over without a copy (even with may_alias=False): right for what was made
    # here, wrong for a mapped file, which can still change.
    if not host.flags.writeable:
        host = converted(host, dtype)
    array = jax.block_until_ready(jax.device_put(host))  # blocking keeps one tensor in flight, not the whole model
    del host
    checkpoint.release(info.name)
    return array


def _all_finite(host: np.ndarray) -> bool:
    """Without a temporary as large as the tensor."""
    flat = host.reshape(-1)
    return all(bool(np.isfinite(flat[start : start + (1 << 20)]).all()) for start in range(0, flat.size, 1 << 20))


def _check_tied(checkpoint: Checkpoint, info: TensorInfo, source: TensorInfo, dtype: np.dtype) -> None:
    if not np.array_equal(checkpoint.read(info.name, dtype), checkpoint.read(source.name, dtype)):
        raise CheckpointError(
            f"the config ties {info.name!r} to {source.name!r}, yet their values differ; "
            "set tie_word_embeddings to false."
        )


def _regex(pattern: str) -> re.Pattern[str]:
    """`{i}` -> an index. One spelled with leading zeros matches, and then fits no target."""
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[0-9]+)", re.escape(pattern)))


def _leaves(tree: Mapping[Any, Any], path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _dotted(path: KeyPath) -> str:
    return ".".join(str(key) for key in path)


def _set(tree: dict[Any, Any], path: KeyPath, value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _some(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(repr(name) for name in names[:limit]) + (", ..." if len(names) > limit else "")
