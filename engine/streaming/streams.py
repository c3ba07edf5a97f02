"""Order work between the compute stream and a copy stream, where the hardware has streams; elsewhere do nothing."""

import time
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ..hardware import Hardware


class Mark:
    """A point in a stream's work that others can wait for. Unrecorded, it holds nobody up."""

    def __init__(self, event: Any) -> None:
        self.event = event


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
    """One copy stream beside the compute stream. Nothing waits where there are no streams."""

    def __init__(self, hardware: Hardware) -> None:
        self._torch: Any = hardware.accelerator if hardware.streams else None
        self._device = hardware.device
        self._stream: Any = self._torch.Stream(hardware.device) if self._torch else None

    def mark(self) -> Mark:
        return Mark(self._torch.Event() if self._torch else None)

    def copying(self) -> AbstractContextManager[Any]:
        """Within it, work goes to the copy stream (thread-local, as torch's current stream is)."""
        return self._torch.stream(self._stream) if self._torch else nullcontext()

    def after_compute(self) -> None:
        """The copy stream waits for what the compute stream has been given so far."""
        if self._torch:
            self._stream.wait_stream(self._torch.current_stream(self._device))

    def record_compute(self, mark: Mark) -> None:
        if self._torch:
            mark.event.record(self._torch.current_stream(self._device))

    def record_copy(self, mark: Mark) -> None:
        if self._torch:
            mark.event.record(self._stream)

    def compute_waits(self, mark: Mark) -> None:
        if self._torch:
            self._torch.current_stream(self._device).wait_event(mark.event)

    def copy_waits(self, mark: Mark) -> None:
        if self._torch:
            self._stream.wait_event(mark.event)

    def host_waits(self, mark: Mark) -> None:
        if self._torch:
            mark.event.synchronize()

    def compute_moment(self) -> Any:
        """This moment of the compute stream's work; of the host's, where there are no streams."""
        return self._moment(self._torch.current_stream(self._device)) if self._torch else time.perf_counter()

    def copy_moment(self) -> Any:
        """The same of the copy stream."""
        return self._moment(self._stream) if self._torch else time.perf_counter()

    def _moment(self, stream: Any) -> Any:
        event = self._torch.Event(enable_timing=True)
        event.record(stream)
        return event

    def has_passed(self, moment: Any) -> bool:
        """Whether the device has come past it; the host waits for nothing."""
        return bool(moment.query()) if self._torch else True

    def seconds_between(self, first: Any, second: Any) -> float:
        """Of two moments of one stream. The host waits until that has come past the second."""
        if not self._torch:
            return float(second - first)
        second.synchronize()
        return float(first.elapsed_time(second)) / 1000

    def finish_compute(self) -> None:
        """The host waits until the compute stream has done everything it was given."""
        if self._torch:
            self._torch.current_stream(self._device).synchronize()

    def finish(self) -> None:
        """The host waits until the copy stream has done everything it was given."""
        if self._torch:
            self._stream.synchronize()
