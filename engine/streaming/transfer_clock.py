"""How fast bytes come from files and go to the device: measured around each read and each copy, whatever waits."""

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..planning.forecast import Throughput
from .streams import StreamOrder

MOST_KEPT = 1024  # measurements that are not added up yet


class TransferClock:
    """Copies are measured by moments of the copy stream, reads by the host's time; where several are under way, that
    counts once. By any number of threads."""

    def __init__(self, order: StreamOrder) -> None:
        self._order = order
        self._lock = threading.Lock()
        self._reads: list[tuple[float, float]] = []
        self._copies: deque[tuple[int, Any, Any]] = deque()
        self._read = Throughput()
        self._copied = Throughput()

    @contextmanager
    def reading(self, nbytes: int) -> Iterator[None]:
        """One read of a file. One that fails is not counted."""
        begun = time.perf_counter()
        yield
        with self._lock:
            self._reads.append((begun, time.perf_counter()))
            self._read += Throughput(nbytes)
            if len(self._reads) > MOST_KEPT:
                self._add_up_reads()

    @contextmanager
    def copying(self, nbytes: int) -> Iterator[None]:
        """What is issued to the copy stream: a copy to the device. One that fails is not counted."""
        begun = self._order.copy_moment()
        yield
        with self._lock:
            self._copies.append((nbytes, begun, self._order.copy_moment()))
            if len(self._copies) > MOST_KEPT:
                self._add_up_copies()

    @property
    def read(self) -> Throughput:
        """So far."""
        with self._lock:
            self._add_up_reads()
            return self._read

    @property
    def copied(self) -> Throughput:
        """So far, of copies that the device is done with: nobody waits for the others."""
        with self._lock:
            self._add_up_copies()
            return self._copied

    def _add_up_reads(self) -> None:
        seconds, until = 0.0, float("-inf")
        for begun, ended in sorted(self._reads):
            seconds += max(0.0, ended - max(begun, until))
            until = max(until, ended)
        self._reads.clear()
        self._read += Throughput(0, seconds)

    def _add_up_copies(self) -> None:
        while self._copies and self._order.has_passed(self._copies[0][-1]):
            nbytes, begun, ended = self._copies.popleft()
            self._copied += Throughput(nbytes, self._order.seconds_between(begun, ended))
