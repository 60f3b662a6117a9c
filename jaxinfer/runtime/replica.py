"""What the engine asks of a replica, whatever it is: threads on a device of this process, or another process."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from jaxinfer.runtime.request import Batch

Shape = tuple[tuple[str, int], ...]  # the bucket of each named dim


class Running(Protocol):
    """A batch that a replica has begun."""

    prepare: float  # seconds of host work before it began

    def wait(self) -> None:
        """Returns when the device is done; raises what went wrong there."""
        ...

    def results(self) -> Sequence[Any]:
        """For each request of the batch its result, or an exception that is that request's alone. After `wait`."""
        ...


class Replica(Protocol):
    """One copy of a model. `start` and `run` are called by one thread, `wait` and `results` by another; health and
    measured speed are kept by the engine (`fleet.Member`), alike for all kinds of replica."""

    name: str

    def start(self) -> Mapping[Shape, float]:
        """Makes it ready to run any batch without compiling; also called to revive one that failed.

        Returns: seconds that a batch of each shape takes, as far as it was measured.
        """
        ...

    def run(self, batch: Batch) -> Running:
        """Prepares a batch and begins it, without waiting: while it runs, the next one is prepared."""
        ...

    def close(self) -> None:
        """Lets go of what it holds. Nothing is called afterwards but `start`."""
        ...
