"""Order work between the compute stream and a copy stream, where the hardware has streams; elsewhere do nothing."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from ..hardware import Hardware


class Mark:
    """A point in a stream's work that others can wait for; with several devices, one for each. Unrecorded, it holds
    nobody up."""

    def __init__(self, events: Sequence[Any]) -> None:
        self.events = events


@dataclass(frozen=True)
class _Lane:
    """One device's streams. torch: its module of stream functions."""

    torch: Any
    device: Any
    copies: Any

    @property
    def compute(self) -> Any:
        return self.torch.current_stream(self.device)


class Pace:
    """Keeps the host one piece of work ahead of devices that take turns: near enough that what it tells of is done or
    under way, and that little is left to do where it stops; never so near that they wait for it."""

    def __init__(self) -> None:
        self._given: deque[Mark] = deque()

    def keep(self, order: "StreamOrder", *, copies: bool = False) -> None:
        """Between two pieces of work for `order`'s device: the host waits until all but the last are done. `copies`:
        they are the copy stream's."""
        mark = order.mark()
        if copies:
            order.record_copy(mark)
        else:
            order.record_compute(mark)
        self._given.append(mark)
        if len(self._given) > 1:
            order.host_waits(self._given.popleft())


class StreamOrder:
    """One copy stream beside the compute stream. Nothing waits where there are no streams.

    That of several devices (`together`) does on each of them what it is told, in their order.
    """

    def __init__(self, hardware: Hardware) -> None:
        self._lanes: tuple[_Lane, ...] = ()
        if hardware.streams:
            torch, device = hardware.accelerator, hardware.device
            self._lanes = (_Lane(torch, device, torch.Stream(device)),)

    @classmethod
    def together(cls, orders: Sequence["StreamOrder"]) -> "StreamOrder":
        """Of their devices, with their copy streams."""
        made = cls.__new__(cls)
        made._lanes = tuple(lane for order in orders for lane in order._lanes)
        return made

    def mark(self) -> Mark:
        return Mark([lane.torch.Event() for lane in self._lanes])

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Within it, work goes to the copy stream (thread-local, as torch's current stream is)."""
        with ExitStack() as stack:
            for lane in self._lanes:
                stack.enter_context(lane.torch.stream(lane.copies))
            yield

    def after_compute(self) -> None:
        """The copy stream waits for what the compute stream has been given so far."""
        for lane in self._lanes:
            lane.copies.wait_stream(lane.compute)

    def record_compute(self, mark: Mark) -> None:
        for lane, event in zip(self._lanes, mark.events, strict=True):
            event.record(lane.compute)

    def record_copy(self, mark: Mark) -> None:
        for lane, event in zip(self._lanes, mark.events, strict=True):
            event.record(lane.copies)

    def compute_waits(self, mark: Mark) -> None:
        for lane, event in zip(self._lanes, mark.events, strict=True):
            lane.compute.wait_event(event)

    def copy_waits(self, mark: Mark) -> None:
        for lane, event in zip(self._lanes, mark.events, strict=True):
            lane.copies.wait_event(event)

    def host_waits(self, mark: Mark) -> None:
        for event in mark.events:
            event.synchronize()

    def compute_moment(self) -> Any:
        """This moment of the compute stream's work; of the host's, where there are no streams."""
        return self._moment([lane.compute for lane in self._lanes])

    def copy_moment(self) -> Any:
        """The same of the copy stream."""
        return self._moment([lane.copies for lane in self._lanes])

    def _moment(self, streams: Sequence[Any]) -> Any:
        if not streams:
            return time.perf_counter()
        events = [lane.torch.Event(enable_timing=True) for lane in self._lanes]
        for event, stream in zip(events, streams, strict=True):
            event.record(stream)
        return events

    def has_passed(self, moment: Any) -> bool:
        """Whether the device has come past it; the host waits for nothing."""
        return not self._lanes or all(event.query() for event in moment)

    def seconds_between(self, first: Any, second: Any) -> float:
        """Of two moments of one stream; with several devices, of that which took the longest. The host waits until that
        has come past the second."""
        if not self._lanes:
            return float(second - first)
        for event in second:
            event.synchronize()
        return max(float(begun.elapsed_time(ended)) for begun, ended in zip(first, second, strict=True)) / 1000

    def finish_compute(self) -> None:
        """The host waits until the compute stream has done everything it was given."""
        for lane in self._lanes:
            lane.compute.synchronize()

    def finish(self) -> None:
        """The host waits until the copy stream has done everything it was given."""
        for lane in self._lanes:
            lane.copies.synchronize()
