"""Bucket ladders: the sizes that are compiled, so that every size in between is padded up to one of them."""

from bisect import bisect_left
from collections.abc import Sequence

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
