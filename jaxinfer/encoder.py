"""Encoder: texts to vectors, by a bidirectional model, pooled and normalised on the device."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxinfer.buckets import bucket_for, ladder
from jaxinfer.checkpoints.sentence import SentenceConfig, read_sentence_config
from jaxinfer.compiling import compile
from jaxinfer.errors import RequestError
from jaxinfer.executable import Executable
from jaxinfer.program import Program
from jaxinfer.specs import spec
from jaxinfer.tracing import nnx_function

if TYPE_CHECKING:
    from jaxinfer.text.tokenizer import Tokenizer

# Compiled when first met. Lengths double from 16, so that at most half of a row is padding.
BATCHES = (1, 8, 32)
FIRST_LENGTH = 16


class SentenceEmbedder(nnx.Module):
    """tokens: Int[Array, "batch length"], mask: Int[Array, "batch length"] -> Float32[Array, "batch d"]

    An encoder with the pooling of sentence-transformers (Reimers & Gurevych 2019, arXiv:1908.10084) behind it.
    """

    def __init__(self, encoder: nnx.Module, pooling: str, normalize: bool):
        self.encoder, self.pooling, self.normalize = encoder, pooling, normalize

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        hidden = self.encoder(tokens, mask).astype(jnp.float32)  # pyright: ignore[reportCallIssue]
        pooled = pool(hidden, mask, self.pooling)
        if not self.normalize:
            return pooled
        norm = jnp.sqrt(jnp.sum(jnp.square(pooled), axis=-1, keepdims=True))
        return pooled / jnp.maximum(norm, 1e-12)


def pool(hidden: jax.Array, mask: jax.Array, mode: str) -> jax.Array:
    """hidden: Float[Array, "batch length d"], mask: Int[Array, "batch length"] -> Float[Array, "batch d"]

    "mean" and "max" are over the tokens whose mask is not 0; "cls" takes the first column.
    """
    if mode == "cls":
        return hidden[:, 0]
    real = (mask != 0)[:, :, None]
    if mode == "max":
        return jnp.max(jnp.where(real, hidden, jnp.finfo(hidden.dtype).min), axis=1)
    count = jnp.sum(real, axis=1, dtype=hidden.dtype)
    return jnp.sum(jnp.where(real, hidden, 0), axis=1) / jnp.maximum(count, 1)


class Encoder:
    """A sentence encoder: `embed` for texts, a call for token batches. Made by `ji.load`.

    Attributes:
        config: the model's Config.
        tokenizer: the checkpoint's, or None.
        sentence: pooling, normalisation and length limit.
        max_length: most tokens a row can have, special tokens included.
        program: the traced forward, Int32 tokens and mask [batch, length] -> Float32 [batch, d].
    """

    def __init__(
        self,
        module: nnx.Module,
        config: Any,
        tokenizer: "Tokenizer | None" = None,
        sentence: SentenceConfig | None = None,
        max_len: int | None = None,
    ):
        """module: (tokens, mask) -> hidden, with its parameters. config: has vocab_size, hidden_size and
        max_position_embeddings.

        Raises:
            RequestError: `max_len` is below 1 or over the model's positions.
        """
        self.config, self.tokenizer = config, tokenizer
        self.sentence = sentence or SentenceConfig()
        limit = config.max_position_embeddings
        if max_len is not None and not 1 <= max_len <= limit:
            raise RequestError(f"max_len must be from 1 to the {limit} positions of this checkpoint, got {max_len}.")
        self.max_length = min(max_len or limit, self.sentence.max_length or limit, limit)
        self._module = module
        self._programs: dict[bool, Program] = {}
        self._executables: dict[tuple[bool, tuple[int, ...]], Executable] = {}
        self.program = self._program(self.sentence.normalize)

    @classmethod
    def from_module(
        cls,
        module: nnx.Module,
        params: Mapping[Any, Any],
        config: Any,
        tokenizer: "Tokenizer | None",
        path: Path,
        max_len: int | None = None,
    ) -> "Encoder":
        """An Encoder of an abstract module and its parameters, pooled as the checkpoint at `path` says.

        Raises:
            CheckpointError: a pooling that is not supported, or a damaged file.
        """
        graph, state = nnx.split(module)
        nnx.replace_by_pure_dict(state, dict(params))
        sentence = read_sentence_config(path) if path.is_dir() else SentenceConfig()
        return cls(nnx.merge(graph, state), config, tokenizer, sentence, max_len)

    def embed(
        self, texts: Sequence[str], batch_size: int = 32, normalize: bool | None = None, progress: bool = False
    ) -> np.ndarray:
        """A vector for each text.

        Texts of more than `max_length` tokens lose their last ones if the checkpoint states a max_seq_length, as in
        sentence-transformers, and are refused if it doesn't.

        Args:
            batch_size: most texts in one call; texts of similar length go together.
            normalize: to unit length; None does as the checkpoint says.
            progress: draw a bar on stderr.
        Returns: float32 [len(texts), d], in the order of `texts`.

        Raises:
            RequestError: no tokenizer, not a sequence of str, a text that is too long or has no tokens.
        """
        rows = self._tokenize(texts)
        if batch_size < 1:
            raise RequestError(f"batch_size must be at least 1, got {batch_size}.")
        executable = self._executable(self.sentence.normalize if normalize is None else normalize, batch_size)
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        vectors = np.empty((len(rows), self.config.hidden_size), np.float32)
        with _bar(len(rows), progress) as advance:
            running: tuple[list[int], jax.Array] | None = None
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                result = executable(*_batch([rows[index] for index in chosen], executable.buckets))
                if running is not None:  # one batch is made ready while another computes
                    advance(_deliver(vectors, *running))
                running = chosen, result
            if running is not None:
                advance(_deliver(vectors, *running))
        return vectors

    def __call__(self, tokens: Any, mask: Any) -> jax.Array:
        """Token ids Int[batch, length] and their mask (1 at tokens, 0 at padding) -> Float32 [batch, d].

        Raises:
            RequestError: shapes that differ, ids out of range, or more than `max_length` columns.
        """
        tokens, mask = np.asarray(tokens), np.asarray(mask)
        if tokens.shape != mask.shape or tokens.ndim != 2 or tokens.dtype.kind not in "iu" or not tokens.size:
            raise RequestError(
                "tokens and mask must be integers of one shape [batch, length], "
                f"got {tokens.dtype}{list(tokens.shape)} and {mask.dtype}{list(mask.shape)}."
            )
        self._check_length(tokens.shape[1])
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.config.vocab_size:
            raise RequestError(f"token ids must be in [0, {self.config.vocab_size}), got {low} to {high}.")
        executable = self._executable(self.sentence.normalize, tokens.shape[0])
        return executable(tokens.astype(np.int32), (mask != 0).astype(np.int32))

    def compile_report(self) -> dict[str, float]:
        """Programs compiled, and loaded from the cache on disk, since the Encoder was made, and the seconds it took."""
        reports = [executable.report for executable in self._executables.values()]
        return {name: sum(getattr(report, name) for report in reports) for name in ("compiled", "loaded", "seconds")}

    def _program(self, normalize: bool) -> Program:
        if normalize not in self._programs:
            module = SentenceEmbedder(self._module, self.sentence.pooling, normalize)
            function, params = nnx_function(module, None, {})
            inputs = spec("batch length", "int32"), spec("batch length", "int32")
            # What the forward computes is known without tracing it, so a second start can do without a trace.
            dtypes = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(params)})
            name = type(self._module).__name__
            identity = f"{name} {self.config!r} {dtypes} {self.sentence.pooling} {normalize}"
            self._programs[normalize] = Program(name, function, params, inputs, identity)
        return self._programs[normalize]

    def _executable(self, normalize: bool, batch_size: int) -> Executable:
        batches = BATCHES if batch_size <= BATCHES[-1] else (*BATCHES[:-1], *ladder(batch_size, BATCHES[-1]))
        key = normalize, batches
        if key not in self._executables:
            buckets = {"batch": batches, "length": ladder(self.max_length, min(FIRST_LENGTH, self.max_length))}
            self._executables[key] = compile(self._program(normalize), buckets=buckets, ahead=False, masked=("length",))
        return self._executables[key]

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        if self.tokenizer is None:
            raise RequestError("this checkpoint has no tokenizer; call the encoder on (tokens, mask).")
        if isinstance(texts, str):
            raise RequestError("embed takes a list of texts, got one str; write embed([text]).")
        texts = [text.lower() if self.sentence.lower_case and isinstance(text, str) else text for text in texts]
        rows = self.tokenizer.encode_batch(texts, max_length=self.max_length if self.sentence.max_length else None)
        for index, row in enumerate(rows):
            if not row:
                raise RequestError(f"text {index} has no tokens, and the tokenizer adds none; it can't be embedded.")
            if len(row) > self.max_length:
                self._check_length(len(row), f"text {index} has ")
            if max(row) >= self.config.vocab_size:
                raise RequestError(
                    f"text {index} has the token id {max(row)}, and the model {self.config.vocab_size} rows; "
                    "do tokenizer and model belong together?"
                )
        return rows

    def _check_length(self, length: int, what: str = "") -> None:
        if length > self.max_length:
            raise RequestError(
                f"{what}{length} tokens; this model takes at most {self.max_length}. Shorten or split it."
            )


def _batch(rows: Sequence[Sequence[int]], buckets: Any) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask of whole buckets, padded on the right in numpy; rows beyond the given ones are all padding."""
    batch = bucket_for(len(rows), buckets["batch"], "batch of")
    length = bucket_for(max(map(len, rows)), buckets["length"], "length of")
    tokens, mask = np.zeros((2, batch, length), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return tokens, mask


def _deliver(vectors: np.ndarray, chosen: list[int], result: jax.Array) -> int:
    vectors[chosen] = np.asarray(result)[: len(chosen)]
    return len(chosen)


@contextlib.contextmanager
def _bar(total: int, show: bool) -> Iterator[Any]:
    """A function to call with the number of texts just done."""
    if not show:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("embedding", total=total)
        yield lambda count: progress.advance(task, count)
