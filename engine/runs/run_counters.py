"""What a sampling run read, copied and waited for: the transformer's counters, from where the run began."""

from dataclasses import dataclass, field
from typing import Any

from ..reports.image_report import Moved
from ..streaming import Waits
from .sampling_plan import Transformer


@dataclass(frozen=True)
class _Counts:
    fetched_blocks: int
    fetched_bytes: int
    modulation_bytes: int
    copied_bytes: int


@dataclass
class RunCounters:
    """Begins to count when it is made."""

    transformer: Transformer
    _before: _Counts = field(init=False)

    def __post_init__(self) -> None:
        self._before = self._now()

    def moved(self, waited: Waits) -> Moved:
        """All bytes so far, those before the run too. `waited`: for blocks; what the modulation waited is added."""
        store, table = self.transformer.store, self.transformer.modulation
        waits = waited + table.waits
        return Moved(
            file_bytes=store.fetched_bytes + table.fetched_bytes,
            copied_bytes=store.copied_bytes + table.copied_bytes,
            disk_seconds=waits.disk_seconds,
            bus_seconds=waits.bus_seconds,
        )

    def of_run(self) -> dict[str, Any]:
        """Of this run alone, by the names of MemoryReport's fields."""
        now = self._now()
        return {name: value - getattr(self._before, name) for name, value in vars(now).items()}

    def _now(self) -> _Counts:
        store, table = self.transformer.store, self.transformer.modulation
        return _Counts(store.fetched_blocks, store.fetched_bytes, table.fetched_bytes, store.copied_bytes)
