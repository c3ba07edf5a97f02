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
    made_tokens: int
    kept_brought_bytes: int
    compiled_times: int
    compiling_seconds: float


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
        """Of this run alone, by the names of MemoryReport's fields; and what is kept by now."""
        now, kept = self._now(), self.transformer.store.kept
        counted = {name: value - getattr(self._before, name) for name, value in vars(now).items()}
        compiled = self.transformer.compiled
        notes = {}
        if compiled is not None:
            error = compiled.error
            notes = {"compiled": compiled.kind, "compiled_error": error, "not_compiled": compiled.why_not}
        return {**counted, **notes, "kept_device_bytes": kept.resident_bytes, "kept_ram_bytes": kept.held_bytes}

    def _now(self) -> _Counts:
        store, table, compiled = self.transformer.store, self.transformer.modulation, self.transformer.compiled
        return _Counts(
            fetched_blocks=store.fetched_blocks,
            fetched_bytes=store.fetched_bytes,
            modulation_bytes=table.fetched_bytes,
            copied_bytes=store.copied_bytes,
            made_tokens=store.kept.made_tokens,
            kept_brought_bytes=store.kept.copied_bytes,
            compiled_times=compiled.times if compiled else 0,
            compiling_seconds=compiled.seconds if compiled else 0.0,
        )
