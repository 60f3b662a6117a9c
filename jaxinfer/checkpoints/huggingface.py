"""Folders as Hugging Face publishes them: config.json, and safetensors in one file or in shards with an index."""

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from jaxinfer.checkpoints.base import Checkpoint, TensorInfo, converted
from jaxinfer.checkpoints.safetensors_file import MAX_HEADER_BYTES, SafetensorsFile, parse_json
from jaxinfer.errors import CheckpointError

if TYPE_CHECKING:
    from jaxinfer.text.tokenizer import Tokenizer

J = TypeVar("J", dict, list)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Weights in formats that are not read: pickles need a restricted unpickler, the others their libraries.
_OTHER_FORMATS = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.ckpt.index",
    "tf_model.h5",
    "flax_model.msgpack",
)


class HFCheckpoint(Checkpoint):
    """A folder with config.json and model.safetensors, or model.safetensors.index.json and the shards that it names.

    Every file must be a regular file inside the folder; symbolic links may lead to the `blobs` of the Hugging Face
    cache that the folder is a snapshot in, and nowhere else.

    Raises:
        CheckpointError: a file is missing, cut short, of an unknown format or elsewhere, or the index and its shards
            disagree.
    """

    format = "huggingface"
    naming = "hf"

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.config = read_json(self.path, "config.json")
        self._files: dict[Path, SafetensorsFile] = {}
        if exists(self.path / WEIGHTS):
            self.tensors = self._open(WEIGHTS).tensors
        elif exists(self.path / INDEX):
            self.tensors = self._open_shards()
        else:
            raise self._no_weights()

    def read(self, name: str, dtype: Any) -> np.ndarray:
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{str(self.path)!r} has no tensor {name!r}.")
        stored = self._file(info).view(info)
        dtype = np.dtype(dtype)
        if stored.dtype == dtype:
            return stored
        if stored.dtype.kind not in "biu" and dtype.kind in "biu":
            raise CheckpointError(f"tensor {name!r} is stored as {info.dtype} and can't be read as {dtype}.")
        return converted(stored, dtype)

    def load_tokenizer(self) -> "Tokenizer | None":
        if not exists(self.path / "tokenizer.json"):
            return None
        from jaxinfer.text.tokenizer import Tokenizer

        return Tokenizer.from_folder(self.path)

    def release(self, name: str) -> None:
        info = self.tensors[name]
        self._file(info).release(info)

    def close(self) -> None:
        self._files.clear()

    def _file(self, info: TensorInfo) -> SafetensorsFile:
        if info.file not in self._files:
            raise CheckpointError(f"{str(self.path)!r} is closed.")
        return self._files[info.file]

    def _open(self, name: str) -> SafetensorsFile:
        file = SafetensorsFile(resolve_inside(self.path, name))
        self._files[file.path] = file
        return file

    def _open_shards(self) -> dict[str, TensorInfo]:
        shard_of = read_json(self.path, INDEX).get("weight_map")
        if (
            not isinstance(shard_of, dict)
            or not shard_of
            or not all(isinstance(name, str) for name in shard_of.values())
        ):
            raise CheckpointError(f"{str(self.path / INDEX)!r} must have a weight_map of tensor names to files.")
        tensors: dict[str, TensorInfo] = {}
        for shard in sorted(set(shard_of.values())):
            for name, info in self._open(shard).tensors.items():
                if shard_of.get(name) != shard:
                    place = f"puts it in {shard_of[name]!r}" if name in shard_of else "doesn't list it"
                    raise CheckpointError(f"tensor {name!r} is stored in {shard!r}, but {INDEX} {place}.")
                tensors[name] = info
        lost = sorted(shard_of.keys() - tensors.keys())
        if lost:
            raise CheckpointError(f"{INDEX} lists tensor {lost[0]!r} in {shard_of[lost[0]]!r}, which doesn't hold it.")
        return tensors

    def _no_weights(self) -> CheckpointError:
        wanted = f"{str(self.path)!r} has neither {WEIGHTS} nor {INDEX}"
        for name in _OTHER_FORMATS:
            if exists(self.path / name):
                return CheckpointError(
                    f"{wanted}. It holds {name}, a format that is not yet supported: load it with the library that "
                    "wrote it and save it as safetensors (`model.save_pretrained(folder)` in transformers)."
                )
        shards = sorted(path.name for path in self.path.glob("*.safetensors"))
        found = f" It holds {', '.join(shards[:3])}: is the index missing?" if shards else ""
        return CheckpointError(f"{wanted}.{found} Is the download complete?")


def read_json(folder: Path, *names: str, kind: type[J] = dict) -> J:
    """What the JSON file `names` (subfolders, then the file) of a checkpoint folder holds: a dict, or a list.

    Raises:
        CheckpointError: the file is missing, outside the folder, too large, or not JSON of that kind.
    """
    path = resolve_inside(folder, *names)
    try:
        size = path.stat().st_size
        if size > MAX_HEADER_BYTES:
            raise CheckpointError(f"{str(path)!r} has {size} bytes; the limit for JSON is {MAX_HEADER_BYTES}.")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"can't read {str(path)!r}: {error.strerror or error}") from None
    return parse_json(data, repr(str(folder.joinpath(*names))), kind)


def resolve_inside(folder: Path, *names: str) -> Path:
    """The real path of a regular file in `folder`: subfolders, then the file.

    Raises:
        CheckpointError: a name is no plain file name, leads out of the folder, is missing, or is no regular file.
    """
    for name in names:
        if not name or name in (".", "..") or any(character in name for character in "/\\:\0"):
            raise CheckpointError(f"{str(folder)!r} names the file {name!r}; it must be a plain name in that folder.")
    shown, root = str(folder.joinpath(*names)), folder.resolve()
    homes = [root.joinpath(*names[:-1])]
    # The Hugging Face cache keeps snapshots/<revision>/<name> as links to blobs/<hash>, two folders up.
    if root.parent.name == "snapshots":
        homes.append(root.parent.parent / "blobs")
    try:
        path = root.joinpath(*names).resolve(strict=True)
        mode = path.stat().st_mode
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{shown!r} is missing or can't be read: {reason}") from None
    if path.parent not in homes:
        raise CheckpointError(f"{shown!r} is a link out of its folder, to {str(path)!r}; copy the file there.")
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{shown!r} is not a regular file.")
    return path


def exists(path: Path) -> bool:
    """Also for a dangling link, so that it is reported as what it is."""
    return os.path.lexists(path)
