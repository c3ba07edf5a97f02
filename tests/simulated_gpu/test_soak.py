"""Three hundred steps, in runs of different sizes, some of them interrupted: nothing grows."""

import gc
import threading
import weakref
from contextlib import suppress
from dataclasses import astuple, dataclass

import psutil
import pytest

from .device import SimulatedGPU
from .rig import PIECE_BYTES, Rig, finish, host
from .scenarios import Interrupted
from .seams import small_pieces
from .streams import Event
from .tiny_models import TinyModels

pytestmark = pytest.mark.slow
STEPS = 300
TIMES = tuple(1 - i / 16 for i in range(16))
INTERRUPTED = TIMES[13]
# of each run by turns: the image in tokens, prompts, resident blocks, held blocks, slots, the block where a late
# step is interrupted, and whether the model leaves the card behind it
RUNS = (
    ((1, 3, 4), 1, (0,), (1,), 2, None, False),
    ((1, 2, 2), 1, (), (0,), 2, 1, False),
    ((1, 4, 5), 1, (), (), 1, 0, True),
    ((1, 1, 3), 1, (0, 1), (), 2, None, False),
    ((1, 3, 4), 1, (1,), (), 2, 1, True),
)


@dataclass(frozen=True)
class Held:
    """What the process, the card and the system hold between two runs."""

    device_bytes: int
    page_locks: int
    threads: int
    handles: int
    streams: int
    events: int
    host_bytes: int


class Counted:
    """Events that are alive."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._alive: weakref.WeakSet[Event] = weakref.WeakSet()
        made = Event.__init__

        def make(event: Event, *args: object, **kwargs: object) -> None:
            made(event, *args, **kwargs)  # type: ignore[arg-type]
            self._alive.add(event)

        monkeypatch.setattr(Event, "__init__", make)

    def __len__(self) -> int:
        return len(self._alive)


def test_three_hundred_steps_leave_nothing_behind(tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, seen = 0, list[Held]()
    events, process = Counted(monkeypatch), psutil.Process()
    with SimulatedGPU("late") as gpu, small_pieces(PIECE_BYTES):
        rig = Rig(tiny_models, gpu)
        model = rig.transformer("two blocks")
        while steps < STEPS:
            for image, prompts, resident, held, slots, stop_at, leaves in RUNS:
                model.load(resident, held)
                model.modulation.announce(TIMES)

                def stop(index: int, at: int | None = stop_at) -> None:
                    if index == at:
                        raise Interrupted

                with suppress(Interrupted), model.session(slots=slots) as session:
                    for timestep in TIMES:
                        steps += 1
                        branches = rig.branches(timestep, prompts=prompts, image_shape=image)
                        on_block = stop if timestep == INTERRUPTED else None
                        host(session.forward(branches, more=timestep != TIMES[-1], on_block=on_block))
                if leaves:
                    model.unload()
                    model.store.set_held(())
            session = branches = None
            gc.collect()
            gpu.accelerator.synchronize()
            # as at a run's begin. Until then up to `transfer_clock.MOST_KEPT` measured copies keep their two events;
            # how many are made depends on how far the reader was when it was interrupted
            assert model.store.copied.nbytes > 0
            seen.append(
                Held(
                    gpu.allocator.allocated_bytes,
                    len(gpu.page_locks),
                    threading.active_count(),
                    process.num_fds() if hasattr(process, "num_fds") else process.num_handles(),
                    len(gpu.streams),
                    len(events),
                    model.store.held_bytes,
                )
            )
        assert not gpu.races
        finish(model)
    first, *others = seen[1:]  # the first time, tables and caches are made
    for later in others:
        assert all(now <= then for now, then in zip(astuple(later), astuple(first), strict=True)), (first, later)
    assert gpu.allocator.allocated_bytes == len(gpu.page_locks) == 0
