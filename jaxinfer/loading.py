"""`load`: a checkpoint by name or path to a model ready to run; its config picks the class."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxinfer.checkpoints import open_checkpoint
from jaxinfer.checkpoints.hub import resolve
from jaxinfer.errors import RequestError
from jaxinfer.language import LanguageModel
from jaxinfer.models import find
from jaxinfer.models.weights import load_params
from jaxinfer.program import Program
from jaxinfer.specs import spec
from jaxinfer.tracing import nnx_function


def load(
    name_or_path: str | Path,
    *,
    dtype: Any = None,
    max_len: int | None = None,
    check: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """Loads a checkpoint.

    Args:
        name_or_path: a known name ("smollm2-135m", "all-minilm-l6-v2"), a Hugging Face folder or a GGUF file.
        dtype: of weights and arithmetic; by default float32 on CPU and bfloat16 on GPU and TPU.
        max_len: the most tokens of a sequence; by default what the checkpoint was made for.
        check: refuse NaN and infinity in the weights.
        progress: called with (bytes done, bytes in all) while weights are read.

    Returns:
        A LanguageModel or an Encoder; each has .program, .config and .tokenizer.

    Raises:
        CheckpointError: missing, damaged or unsupported; says which and what is supported.
        RequestError: a dtype that is no floating type, or max_len over the checkpoint's own limit.
    """
    checkpoint = open_checkpoint(resolve(name_or_path))
    try:
        architecture = find(checkpoint.config)
        config = architecture.config(checkpoint.config)
        dtype = default_dtype() if dtype is None else _float_dtype(dtype)
        module = nnx.eval_shape(lambda: architecture.module(config, dtype=dtype, rngs=None))
        function, abstract = nnx_function(module, None, {})
        options: dict[str, Any] = {"ignore": architecture.ignore, "progress": progress, "check": check}
        params = load_params(abstract, checkpoint, architecture.weights, config, dtype, **options)
        tokenizer = checkpoint.load_tokenizer()
    finally:
        checkpoint.close()
    if architecture.kind == "Encoder":
        from jaxinfer.encoder import Encoder

        return Encoder.from_module(module, params, config, tokenizer, checkpoint.path, max_len=max_len)
    limit = config.max_position_embeddings
    if max_len is not None and max_len > limit:
        raise RequestError(f"max_len {max_len} is over the {limit} positions that this checkpoint was made for")
    # What the forward computes is known without tracing it, so a second start needs no trace.
    identity = f"{architecture.name} {config!r} {dtype}"
    program = Program(architecture.name, function, params, (spec("batch time", "int32"),), identity)
    return LanguageModel.from_program(program, max_len=max_len or limit, tokenizer=tokenizer, config=config)


def _float_dtype(dtype: Any) -> np.dtype:
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jax.numpy.issubdtype(found, np.floating):
        raise RequestError(f"dtype should be a floating type such as 'float32' or 'bfloat16', got {dtype!r}")
    return found


def default_dtype() -> np.dtype:
    """float32 on CPU, where bfloat16 is slower; bfloat16 on GPU and TPU."""
    return np.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
