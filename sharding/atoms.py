"""Atoms: the parts of dims that can be sharded on their own, as fine as the reshapes of a program need them.

A dim is a list of atoms, major to minor: [time, heads * 64] and [time, heads, 64] hold the same three atoms.
"""

from collections.abc import Sequence


class Atoms:
    """Union-find over atoms that may be split in two after they were joined."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._parents: list[int] = []
        self._parts: dict[int, tuple[int, int]] = {}

    def new(self, size: int) -> int:
        """An atom of its own."""
        self.sizes.append(size)
        self._parents.append(len(self._parents))
        return len(self._parents) - 1

    def root(self, atom: int) -> int:
        """Stands for all atoms that it was joined with."""
        while self._parents[atom] != atom:
            self._parents[atom] = self._parents[self._parents[atom]]
            atom = self._parents[atom]
        return atom

    def leaves(self, atoms: Sequence[int]) -> list[int]:
        """These atoms as they were split, major to minor, without those of size 1."""
        found: list[int] = []
        stack = list(reversed(atoms))
        while stack:
            atom = self.root(stack.pop())
            if atom in self._parts:
                stack.extend(reversed(self._parts[atom]))
            elif self.sizes[atom] > 1:
                found.append(atom)
        return found

    def align(self, a: Sequence[int], b: Sequence[int]) -> list[tuple[int, int]] | None:
        """Splits both until their atoms have equal sizes, in order; the pairs, or None where that can't be."""
        while True:
            mine, theirs = self.leaves(a), self.leaves(b)
            uneven = next((n for n, (x, y) in enumerate(zip(mine, theirs, strict=False)) if not self._same(x, y)), None)
            if uneven is None:
                return list(zip(mine, theirs, strict=True)) if len(mine) == len(theirs) else None
            x, y = mine[uneven], theirs[uneven]
            big, size = (x, self.sizes[y]) if self.sizes[x] > self.sizes[y] else (y, self.sizes[x])
            if self.sizes[big] % size:
                return None
            self._parts[big] = self.new(size), self.new(self.sizes[big] // size)

    def join(self, a: Sequence[int], b: Sequence[int]) -> bool:
        """Makes two dims of equal size one; False where their atoms can't be aligned."""
        pairs = self.align(a, b)
        for x, y in pairs or ():
            x, y = self.root(x), self.root(y)
            if x != y:
                self._parents[max(x, y)] = min(x, y)
        return pairs is not None

    def _same(self, x: int, y: int) -> bool:
        return self.sizes[x] == self.sizes[y]
