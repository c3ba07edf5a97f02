"""What a run asks of the program that it runs in, and the answers of a program that does nothing else."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from ..streaming import BlockStore
from . import free_memory

Bar = Callable[[int, int], None]  # (done, of how many)


class Holder(Protocol):
    """A model that may hold weights on a device between runs."""

    @property
    def loaded_bytes(self) -> int: ...

    def shrink(self, nbytes: int) -> int:
        """Give back at least so many of them, or all; returns how many."""
        ...


class Streamed(Protocol):
    """A model whose blocks may lie in host memory."""

    @property
    def store(self) -> BlockStore: ...


class Surroundings(Protocol):
    """The program around a run: who may interrupt it, what it is shown, and whose memory there is."""

    def check(self) -> None:
        """Raise where the run is to end now. Asked often: before each block and tile."""
        ...

    def bar(self) -> Bar:
        """Where a phase of a run tells how far it is, at each block, layer or tile."""
        ...

    def tell(self, progress: Mapping[str, Any]) -> None:
        """What is done now, a few times a second: as `RunProgress` has it of sampling, `PhaseProgress` of all else."""
        ...

    def device_bytes(
        self, device: torch.device, limit_bytes: int | None, wanted_bytes: int, block_bytes: int = 0
    ) -> int:
        """What a stage may hold on `device`, at most `limit_bytes` (None: what is free) with all that is ours there;
        the run's own models count as part of the stage. Who lies in the way of `wanted_bytes` is asked to leave. What
        stays free follows `block_bytes`, of the largest block that is allocated there."""
        ...

    def host_bytes(self, model: Streamed, limit_bytes: int | None, wanted_bytes: int, least_bytes: int) -> int:
        """What sampling with `model` may hold in host memory, at most `limit_bytes` (None: what is free). Others are
        asked to leave, as on a device. `least_bytes` is granted within the limit even where nothing is free."""
        ...

    def free_ram(self) -> int:
        """Bytes of host memory that models may have beside what they hold."""
        ...

    def total_bytes(self, device: torch.device) -> int:
        """All memory of `device`."""
        ...

    def beside_bytes(self) -> int:
        """What lies on the run's device and is part of the run, but not of its model: ControlNets, for one."""
        ...

    def left(self, device: torch.device) -> None:
        """The run's model has given back weights by itself: count anew, and give unused memory to the driver."""
        ...


class Alone:
    """A program that does nothing but make images: nobody interrupts it, and only its own models can leave."""

    def __init__(
        self,
        own: Holder | None = None,
        others: Sequence[Holder] = (),
        on_progress: Callable[[Mapping[str, Any]], None] = lambda progress: None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """`own`: the run's model, where it stays on the device between runs. `others`: models that are asked to leave;
        they lie on the same device. `check` may raise, which ends the run."""
        self._own, self._others = own, others
        self._tell, self._check = on_progress, check

    def check(self) -> None:
        self._check()

    def bar(self) -> Bar:
        return lambda done, total: None

    def tell(self, progress: Mapping[str, Any]) -> None:
        self._tell(progress)

    def device_bytes(
        self, device: torch.device, limit_bytes: int | None, wanted_bytes: int, block_bytes: int = 0
    ) -> int:
        own = self._own.loaded_bytes if self._own else 0
        wanted = wanted_bytes if limit_bytes is None else min(wanted_bytes, limit_bytes)

        def free() -> int:
            return free_memory.free_bytes(device) + own - free_memory.headroom_bytes(block_bytes)

        def held() -> int:
            return sum(other.loaded_bytes for other in self._others)

        for other in self._others:
            excess = 0 if limit_bytes is None else held() + wanted - limit_bytes
            missing = max(excess, wanted - free())
            if missing > 0 and other.loaded_bytes:
                other.shrink(missing)
                free_memory.empty_cache(device)
        return max(0, free() if limit_bytes is None else min(free(), limit_bytes - held()))

    def host_bytes(self, model: Streamed, limit_bytes: int | None, wanted_bytes: int, least_bytes: int) -> int:
        free = max(self.free_ram() + model.store.held_bytes, least_bytes)
        return free if limit_bytes is None else min(free, limit_bytes)

    def free_ram(self) -> int:
        return free_memory.free_ram()

    def total_bytes(self, device: torch.device) -> int:
        return free_memory.total_bytes(device)

    def beside_bytes(self) -> int:
        return 0

    def left(self, device: torch.device) -> None:
        free_memory.empty_cache(device)
