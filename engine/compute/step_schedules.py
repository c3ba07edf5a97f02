"""Which steps of a run are computed, and which are predicted from them. Tables and rules; imports no torch.

By a table, a predicted step runs no block. What would come out of the last one, the input of the network's last norm,
is extrapolated linearly in the step's number from the last two computed steps: h1 + (h1 - h0) / (n1 - n0) * (n - n1),
operation by operation in its own dtype. Predictions are never extrapolated from. (DPCache, arXiv 2602.22654, of first
order, as github.com/fractalyze/sglang, benchmark/experiments/qwen_image21_dpcache, has it.)

The tables are those of that study (schedules/dp and schedules/comparator, `full_steps`): the best of each length for
ten prompts, found by dynamic programming. It measured LPIPS against the same runs with every step computed, of 20
images: 0.008 in the mean and 0.035 at worst for 20 steps, 0.085 and 0.22 for 12 (counts of things and lettering
change); nothing for 28.

By the first block's rule, each step runs block 0. Where what that block adds to a branch's image differs, in the mean
of absolute numbers, by less than a threshold of what it added when that was computed last, the other blocks are taken
to add what they added then; of the branches of one image, all or none. (The rule of First Block Cache, ParaAttention;
as the comparison is always with a computed step, small changes add up.)
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Protocol

from ..errors import InvalidRequest

OFF = "off"
# of which a prediction by a table is made
ANCHORS = 2


@dataclass(frozen=True)
class Measured:
    """The runs that a table was found and measured on: unguided, in bf16, on the reference's noise schedule."""

    model: str
    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.model}, {self.width}x{self.height}, without guidance"


class Sampled(Protocol):
    """What is asked of a run; fields as in SamplingRequest."""

    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def branches(self) -> int: ...
    @property
    def reference_tokens(self) -> int: ...


class StepCache(ABC):
    """A way to leave steps out. kept: of each branch, how many tensors like its image's tokens stay on the device."""

    name: str
    kept: ClassVar[int]

    @abstractmethod
    def require_steps(self, steps: int) -> None:
        """Raise InvalidRequest for a run of so many steps, where it says nothing about them."""

    @abstractmethod
    def most_computed(self, steps: int) -> int:
        """How many of so many steps are computed, or may be."""

    @abstractmethod
    def not_measured(self, model: str, request: Sampled) -> str:
        """What is said of a run that nobody has measured; empty for any other."""


@dataclass(frozen=True)
class StepSchedule(StepCache):
    """A table. computed: the numbers, from 0, of those of `steps` steps that are computed. measured: for which runs."""

    kept = ANCHORS

    name: str
    steps: int
    computed: tuple[int, ...]
    measured: Measured

    def require_steps(self, steps: int) -> None:
        if steps != self.steps:
            raise InvalidRequest(
                "step_cache {name} is a table for runs of {table_steps} steps; this run has {steps}.\n\nWhat to do: "
                "set steps to {table_steps}, or step_cache to off.",
                code="plan.steps_of_other_table",
                name=self.name,
                table_steps=self.steps,
                steps=steps,
            )

    def most_computed(self, steps: int) -> int:
        return len(self.computed)

    def not_measured(self, model: str, request: Sampled) -> str:
        measured = self.measured
        size = (request.width, request.height, request.branches, request.reference_tokens)
        if (model, *size) == (measured.model, measured.width, measured.height, 1, 0):
            return ""
        return (
            f"{self.name} was measured only on {measured}; this run is {model}, {request}: nobody has measured how "
            "far its image is from the one with all steps."
        )

    def __str__(self) -> str:
        return f"{len(self.computed)} of {self.steps} steps computed, the others predicted ({self.name})"


@dataclass(frozen=True)
class FirstBlockRule(StepCache):
    """threshold: of the relative change of what block 0 adds, from which on a step is computed."""

    kept = 3  # what block 0 added and what the others did, and what block 0 adds now

    threshold: float
    name: str = "first_block"

    def require_steps(self, steps: int) -> None:
        """It decides about each step when its first block has run."""

    def most_computed(self, steps: int) -> int:
        return steps

    def not_measured(self, model: str, request: Sampled) -> str:
        return (
            f"How many steps {self.name} leaves out is not known before the run, and nobody has measured with {model} "
            "how far the image is from the one with all steps."
        )

    def __str__(self) -> str:
        return (
            f"steps end after block 0 if what it adds has changed by less than {self.threshold} ({self.name}), the "
            "forecast counts every step in full, and the CPU waits for the device once per step"
        )


_STUDY = Measured("Qwen-Image-2.1", 1024, 1024)

# by the names that a person chooses
STEP_SCHEDULES: Mapping[str, StepSchedule] = MappingProxyType(
    {
        schedule.name: schedule
        for schedule in (
            StepSchedule("planned_28", 40, (*range(14), *range(15, 38, 2), 38, 39), _STUDY),
            StepSchedule("planned_20", 40, (*range(8), 9, 11, 14, 17, 20, 23, 27, 31, 34, 36, 38, 39), _STUDY),
            StepSchedule("planned_12", 40, (0, 1, 2, 4, 6, 9, 13, 18, 23, 29, 34, 38), _STUDY),
        )
    }
)
FIRST_BLOCK = FirstBlockRule(0.1)
STEP_CACHES = (OFF, *STEP_SCHEDULES, FIRST_BLOCK.name)


def step_cache_of(name: str | StepCache) -> StepCache | None:
    """Of one of STEP_CACHES, or one's own; None where every step is computed. Raises InvalidRequest for other names."""
    if isinstance(name, StepCache):
        return name
    if name not in STEP_CACHES:
        raise InvalidRequest(
            "step_cache is {name!r}; it must be one of {choices}.",
            code="run.wrong_step_cache",
            name=str(name),
            choices=list(STEP_CACHES),
        )
    return FIRST_BLOCK if name == FIRST_BLOCK.name else STEP_SCHEDULES.get(name)
