"""Why each program of an Executable was made ready: which request needed it first, when, and what it cost."""

import html
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from jaxinfer.aot import Ready


@dataclass(frozen=True)
class Made:
    """One program made ready."""

    bucket: Mapping[str, int]
    cause: Mapping[str, int] | str  # the sizes of the call that first needed it, or what else did
    when: datetime
    seconds: float  # that the caller waited
    origin: str  # "XLA", "the cache on disk", "the bundle", ...

    @property
    def row(self) -> tuple[str, ...]:
        cause = self.cause if isinstance(self.cause, str) else f"a call with {_sizes(self.cause)}"
        return _sizes(self.bucket), cause, f"{self.when:%Y-%m-%d %H:%M:%S}", f"{self.seconds:.2f} s", self.origin


class WhyCompiled(tuple[Made, ...]):
    """The programs in the order in which they were made ready; prints as a table."""

    HEAD = ("program", "first needed by", "when", "took", "from")

    def __str__(self) -> str:
        rows = [self.HEAD, *(made.row for made in self)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self.HEAD))]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def line(cells: tuple[str, ...], tag: str) -> str:
            return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

        return f"<table>{line(self.HEAD, 'th')}{''.join(line(made.row, 'td') for made in self)}</table>"


class CompileLog:
    """What `why_compiled` reads: one entry for each program made ready."""

    def __init__(self) -> None:
        self._made: dict[Ready, Made] = {}

    def add(self, bucket: Mapping[str, int], cause: Mapping[str, int] | str, ready: Ready) -> None:
        """Notes why a program was needed, the first time that it was."""
        if ready not in self._made:
            made = Made(dict(bucket), cause, datetime.now().astimezone(), ready.seconds, ready.origin)
            self._made.setdefault(ready, made)  # another thread may have been first

    def __call__(self) -> WhyCompiled:
        return WhyCompiled(self._made.values())


def _sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items()) or "-"
