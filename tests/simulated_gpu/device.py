"""SimulatedGPU: cards made of Python on a machine without one, and every race on them found.

    with SimulatedGPU("late") as gpu:
        model = QwenImageTransformer(checkpoint, dtype=torch.bfloat16, hardware=gpu.hardware())
        ...
    assert not gpu.races

Every operator on a tensor of "cuda:N" goes into the queue of the issuing thread's current stream and runs when the
schedule says so. Beside that, every access is checked against vector clocks: two that conflict and that nothing orders
are a race, also where no schedule happened to show it. Rules as in CUDA's programming guide ("Asynchronous Concurrent
Execution") and torch's notes on CUDA semantics.
"""

import random
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from types import CodeType, TracebackType
from typing import Any, Protocol

import torch
from qwenimage_lowvram.engine.hardware import Hardware
from torch import Tensor

from . import seams
from .allocator import Allocator, extent, span_bytes
from .clocks import Access, AccessLog, Clock, Race, Site
from .copies import Copies
from .host_threads import HostThreads
from .operators import Call, FunctionCall, Operators
from .page_locks import PageLocks
from .results import Layout
from .schedules import SCHEDULES, random_by
from .streams import Accelerator, Point, Stream
from .tensors import DeviceMode, DeviceTensor, tensors_in

aten = torch.ops.aten
SITE_FRAMES = 3
MOST_JITTER_SECONDS = 2e-3


class Costs(Protocol):
    """Simulated seconds that work takes."""

    @property
    def issue_seconds(self) -> float: ...

    def kernel_seconds(self, func: Any, args: Sequence[Any], tensors: Sequence[Tensor]) -> float: ...

    def copy_seconds(self, nbytes: int) -> float: ...

    def read_seconds(self, nbytes: int) -> float: ...


class Owner(Protocol):
    """A stream or a host thread."""

    name: str
    clock: Clock


@dataclass(frozen=True)
class HostWait:
    """A thread of the host waited for a stream: `kernels_since` were given to the device after what it waited for."""

    what: str
    stream: str
    thread: str
    kernels_since: int
    site: Site

    def __str__(self) -> str:
        where = " < ".join(self.site) or "elsewhere"
        return f"{self.thread} waits for the {self.stream}, {self.kernels_since} kernels behind: {self.what}, {where}"


@dataclass(frozen=True)
class SimulatedHardware(Hardware):
    """A card with a copy stream and page-locked memory."""

    gpu: Any = None

    @property
    def accelerator(self) -> Accelerator:
        assert isinstance(self.gpu, SimulatedGPU)
        return self.gpu.accelerator


class SimulatedGPU:
    """All cards of a simulated machine, while it is entered. `schedule`: one of SCHEDULES, or "random" by `seed`.

    `races`: what was found. `waits`: each time that the host waited for the device; `pageable`: copies that were to be
    asynchronous, but came from memory that is not page-locked. `costs`: simulated seconds.
    """

    def __init__(
        self,
        schedule: str = "late",
        seed: int = 0,
        *,
        stop_at_race: bool = False,
        costs: Costs | None = None,
    ) -> None:
        self.lock = threading.RLock()
        self.threads = HostThreads()
        self.streams: list[Stream] = []
        self.schedule = random_by(seed) if schedule == "random" else SCHEDULES[schedule]
        self.allocator = Allocator(self)
        self.page_locks = PageLocks(self)
        self.accelerator = Accelerator(self)
        self.costs = costs
        self.races: list[str] = []
        self.waits: list[HostWait] = []
        self.pageable: Counter[Site] = Counter()
        self._stop_at_race = stop_at_race
        self._jitter = random.Random(seed) if schedule == "random" else None
        self._operators, self._copies = Operators(self), Copies(self)
        self._defaults: dict[torch.device, Stream] = {}
        self._local = threading.local()
        self._sites: dict[int, tuple[CodeType, str | None]] = {}  # by identity: code's own hash reads all of it
        self._entered = ExitStack()

    def hardware(self, index: int = 0, **changes: Any) -> SimulatedHardware:
        card = SimulatedHardware(
            torch.device("cuda", index),
            streams=True,
            pinned=True,
            prefetch=True,
            host_device=False,
            pinned_limit_bytes=2**40,
            page_locks=self.page_locks,
            gpu=self,
        )
        return replace(card, **changes)

    def __enter__(self) -> "SimulatedGPU":
        self._entered.enter_context(seams.installed(self))
        self._entered.enter_context(self.threads.ordered_by_executors(lambda: DeviceMode(self), self._delay))
        self._entered.enter_context(DeviceMode(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.close()
        for stream in list(self.streams):
            stream.run()

    def _delay(self) -> float:
        """So that host threads come in another order each time."""
        return 0.0 if self._jitter is None else self._jitter.random() * MOST_JITTER_SECONDS

    # streams

    def current_stream(self, device: torch.device | str | None = None) -> Stream:
        """Of the present thread; the device's default stream unless it is within `on_stream`."""
        device = torch.device(device if device is not None else getattr(self._local, "device", "cuda:0"))
        current: Mapping[torch.device, Stream] = getattr(self._local, "streams", {})
        return current.get(device) or self.compute_stream(device)

    def compute_stream(self, device: torch.device) -> Stream:
        """The device's default one."""
        with self.lock:
            if device not in self._defaults:
                self._defaults[device] = Stream(self, device, computes=True)
            return self._defaults[device]

    @contextmanager
    def on_stream(self, stream: Stream) -> Iterator[None]:
        before = getattr(self._local, "streams", {}), getattr(self._local, "device", "cuda:0")
        self._local.streams, self._local.device = {**before[0], stream.device: stream}, stream.device
        try:
            yield
        finally:
            self._local.streams, self._local.device = before

    # memory

    def new(self, layout: Layout, device: torch.device, what: str) -> DeviceTensor:
        """Uninitialised, on the current stream."""
        nbytes = span_bytes(layout.size, layout.stride, layout.dtype)
        allocation = self.allocator.allocate(nbytes, self.current_stream(device), what, self.site())
        return DeviceTensor(allocation.view(layout.size, layout.stride, layout.dtype), allocation, device)

    def put(self, value: Tensor, stream: Stream, what: str) -> DeviceTensor:
        """What the host has just computed for the device."""
        out = self.new(Layout.of(value), stream.device, what)
        inner = out.inner
        stream.begin()
        self.touch(out, stream, True, what)
        stream.issue(lambda: inner.copy_(value))
        return out

    def touch(self, tensor: DeviceTensor, stream: Stream, writes: bool, what: str) -> None:
        allocation = tensor.allocation
        self.accessed(allocation.log, extent(tensor.inner, allocation.memory), stream, writes, what, self.site())

    def accessed(
        self, log: AccessLog, extent: tuple[int, int], owner: Owner, writes: bool, what: str, site: Site
    ) -> None:
        access = Access(*extent, owner.name, owner.clock.get(owner.name, 0), writes, what, site)
        self.races.extend(log.add(access, owner.clock))

    # operators

    def dispatch(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Every operator of torch comes here, as long as a mode of this GPU is on or a tensor of it is among the
        arguments."""
        if self._stop_at_race and self.races:
            raise Race(self.races[0])
        call = Call(func, args, kwargs)
        device = kwargs.get("device") or next((value for value in args if isinstance(value, torch.device)), None)
        target = torch.device(device) if device is not None else None
        if not any(isinstance(t, DeviceTensor) for t in call.tensors) and (target is None or target.type != "cuda"):
            return self._on_host(call)
        if _is_composite(func):
            with DeviceMode(self):  # tensors of inference mode come here before they are taken apart
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        with self.lock, self._one_site():
            if func is aten._to_copy.default and target is not None and args[0].device != target:
                dtype = kwargs.get("dtype") or args[0].dtype
                return self._copies.to(args[0], target, dtype, kwargs.get("non_blocking", False))
            if func is aten.copy_.default and args[0].device != args[1].device:
                self._copies.copy(args[0], args[1], kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
                return args[0]
            return self._operators.run(call)

    def attend(self, attention: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """torch's attention as one kernel, as the host has it too: the same bits."""
        with self.lock, self._one_site():
            result: Tensor = self._operators.run(FunctionCall(attention, args, kwargs))
            return result

    def _on_host(self, call: Call) -> Any:
        if len(self.page_locks) and not call.is_view:
            for argument, value in call.arguments():
                writes = argument.alias_info is not None and argument.alias_info.is_write
                for tensor in tensors_in(value):
                    self.page_locks.host_access(tensor, writes, call.name)
        return call.func(*call.args, **call.kwargs)

    # what is told

    def note_wait(self, what: str, point: Point) -> None:
        """The present thread waits for it, or, where the driver pleases, may have to."""
        kernels_since = self.compute_stream(point.stream.device).kernels - point.kernels
        self.waits.append(HostWait(what, point.stream.name, self.threads.here().name, kernels_since, self.site()))

    @contextmanager
    def _one_site(self) -> Iterator[None]:
        """What the present thread does within it is all of one operator: of one line of the engine."""
        before = getattr(self._local, "site", None)
        self._local.site = self.site()
        try:
            yield
        finally:
            self._local.site = before

    def site(self) -> Site:
        """Where in the engine or the nodes the present thread is: the innermost lines first."""
        known: Site | None = getattr(self._local, "site", None)
        return self._look() if known is None else known

    def _look(self) -> Site:
        frame, lines = sys._getframe(1), []
        while frame is not None and len(lines) < SITE_FRAMES:
            code = frame.f_code
            seen = self._sites.get(id(code))
            if seen is None:
                seen = self._sites[id(code)] = code, _ours(code)
            if seen[1] is not None:
                lines.append(f"{seen[1]}:{frame.f_lineno}")
            frame = frame.f_back  # type: ignore[assignment]
        return tuple(lines)


@cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _ours(code: CodeType) -> str | None:
    """`file function` of code in the engine or the nodes, None of all other."""
    file = code.co_filename.replace("\\", "/")
    if "site-packages" in file:
        return None
    for room in ("/engine/", "/nodes/"):
        if room in file and "/tests/" not in file:
            return f"{room.strip('/')}/{file.rpartition(room)[2]} {code.co_name}"
    return None
