"""The photograph that scico's wheel holds (Kodak's image 23, two macaws), read with NumPy only."""

import zlib
from pathlib import Path

import numpy as np


def grey(folder: Path) -> np.ndarray:
    """float32 [512, 768] in [0, 1]"""
    return (_photograph(folder) @ np.array([0.299, 0.587, 0.114]) / 255).astype(np.float32)


def macaws(folder: Path) -> np.ndarray:
    """The middle of it for an ImageNet classifier: float32 [224, 224, 3], (x - 127) / 128."""
    image = _photograph(folder)[32:480, 160:608].astype(np.float32)
    return (image.reshape(224, 2, 224, 2, 3).mean((1, 3)) - 127) / 128


def _photograph(folder: Path) -> np.ndarray:
    return png((folder / "scico" / "data" / "examples" / "kodim23.png").read_bytes())


def png(data: bytes) -> np.ndarray:
    """uint8 [height, width, 3] of an 8-bit RGB image that isn't interlaced."""
    at, packed, header = 8, b"", b""
    while at < len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + size]
        header = body if kind == b"IHDR" else header
        packed += body if kind == b"IDAT" else b""
        at += size + 12
    width, height = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:8], "big")
    if header[8:] != bytes((8, 2, 0, 0, 0)):
        raise ValueError("an 8-bit RGB image is wanted, not interlaced")
    rows = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, 1 + 3 * width)
    image = np.zeros((height, width, 3), np.uint8)
    above = np.zeros((width, 3), np.uint8)
    for y, row in enumerate(rows):
        above = image[y] = _unfiltered(int(row[0]), row[1:].reshape(width, 3), above)
    return image


def _unfiltered(kind: int, row: np.ndarray, above: np.ndarray) -> np.ndarray:
    """One row of a PNG, from what its filter left and the row above."""
    if kind == 0:
        return row
    if kind == 1:
        return np.cumsum(row, axis=0, dtype=np.uint8)
    if kind == 2:
        return row + above
    out = np.zeros_like(row)
    left = corner = np.zeros(3, np.int32)
    for x, (value, up) in enumerate(zip(row.astype(np.int32), above.astype(np.int32), strict=True)):
        if kind == 3:
            left = value + (left + up) // 2 & 255
        else:
            guess = left + up - corner
            away = np.abs(np.stack([guess - left, guess - up, guess - corner]))
            nearest = np.where(
                (away[0] <= away[1]) & (away[0] <= away[2]), left, np.where(away[1] <= away[2], up, corner)
            )
            left = value + nearest & 255
        out[x], corner = left, up
    return out
