"""How long passes take on the device: by moments of its compute stream, not of the host, which is far ahead of it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..streaming import StreamOrder


class PassClock:
    """Moments are looked at when a person asks, by when the device has mostly come past them: a step waits for
    nothing. Where the device has no streams they are the host's."""

    def __init__(self, order: StreamOrder) -> None:
        self._order = order
        self._moments: list[tuple[Any, Any]] = []
        self._settled: list[float] = []
        self.begun_at = 0.0  # of the first pass, by time.perf_counter()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """One pass. One that fails is not counted."""
        if not self._moments and not self._settled:
            self.begun_at = time.perf_counter()
        begin = self._order.compute_moment()
        yield
        self._moments.append((begin, self._order.compute_moment()))

    @property
    def seconds(self) -> list[float]:
        """Of each pass so far, on the device. The host waits until it is done with them."""
        self._settled += [self._order.seconds_between(*moments) for moments in self._moments]
        self._moments.clear()
        return self._settled
