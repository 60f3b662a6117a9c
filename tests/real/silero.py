"""Silero VAD 6 (github.com/snakers4/silero-vad) at 16 kHz: the probability of speech in each 32 ms of sound.

A plain forward over ONE recording cut into frames, as its paper-less authors' PyTorch would read in JAX: each frame is
seen with the last 64 samples of the one before, a learned short-time Fourier transform and four convolutions make one
vector of it, an LSTM runs over the vectors. The weights are those of `silero_vad_16k_sequence.onnx`.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from real import onnx_file

CONTEXT, STRIDE, PAD, BINS = 64, 128, 64, 129
CONVOLUTIONS = ((1, 1), (2, 1), (2, 1), (1, 1))  # (stride, padding on either side)


def load(folder: Path) -> dict[str, np.ndarray]:
    """Parameters from the unpacked wheel."""
    stored = onnx_file.initializers(folder / "silero_vad" / "data" / "silero_vad_16k_sequence.onnx")
    # ONNX names what its LSTM takes by number: input weights, recurrent weights, biases; gates in the order i o f c.
    lstm = sorted(name for name in stored if name.startswith("onnx::LSTM_"))
    w_ih, w_hh, biases = (stored.pop(name)[0] for name in lstm)
    return stored | {"lstm.w_ih": w_ih, "lstm.w_hh": w_hh, "lstm.bias": biases.reshape(2, -1).sum(0)}


def convolve(x, kernel, stride, pad):
    """x [frames, channels, samples]"""
    return jax.lax.conv_general_dilated(
        x, kernel, (stride,), [(pad, pad)], dimension_numbers=("NCH", "OIH", "NCH"), precision="highest"
    )


def lstm(params, x):
    """x [frames, 128] -> [frames, 128]"""
    inputs = x @ params["lstm.w_ih"].T + params["lstm.bias"]

    def cell(carry, given):
        h, c = carry
        i, o, f, g = jnp.split(given + params["lstm.w_hh"] @ h, 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zeros = jnp.zeros(x.shape[1])
    return jax.lax.scan(cell, (zeros, zeros), inputs)[1]


def forward(params, frames):
    """float32 [time, 512] samples in [-1, 1] -> float32 [time] probabilities"""
    before = jnp.concatenate([jnp.zeros((1, CONTEXT)), frames[:-1, -CONTEXT:]])
    x = jnp.concatenate([before, frames], axis=1)
    x = jnp.pad(x, ((0, 0), (0, PAD)), mode="reflect")[:, None]
    x = convolve(x, params["stft.forward_basis_buffer"], STRIDE, 0)
    x = jnp.sqrt(x[:, :BINS] ** 2 + x[:, BINS:] ** 2)
    for number, (stride, pad) in enumerate(CONVOLUTIONS):
        x = convolve(x, params[f"encoder.{number}.weight"], stride, pad)
        x = jax.nn.relu(x + params[f"encoder.{number}.bias"][:, None])
    hidden = jax.nn.relu(lstm(params, x[:, :, 0]))
    return jax.nn.sigmoid(hidden @ params["output.weight"][0, :, 0] + params["output.bias"][0])
