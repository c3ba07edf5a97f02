"""How far a sampling run is, block by block: what is told of it, and how often. Shows nothing itself."""

import time
from collections.abc import Callable
from typing import Any

from ..planning.memory_plan import MemoryPlan
from .memory_watch import MemoryWatch
from .surroundings import Surroundings

SECONDS_BETWEEN_EVENTS = 0.2
# a forecast that is worth a warning: an image of the usual size takes minutes on the slowest cards
LONG_SECONDS = 2 * 3600


def warning_of(plan: MemoryPlan) -> str:
    """What is said of a run that takes LONG_SECONDS or more; empty for any other."""
    request, seconds = plan.request, plan.forecast.seconds * plan.request.computed_steps
    if seconds < LONG_SECONDS:
        return ""
    return (
        f"This run will take about {seconds / 3600:,.1f} hours ({request.width}x{request.height} px, "
        f"{request.timesteps} steps, {plan.forecast}). It can be interrupted at any time; a smaller image takes less."
    )


class RunProgress:
    """Counts passes and blocks of one run; tells each stage's first event, then at most five a second."""

    def __init__(
        self,
        surroundings: Surroundings,
        watch: MemoryWatch,
        look: Callable[[], None],
        *,
        blocks: int,
        ahead: int,
        steps: int,
        limit_bytes: int,
        plan: str,
        forecast_seconds: float,
    ) -> None:
        """`look` is called at every block, to look at the memory. `ahead`: blocks that the device has yet to do when
        this is told of the next one."""
        self._surroundings = surroundings
        self._watch = watch
        self._look = look
        self._ahead = ahead
        self._facts: dict[str, Any] = {
            "blocks": blocks,
            "steps": steps,
            "limit_bytes": limit_bytes,
            "plan": plan,
            "forecast_seconds_per_step": forecast_seconds,
        }
        self._start = time.perf_counter()
        self._sampling_start: float | None = None
        self._last = 0.0
        self._stage = ""
        self.step = 0

    def replanned(self, plan: str, limit_bytes: int, forecast_seconds: float) -> None:
        """The run goes on with another plan."""
        self._facts |= {"plan": plan, "limit_bytes": limit_bytes, "forecast_seconds_per_step": forecast_seconds}
        self._last = 0.0  # it is shown with the next block

    def modulation(self, block: int) -> None:
        self._report("modulation", block)

    def sampling(self, block: int) -> None:
        if self._sampling_start is None:
            self._sampling_start = time.perf_counter()
        self._report("sampling", block)

    def done(self) -> None:
        self._report("done", self._facts["blocks"] - 1)

    def _report(self, stage: str, block: int) -> None:
        if stage != "done":
            self._surroundings.check()
        now = time.perf_counter()
        ram = self._watch.ram()
        self._look()
        if stage == self._stage and now - self._last < SECONDS_BETWEEN_EVENTS:
            return
        self._last, self._stage = now, stage
        done = self.step + (1.0 if stage == "done" else (block - self._ahead) / self._facts["blocks"])
        sampling = now - self._sampling_start if self._sampling_start is not None else 0.0
        self._surroundings.tell(
            {
                **self._facts,
                "stage": stage,
                "step": min(self.step + 1, self._facts["steps"]),
                "block": block + 1,
                "ram_bytes": ram,
                "peak_ram_bytes": self._watch.peak_ram,
                "vram_bytes": self._watch.vram(),
                "peak_vram_bytes": self._watch.peak_vram(),
                "seconds": now - self._start,
                "seconds_per_step": sampling / done if done > 0 else 0.0,
            }
        )
