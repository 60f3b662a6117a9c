"""Bucket ladders: the sizes that are compiled, so that every size in between is padded up to one of them.

`ladder` needs no knowledge of the traffic; `bucket_fit` chooses the sizes from it.
"""

import csv
import json
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer.errors import RequestError


def ladder(limit: int, first: int = 1) -> list[int]:
    """Powers of two times `first` up to `limit`, and `limit` itself: at most half of a bucket is padding.

    >>> ladder(100, 16)
    [16, 32, 64, 100]
    """
    if limit < 1 or first < 1:
        raise RequestError(f"a bucket ladder needs sizes of at least 1, got first={first}, limit={limit}")
    sizes = []
    while first < limit:
        sizes.append(first)
        first *= 2
    return [*sizes, limit]


def bucket_for(size: int, sizes: Sequence[int], what: str = "size") -> int:
    """The smallest of the ascending `sizes` that holds `size`.

    Raises:
        RequestError: larger than the largest bucket.
    """
    place = bisect_left(sizes, size)
    if place == len(sizes):
        raise RequestError(f"{what} {size} is over the largest bucket, {sizes[-1]}; compile with a larger one or split")
    return sizes[place]


def padded_to(sizes: Sequence[int]) -> list[int]:
    """Those of the ascending `sizes` that some other size is padded up to."""
    return [after for before, after in zip([0, *sizes], sizes, strict=False) if after - before > 1]


def sizes_in(path: str | Path, column: str) -> np.ndarray:
    """int64[calls]: one column of a recorded trace, a CSV file with a header or a file of JSON lines.

    Raises:
        RequestError: no such file or column, or a value that isn't an integer.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows: Any = csv.DictReader(file) if path.suffix == ".csv" else (json.loads(x) for x in file if x.strip())
            return np.array([int(row[column]) for row in rows], np.int64)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise RequestError(
            f"can't read the column {column!r} of {str(path)!r}: {type(error).__name__}: {error}. A trace is a .csv "
            "file with a header, or JSON objects one a line"
        ) from error
