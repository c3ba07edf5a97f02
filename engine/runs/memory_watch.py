"""What this process holds on the device and in host memory: now, and at most. Decides nothing."""

from dataclasses import dataclass, field
from typing import Any

import psutil
import torch


@dataclass
class MemoryWatch:
    """Present and peak memory of this process, in bytes. VRAM is None where the device has none of its own."""

    device: torch.device
    peak_ram: int = 0
    _earlier_vram: int = 0
    _process: psutil.Process = field(default_factory=psutil.Process)

    def start(self) -> None:
        self.peak_ram = 0
        self.begin_stage()
        self._earlier_vram = 0
        self.ram()

    def begin_stage(self) -> None:
        """From now on `stage_peak_vram` is that of another stage; `peak_vram` remembers those before."""
        if (counter := self._counter()) is not None:
            self._earlier_vram = max(self._earlier_vram, self.stage_peak_vram() or 0)
            counter.reset_peak_memory_stats(self.device)

    def ram(self) -> int:
        now: int = self._process.memory_info().rss
        self.peak_ram = max(self.peak_ram, now)
        return now

    def vram(self) -> int | None:
        counter = self._counter()
        return None if counter is None else counter.memory_allocated(self.device)

    def _counter(self) -> Any:
        """torch's module that counts this device's memory; None where it has none of its own, or nobody counts."""
        return {"cuda": torch.cuda, "xpu": torch.xpu}.get(self.device.type)

    def peak_vram(self) -> int | None:
        stage = self.stage_peak_vram()
        return None if stage is None else max(stage, self._earlier_vram)

    def stage_peak_vram(self) -> int | None:
        counter = self._counter()
        return None if counter is None else counter.max_memory_allocated(self.device)
