"""How long passes take on the device: by moments of its compute stream, not of the host, which is far ahead of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..streaming import StreamOrder


class PassClock:
    """Moments are looked at when a person asks, by when the device has mostly come past them: a step waits for
    nothing. Where the device has no streams they are the host's."""

    def __init__(self, order: StreamOrder) -> None:
        """Begins now."""
        self._order = order
        self._begun = order.compute_moment()
        self._moments: list[tuple[Any, Any]] = []
        self._settled: list[float] = []
        self._first_seconds = 0.0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """One pass. One that fails is not counted."""
        begin = self._order.compute_moment()
        yield
        self._moments.append((begin, self._order.compute_moment()))

    def uncount(self) -> None:
        """The last one was none."""
        (self._moments or self._settled).pop()

    @property
    def passes(self) -> int:
        """Issued so far. The host waits for nothing."""
        return len(self._settled) + len(self._moments)

    @property
    def seconds(self) -> list[float]:
        """Of each pass so far, on the device. The host waits until it is done with them."""
        self._settle()
        return self._settled

    @property
    def first_seconds(self) -> float:
        """From this clock's beginning to the end of the first pass, on the device; 0 before that."""
        self._settle()
        return self._first_seconds

    def _settle(self) -> None:
        if self._moments and not self._settled:
            self._first_seconds = self._order.seconds_between(self._begun, self._moments[0][1])
        self._settled += [self._order.seconds_between(*moments) for moments in self._moments]
        self._moments.clear()
