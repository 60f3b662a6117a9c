"""A recording to try speech detectors on, made by formulas. NumPy only, so that references without JAX hear it too."""

import numpy as np

FRAME = 512


def recording(seconds: float = 4.0, seed: int = 0) -> np.ndarray:
    """Speech-like sound: voiced bursts with formants that move, hiss and silence between. float32 [time, 512]"""
    random, rate = np.random.default_rng(seed), 16_000
    time = np.arange(int(seconds * rate)) / rate
    pitch = 110 + 25 * np.sin(2 * np.pi * 0.7 * time) + 10 * np.sin(2 * np.pi * 3.1 * time)
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    sound = np.zeros_like(time)
    for harmonic in range(1, 30):
        frequency = harmonic * pitch
        formants = (
            (500 + 250 * np.sin(2 * np.pi * 2.3 * time), 90),
            (1500 + 500 * np.sin(2 * np.pi * 1.7 * time), 150),
        )
        gain = sum(1 / (1 + ((frequency - centre) / width) ** 2) for centre, width in formants)
        sound += gain * np.sin(harmonic * phase)
    syllables = np.clip(np.sin(2 * np.pi * 3.7 * time), 0, 1) * (np.sin(2 * np.pi * 0.6 * time) > -0.2)
    sound = 0.12 * sound * syllables + 0.003 * random.standard_normal(len(time))
    return sound[: len(sound) // FRAME * FRAME].reshape(-1, FRAME).astype(np.float32)
