"""Steps of a run that are predicted from computed ones, by a table. Holds what they are predicted from."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..compute.step_schedules import ANCHORS, StepSchedule
from ..errors import Unsupported
from .passes import Passes


@dataclass
class _Past:
    """Of one branch. anchors: (step, tokens behind the last block) of computed steps, the last ANCHORS of them."""

    step: int = -1
    anchors: list[tuple[int, Tensor]] = field(default_factory=list)


class StepPredictions:
    """Of one run, whose `timesteps` are those of its steps in their order.

    Branches are told from each other by keys, the same in every step. Each is predicted from its own past: one that
    begins late is computed until there is enough. What was done counts once it is told (`done`): a pass that fails is
    made again from the same past.
    """

    def __init__(self, schedule: StepSchedule, timesteps: Sequence[float]) -> None:
        self._schedule = schedule
        self._timesteps = list(timesteps)
        self._steps = {timestep: step for step, timestep in enumerate(timesteps)}
        self._past: dict[Hashable, _Past] = {}
        self._computed: set[int] = set()
        self._predicted: set[int] = set()
        self.computed_timesteps = [timesteps[step] for step in schedule.computed]

    def answers(self, passes: Passes, branches: Sequence[Any], keys: Sequence[Hashable]) -> list[Tensor]:
        """What the model answers to each branch, computed or predicted. Raises what `predict` does."""
        hidden = self.predict(keys, passes.timestep)
        known = [i for i, tokens in enumerate(hidden) if tokens is not None]
        wanted = [i for i, tokens in enumerate(hidden) if tokens is None]
        made: dict[int, Tensor] = {}
        if known:
            told = [tokens for tokens in hidden if tokens is not None]
            made.update(zip(known, passes.answers_of([branches[i] for i in known], told), strict=True))
        behind: list[Tensor] = []
        if wanted:
            more = passes.timestep > min(self.computed_timesteps, default=0.0)
            computed = passes.compute([branches[i] for i in wanted], more=more, keep=behind.extend)
            made.update(zip(wanted, computed, strict=True))
        else:
            passes.ended_early()  # before it counts
        self.done(passes.timestep, dict(zip((keys[i] for i in wanted), behind, strict=True)), [keys[i] for i in known])
        return [made[i] for i in range(len(branches))]

    @property
    def computed_steps(self) -> int:
        """How many were, for all branches or for some."""
        return len(self._computed)

    @property
    def predicted_steps(self) -> int:
        """How many were, for all branches."""
        return len(self._predicted - self._computed)

    def predict(self, keys: Sequence[Hashable], timestep: float) -> list[Tensor | None]:
        """Of each branch what would come out of the last block; None for one that is to be computed.

        Raises Unsupported for a timestep that is none of the run's, and for one that is not behind the branch's last:
        the sampler's steps are not the table's.
        """
        step, pasts = self._step_of(timestep), [self._past.get(key, _Past()) for key in keys]
        if step is None or any(step <= past.step for past in pasts):
            raise Unsupported(
                "step_cache {name} needs a sampler that takes each step of the schedule once and in order; this one "
                "asked for timestep {timestep} out of order.\n\nWhat to do: use a sampler with one evaluation per "
                "step (euler, dpmpp_2m, res_multistep), or set step_cache to off.",
                code="run.step_out_of_turn",
                name=self._schedule.name,
                timestep=timestep,
            )
        if step in self._schedule.computed:
            return [None] * len(keys)
        return [_extrapolated(past.anchors, step) if len(past.anchors) == ANCHORS else None for past in pasts]

    def done(self, timestep: float, computed: Mapping[Hashable, Tensor], predicted: Iterable[Hashable]) -> None:
        """`computed`: the branches that came through the blocks, with what was behind the last one."""
        step, predicted = self._step_of(timestep), list(predicted)
        assert step is not None
        if computed:
            self._computed.add(step)
        if predicted:
            self._predicted.add(step)
        for key in (*computed, *predicted):
            self._past.setdefault(key, _Past()).step = step
        for key, hidden in computed.items():
            past = self._past[key]
            past.anchors = [*past.anchors, (step, hidden)][-ANCHORS:]

    def _step_of(self, timestep: float) -> int | None:
        """Some samplers begin a little behind the schedule's first timestep, where nothing is infinite."""
        first = self._timesteps[:2]
        if len(first) == 2 and first[0] > timestep > first[1] and not self._computed - {0}:
            return 0
        return self._steps.get(timestep)

    def clear(self) -> None:
        """Give back what lies on the device."""
        self._past.clear()


def _extrapolated(anchors: Sequence[tuple[int, Tensor]], step: int) -> Tensor:
    """On the line through both anchors (`step_schedules`), in their dtype."""
    (first_step, first), (last_step, last) = anchors
    return (last - first).div_(last_step - first_step).mul_(step - last_step).add_(last)
