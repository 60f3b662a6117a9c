"""`Engine.map`: results in the order of the rows, a bounded number of rows ahead of whoever takes the results."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future
from typing import Any


def ordered(submit: Callable[[Any], "Future[Any]"], rows: Iterable[Any], window: int, progress: bool) -> Iterator[Any]:
    """Yields each row's result; takes rows as it goes, so that at most `window` are on their way. Ends with the error
    of the first row that failed; rows still on their way are then cancelled, as when the iterator is dropped."""
    pending: deque[Future[Any]] = deque()
    total = len(rows) if isinstance(rows, Sized) else None
    with _bar(total, progress) as advance:
        try:
            for row in rows:
                if len(pending) >= window:
                    yield pending.popleft().result()
                    advance()
                pending.append(submit(row))
            while pending:
                yield pending.popleft().result()
                advance()
        finally:
            for future in pending:
                future.cancel()


@contextlib.contextmanager
def _bar(total: int | None, show: bool) -> Iterator[Callable[[], None]]:
    """A function to call when one more row is done."""
    if not show:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("rows", total=total)
        yield lambda: bar.advance(task)
