"""Forward passes written as their papers' authors would write them: no cache, no thought of serving.

Each module has `make(seed) -> (forward, params)` with forward(params, *inputs), and VOCAB where inputs are numbers of
something. A module of NNX carries its parameters: params is None. They run under JAX's defaults (implicit rank
promotion and all), as most users' code does.

ZOO says of each what is true of it: tests/test_forwards.py checks that by brute force, and the tests of the proofs and
of decoding hold the compiler to it. The bytes are worked out by hand from the architecture.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

F32 = 4  # bytes


@dataclass(frozen=True)
class Forward:
    """What is true of one forward.

    `per_token` and `constant` are what a cache written by hand for this architecture keeps of a sequence, in float32:
    bytes that each token adds, and bytes that don't grow (recurrent carries, windows of a convolution or of attention).
    `per_source` is the same per token of a second, whole input (cross-attention's keys and values).
    """

    name: str
    axes: str  # of the first input
    kind: str  # "decoder" | "recurrent" | "convolution" | "seq2seq" | "encoder" | "image" | "graph"
    causal: bool = False  # no output at a time depends on inputs at later times (one sequence alone)
    independent: bool = True  # no output of a row of the batch depends on other rows
    per_token: int = 0
    constant: int = 0
    per_source: int = 0
    dtype: str = "int32"
    more: tuple[tuple[str, str], ...] = ()  # axes and dtype of the further inputs

    @property
    def inputs(self) -> tuple[tuple[str, str], ...]:
        """Axes and dtype of every input."""
        return ((self.axes, self.dtype), *self.more)


def _decoder(name: str, per_token: int, constant: int = 0, axes: str = "batch time", **more: Any) -> Forward:
    return Forward(name, axes, "decoder", causal=True, per_token=per_token, constant=constant, **more)


def _recurrent(name: str, constant: int, per_token: int = 0, axes: str = "batch time", **more: Any) -> Forward:
    return Forward(name, axes, "recurrent", causal=True, per_token=per_token, constant=constant, **more)


def _image(name: str, axes: str = "batch 16 16 3", **more: Any) -> Forward:
    return Forward(name, axes, "image", dtype="float32", **more)


ZOO = (
    # Attention: layers x (K and V) x groups of heads x dim of a head, unless said otherwise.
    _decoder("gpt2", F32 * 2 * 2 * 4 * 8),
    _decoder("linen_transformer", F32 * 2 * 2 * 4 * 8),
    _decoder("linen_scanned", F32 * 3 * 2 * 4 * 8),
    _decoder("nnx_library", F32 * 2 * 2 * 3 * 8),
    _decoder("haiku_transformer", F32 * 2 * 2 * 4 * 8),
    _decoder("equinox_transformer", F32 * 2 * 2 * 4 * 8, axes="time"),
    _decoder("llama", F32 * 2 * 2 * 2 * 8),  # rotated K, before a group's heads are repeated
    _decoder("llama_scanned", F32 * 3 * 2 * 2 * 8),
    _decoder("neox", F32 * 2 * 2 * 3 * 16),
    _decoder("qk_norm", F32 * 2 * 2 * 1 * 8),  # normed, rotated K
    _decoder("alibi", F32 * 1 * 2 * 1 * 6, axes="time"),
    _decoder("t5_decoder", F32 * 2 * 2 * 4 * 8),
    _decoder("flattened", F32 * 2 * 2 * 4 * 8),
    _decoder("time_major", F32 * 2 * 2 * 4 * 8),
    # 2 layers of 4 see everything; 2 see 7 rows, their own among them, so 6 are kept.
    _decoder("gemma2", F32 * 2 * 2 * 2 * 8, constant=F32 * 2 * 6 * 2 * 2 * 8),
    _decoder("mistral", 0, constant=F32 * 2 * 5 * 2 * 2 * 8),  # a window of 6 in both layers
    _decoder("attention_sink", F32 * 1 * 2 * 2 * 8, constant=F32 * 1 * 4 * 2 * 2 * 8, axes="time"),  # window of 5
    _decoder("mla", F32 * 2 * (16 + 4)),  # the normed latent, and the rotary key that all heads share
    _decoder("token_mask", F32 * 2 * 16 + 1),  # and one bool: whether the token is padding
    # K, V and the token's document, an int32; the count of documents so far and where the last began.
    _decoder("packed", F32 * 1 * 2 * 4 * 8 + 4, constant=4 + 4),
    _decoder("moe_dense", F32 * 2 * 2 * 4 * 8),
    # How full each of 4 buffers is. A token meets no other in its place of a buffer, so nothing else is kept of it.
    _decoder("moe_capacity", F32 * 1 * 2 * 4 * 8, constant=F32 * 4, independent=False),
    _decoder("moe_groups", F32 * 1 * 2 * 4 * 8, constant=F32 * 4),
    # The parallel form: rotated K (8 a head) and V (16) of every token. Its recurrent form would keep 8 x 16 a head.
    _decoder("retnet", F32 * 2 * 2 * (8 + 16)),
    # Sums over time, and carries of scans.
    _recurrent("linear_attention", F32 * 2 * 4 * (8 * 8 + 8)),  # sum of phi(k) v^T and sum of phi(k), a head
    _recurrent("delta_net", F32 * 2 * 8 * 8),
    _recurrent("gru", F32 * 2 * 28),
    _recurrent("lstm", F32 * 2 * 2 * 28),
    _recurrent("nnx_rnn", F32 * 2 * 24),
    _recurrent("haiku_lstm", F32 * 2 * 2 * 24),
    _recurrent("equinox_gru", F32 * 24),
    # The row before of both mixings; numerator, denominator, maximum. The first mixing's row is made again from the
    # token's number, its mean and its deviation: 12 bytes in place of 32 floats.
    _recurrent("rwkv", F32 * 2 * (2 + 3) * 32 - F32 * 32 + 12),
    _recurrent("mamba", F32 * 2 * (3 * 32 + 32 * 6)),  # 3 rows before a convolution of width 4; the state
    _recurrent("lru", 2 * F32 * 2 * 16),  # complex
    # Time in chunks: their state, and of the rows since the chunk began, at most one less than it has, k, v and gate
    # (of 2 heads; 8 rows), or x, its decay and B (10 rows; B is the same for all heads). q and C of earlier rows
    # matter to nothing.
    _recurrent("gla_chunked", F32 * 2 * 2 * (6 * 10 + 7 * (6 + 10 + 6))),
    _recurrent("mamba2_ssd", F32 * 2 * (3 * (32 + 2 * 6) + 4 * 8 * 6 + 9 * (32 + 4 + 6))),  # and 3 rows to convolve
    # 4 rows of 12 bins before a convolution of width 5; h and c.
    _recurrent("speech_frames", F32 * (4 * 12 + 2 * 20), axes="time 12", dtype="float32"),
    # The sample before as its number (4 bytes, not 32 floats), then as many rows of 16 channels as each dilation spans.
    Forward("causal_conv", "batch time", "convolution", causal=True, constant=4 + F32 * (1 + 2 + 4 + 8) * 16),
    # Long convolutions have no bounded exact state: their inputs. S4D's recurrence would keep 8 complex a channel.
    # The first layer's are embeddings, looked up again by the token's number.
    Forward("s4d", "batch time", "convolution", causal=True, per_token=4 + F32 * 24),
    # Two long convolutions; 2 rows of 3 x 24 channels before the short one.
    Forward("hyena", "batch time", "convolution", causal=True, per_token=F32 * 2 * 24, constant=F32 * 2 * 3 * 24),
    Forward(
        "encoder_decoder",
        "batch time",
        "seq2seq",
        causal=True,
        per_token=F32 * 2 * 2 * 4 * 8,
        per_source=F32 * 2 * 2 * 4 * 8 + 1,  # and one bool: whether the source token is padding
        more=(("batch source", "int32"),),
    ),
    # Not causal, and right to be refused as decoders.
    Forward("bert", "batch time", "encoder", more=(("batch time", "int32"),)),
    Forward("bidirectional", "batch time", "encoder"),
    Forward("expert_choice", "batch time", "encoder"),
    Forward("gla_leaky", "batch time", "encoder"),  # each row reads its whole chunk's gates
    # Batches.
    _image("resnet"),
    _image("batchnorm_training", independent=False),
    Forward("batch_softmax", "batch 12", "image", independent=False, dtype="float32", more=(("batch 12", "float32"),)),
    _image("vit"),
    _image("swin"),
    _image("unet", more=(("batch", "float32"),)),
    _image("transposed_unet", "batch 20 20 1"),
    _image("mlp_mixer", "batch 3 16 16"),
    _image("convnet_groupnorm"),
    _image("dncnn", "batch 12 12 1"),
    Forward("gnn", "batch 10 6", "graph", dtype="float32", more=(("batch edges", "int32"), ("batch edges", "int32"))),
)
BY_NAME: Mapping[str, Forward] = {row.name: row for row in ZOO}


@cache
def make(name: str, seed: int = 0) -> tuple[Any, Any, int]:
    """(forward, params, the number below which its integer inputs stay)"""
    module = importlib.import_module(f"forwards.{name}")
    return *module.make(seed), getattr(module, "VOCAB", 0)


def trace(name: str, seed: int = 0) -> Any:
    """The forward as a Program."""
    import jaxinfer as ji

    forward, params, _ = make(name, seed)
    arguments = () if params is None else (params,)
    return ji.trace(forward, *arguments, *(ji.spec(*spec) for spec in BY_NAME[name].inputs))


def draw(name: str, sizes: Mapping[str, int], random: np.random.Generator) -> list[np.ndarray]:
    """Random inputs of a forward: normal floats, integers below its VOCAB."""
    vocab, arrays = make(name)[2], []
    for axes, dtype in BY_NAME[name].inputs:
        shape = [int(dim) if dim.isdigit() else sizes[dim] for dim in axes.split()]
        drawn = random.integers(0, vocab, shape) if dtype == "int32" else random.standard_normal(shape)
        arrays.append(drawn.astype(dtype))
    return arrays
