"""How far a sampling run is, block by block: what is told of it, and how often. Shows nothing itself."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..planning.memory_plan import MemoryPlan
from ..planning.run_forecast import RunForecast
from .memory_watch import MemoryWatch
from .phases import Phase, Pulse
from .surroundings import Surroundings
from .time_left import TimeLeft

# a forecast that is worth a warning: an image of the usual size takes minutes on the slowest cards
LONG_SECONDS = 2 * 3600
# of a timestep, as fp32 has it
_CLOSE = 1e-6


def warning_of(plan: MemoryPlan) -> str:
    """What is said of a run that takes LONG_SECONDS or more; empty for any other."""
    request, seconds = plan.request, plan.forecast.seconds * plan.request.computed_steps
    if seconds < LONG_SECONDS:
        return ""
    return (
        f"This run will take about {seconds / 3600:,.1f} hours ({request.width}x{request.height} px, "
        f"{request.timesteps} steps, {plan.forecast}). It can be interrupted at any time; a smaller image takes less."
    )


@dataclass(frozen=True)
class ShownPlan:
    """text: of the plan with all that is told beside it. facts: its numbers, as `plan_facts` has them."""

    text: str
    facts: dict[str, Any]
    forecast: RunForecast


class RunProgress:
    """Counts steps, passes and blocks of one run, moves the program's bar at each block, and tells each stage's first
    event, then at most four a second.

    An event has the stage; `done` of `total` blocks, while they are loaded or read, or `step` of `steps` and `block` of
    `blocks`, while they are sampled; `share` of the stage, 0 to 1, which never falls; the memory; seconds since the
    run began (`seconds`), of a measured step (`seconds_per_step`, None before there is one), and until the run's end
    (`seconds_left`, by the forecast before there is one); the plan's numbers (`facts`), and with the first event of a
    stage and of another plan its text (`plan`).
    """

    def __init__(
        self,
        surroundings: Surroundings,
        watch: MemoryWatch,
        look: Callable[[], None],
        held: Callable[[], int],
        *,
        blocks: int,
        ahead: int,
        steps: int,
        passes: int,
        plan: ShownPlan,
    ) -> None:
        """`look` is called at every block, to look at the memory; `held` tells what the model holds in host memory.
        `ahead`: blocks that the device has yet to do when this is told of the next one. `passes`: over the blocks, in
        a step, as far as that is known before the first one."""
        self._surroundings, self._watch, self._look, self._held = surroundings, watch, look, held
        self._bar, self._pulse = surroundings.bar(), Pulse()
        self._blocks, self._ahead, self._steps = blocks, ahead, steps
        self._plan, self._told_plan = plan, ""
        self._left = TimeLeft(plan.forecast, steps)
        self._start = time.perf_counter()
        self._sampling_start: float | None = None
        self._timesteps: Sequence[float] = ()
        self._step = self._pass = 0
        self._passes = max(1, passes)
        self._evaluated = False
        self._share = 0.0

    @property
    def done_steps(self) -> int:
        return min(self._steps, self._step + self._evaluated)

    def replanned(self, plan: ShownPlan) -> None:
        """The run goes on with another plan; it is shown with the next block."""
        self._plan = plan
        self._left.replanned(plan.forecast)
        self._pulse = Pulse()

    def begins(self, timesteps: Sequence[float]) -> None:
        """Of the run's steps, in their order."""
        self._timesteps = timesteps

    def loading(self, done: int, total: int) -> None:
        """So many blocks have come to stay on the device."""
        if total:
            self._left.reads()
            left = self._left.of_all(1 - done / total, 1.0)
            self._report(Phase.LOADING, {"done": done, "total": total}, done / total, left)

    def modulation(self, block: int) -> None:
        """Before the weights of this block are read, which are read once."""
        self._left.reads()
        part = block / self._blocks
        counts = {"done": block, "total": self._blocks}
        self._report(Phase.MODULATION, counts, part, self._left.of_all(0.0, 1 - part))

    def evaluation(self, timestep: float) -> None:
        """The model is asked for its answers at a timestep: in a step of the schedule, or between two."""
        later = sum(other >= timestep - _CLOSE for other in self._timesteps)
        step = min(self._steps - 1, max(0, later - 1))
        if step > self._step:
            if self._sampling_start is not None:
                seconds = time.perf_counter() - self._sampling_start
                for _ in range(step - self._step):
                    self._left.step_ended(seconds)
            self._passes = self._pass + 1
            self._step, self._pass = step, 0
        elif self._evaluated:
            self._pass += 1
        self._evaluated = False

    def evaluated(self) -> None:
        """It has answered."""
        self._evaluated = True

    def sampling(self, block: int) -> None:
        """Before the block runs, in the present evaluation."""
        if self._sampling_start is None:
            self._sampling_start = time.perf_counter()
            self._share = 0.0
        part = (self._pass + block / self._blocks) / max(self._passes, self._pass + 1)
        behind = (self._pass + (block - self._ahead) / self._blocks) / max(self._passes, self._pass + 1)
        counts = {"step": self._step + 1, "steps": self._steps, "block": block + 1, "blocks": self._blocks}
        self._report(Phase.SAMPLING, counts, (self._step + part) / self._steps, self._left.of_steps(behind))

    def done(self) -> None:
        self._step, self._evaluated = self._steps - 1, True
        self._end("done")

    def stopped(self) -> None:
        """By an error, or by a person."""
        self._end("stopped")

    def _end(self, stage: str) -> None:
        counts = {"step": self.done_steps, "steps": self._steps, "block": self._blocks, "blocks": self._blocks}
        self._tell(stage, counts, 1.0 if stage == "done" else self._share, 0.0)

    def _report(self, phase: Phase, counts: dict[str, int], share: float, left: float) -> None:
        self._surroundings.check()
        self._watch.ram()
        self._look()
        if phase.value != self._pulse.what:
            self._share = 0.0
        self._share = max(self._share, share)
        parts = self._steps * self._passes * self._blocks if phase is Phase.SAMPLING else counts["total"]
        self._bar(round(self._share * parts), parts)
        if self._pulse.beats(phase.value):
            self._tell(phase.value, counts, self._share, left)

    def _tell(self, stage: str, counts: dict[str, int], share: float, left: float) -> None:
        plan = self._plan
        changed = f"{stage} {plan.text}" != self._told_plan
        self._told_plan = f"{stage} {plan.text}"
        self._surroundings.tell(
            {
                "stage": stage,
                **counts,
                "share": share,
                "ram_bytes": self._watch.ram(),
                "peak_ram_bytes": self._watch.peak_ram,
                "held_bytes": self._held(),
                "vram_bytes": self._watch.vram(),
                "peak_vram_bytes": self._watch.peak_vram(),
                "seconds": time.perf_counter() - self._start,
                "seconds_per_step": self._left.step_seconds,
                "seconds_left": left,
                "facts": plan.facts,
                **({"plan": plan.text} if changed else {}),
            }
        )
