"""Streams and events as CUDA has them: first in, first out; side streams wait for nothing unless they are told to."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .clocks import Clock
from .host_threads import Moment

if TYPE_CHECKING:
    from .device import SimulatedGPU


@dataclass(frozen=True)
class Point:
    """Behind the first `count` pieces of a stream's work."""

    stream: "Stream"
    count: int
    moment: Moment
    kernels: int  # that the device's compute stream had been given by then

    @property
    def passed(self) -> bool:
        return self.stream.done >= self.count


class Stream:
    """Work in its order. `computes`: the device's default stream, which kernels go to unless told otherwise."""

    def __init__(self, gpu: "SimulatedGPU", device: torch.device, *, computes: bool) -> None:
        self._gpu = gpu
        self.device = device
        self.computes = computes
        self.name = f"{'compute' if computes else 'copy'} stream {len(gpu.streams)} of {device}"
        self.clock = Clock()
        self.seconds = 0.0  # simulated, when all that was issued is done
        self.done = 0
        self.kernels = 0  # that it was given
        self._work: deque[Callable[[], object] | Point] = deque()
        gpu.streams.append(self)

    def __repr__(self) -> str:
        return self.name

    @property
    def waiting(self) -> int:
        return len(self._work)

    def run(self, count: int | None = None) -> None:
        """Do the next `count` pieces of work, and on other streams what these wait for; all if not given."""
        self._run_until(self.done + (self.waiting if count is None else count))

    def _run_until(self, count: int) -> None:
        if self.done < count:
            with as_device():
                self._work_until(count)

    def _work_until(self, count: int) -> None:
        while self.done < count:
            work = self._work.popleft()
            if isinstance(work, Point):
                work.stream._work_until(work.count)
            else:
                work()
            self.done += 1

    def begin(self) -> Clock:
        """The host gives a further piece of work: it comes after all that the host knows of. Returns the clock."""
        host = self._gpu.threads.here()
        if self._gpu.costs is not None:
            host.seconds += self._gpu.costs.issue_seconds
        self.clock.join(host.clock)
        self.clock.tick(self.name)
        self.seconds = max(self.seconds, host.seconds)
        return self.clock

    def issue(self, work: Callable[[], object] | Point, seconds: float = 0.0) -> None:
        """After `begin`; it takes so many simulated seconds."""
        self.seconds += seconds
        self._work.append(work)
        self._gpu.schedule(self, self._gpu.streams)

    def launch(self, kernel: Callable[[], object], seconds: float) -> None:
        """Issue a kernel."""
        self.kernels += 1
        self.issue(kernel, seconds)

    def issue_aside(self, work: Callable[[], object]) -> None:
        """After `begin`; nothing runs now: this may be asked for wherever Python lets go of a tensor, also while a
        stream is at work."""
        self._work.append(work)

    def point(self) -> Point:
        """Behind all that it has been given."""
        kernels = self._gpu.compute_stream(self.device).kernels
        return Point(self, self.done + self.waiting, Moment(self.clock.copy(), self.seconds), kernels)

    def host_waits(self, what: str, point: Point | None = None) -> None:
        """The host waits until the stream has come to `point`; for all its work if not given."""
        with self._gpu.lock:
            point = point or self.point()
            self._gpu.note_wait(what, point)
            self._run_until(point.count)
            self._gpu.threads.here().join(point.moment)

    # as torch.cuda.Stream

    def wait_event(self, event: "Event") -> None:
        with self._gpu.lock:
            self.clock.join(self._gpu.threads.here().clock)
            if event.point is not None:  # an event that was never recorded holds nobody up
                self.clock.join(event.point.moment.clock)
                self.seconds = max(self.seconds, event.point.moment.seconds)
                self.issue(event.point)

    def wait_stream(self, other: "Stream") -> None:
        event = Event(self._gpu)
        event.record(other)
        self.wait_event(event)

    def synchronize(self) -> None:
        self.host_waits("Stream.synchronize")


class Event:
    """As torch.cuda.Event: waiting captures the latest record."""

    def __init__(self, gpu: "SimulatedGPU", enable_timing: bool = False) -> None:
        self._gpu, self._timed = gpu, enable_timing
        self.point: Point | None = None

    def record(self, stream: Stream | None = None) -> None:
        with self._gpu.lock:
            stream = stream or self._gpu.current_stream()
            stream.begin()
            stream.issue(lambda: None)
            self.point = stream.point()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self._gpu.current_stream()).wait_event(self)

    def query(self) -> bool:
        """Whether what was recorded is done; where kernels take simulated time, at the host's present moment."""
        if self.point is None:
            return True
        if self._gpu.costs is not None:
            return self.point.moment.seconds <= self._gpu.threads.here().seconds
        return self.point.passed

    def synchronize(self) -> None:
        if self.point is not None:
            self.point.stream.host_waits("Event.synchronize", self.point)

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds; of pieces of work, where these take no simulated time."""
        for event in (self, end):
            if not event._timed or event.point is None or not event.query():
                raise RuntimeError("Both events must be made with enable_timing=True, recorded, and completed.")
        assert self.point is not None
        assert end.point is not None
        if self._gpu.costs is None:
            return 1e-3 * (end.point.count - self.point.count)
        return 1e3 * (end.point.moment.seconds - self.point.moment.seconds)


class Accelerator:
    """Stands where torch.cuda does, as far as Hardware's users go."""

    def __init__(self, gpu: "SimulatedGPU") -> None:
        self._gpu = gpu

    def Stream(self, device: torch.device | str | None = None) -> Stream:
        with self._gpu.lock:
            return Stream(self._gpu, torch.device(device or "cuda:0"), computes=False)

    def Event(self, enable_timing: bool = False) -> Event:
        return Event(self._gpu, enable_timing)

    def stream(self, stream: Stream) -> Any:
        return self._gpu.on_stream(stream)

    def current_stream(self, device: torch.device | str | None = None) -> Stream:
        return self._gpu.current_stream(device)

    def synchronize(self, device: torch.device | str | None = None) -> None:
        for stream in list(self._gpu.streams):
            if device is None or stream.device == torch.device(device):
                stream.host_waits("synchronize")


@contextmanager
def as_device() -> Iterator[None]:
    """What runs within it is the device's: no mode of the host sees it."""
    with (
        torch._C._DisableTorchDispatch(),
        torch._C.DisableTorchFunction(),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        yield
