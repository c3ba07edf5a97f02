"""Every stage of an image, measured beside planned. Values only; whoever runs, measures. Imports no torch."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..numerics import NUMERICS_VERSION
from ..planning.request import Limits
from ..planning.stages import Stage, StagePlan
from ..texts import size_text
from ..told import Part, Table, Told, text_of
from .memory_report import MemoryReport

COLUMNS = (
    "stage",
    "forecast",
    "seconds",
    "VRAM planned",
    "measured",
    "RAM planned",
    "grown",
    "from files",
    "over the bus",
)


@dataclass(frozen=True)
class Moved:
    """file_bytes: read from files; copied_bytes: from host memory to the device; seconds that compute stood still for
    weights from a file (disk), and for others (bus)."""

    file_bytes: int = 0
    copied_bytes: int = 0
    disk_seconds: float = 0.0
    bus_seconds: float = 0.0

    def __add__(self, other: "Moved") -> "Moved":
        return Moved(
            self.file_bytes + other.file_bytes,
            self.copied_bytes + other.copied_bytes,
            self.disk_seconds + other.disk_seconds,
            self.bus_seconds + other.bus_seconds,
        )

    def __sub__(self, other: "Moved") -> "Moved":
        return Moved(
            self.file_bytes - other.file_bytes,
            self.copied_bytes - other.copied_bytes,
            self.disk_seconds - other.disk_seconds,
            self.bus_seconds - other.bus_seconds,
        )


@dataclass(frozen=True)
class Sample:
    """Memory at one moment of a stage. vram_bytes: allocated on the device, None where that is the host. ram_bytes: of
    the whole process."""

    seconds: float
    vram_bytes: int | None
    ram_bytes: int
    stage: Stage


@dataclass(frozen=True)
class StageReport:
    """What one stage did.

    vram_bytes: torch's peak on the device, None where that is the host; vram_beside_bytes: what lay there before and
    is no part of the plan. ram_bytes: the process at its peak; ram_before_bytes: before the first stage. attempts: 2
    and more after memory ran out, or a number overflowed.
    """

    stage: Stage
    plan: StagePlan | None
    start_seconds: float
    seconds: float
    vram_bytes: int | None
    vram_beside_bytes: int
    ram_bytes: int
    ram_before_bytes: int
    moved: Moved = Moved()
    attempts: int = 1

    @property
    def ram_grown_bytes(self) -> int:
        return max(0, self.ram_bytes - self.ram_before_bytes)

    def as_dict(self) -> dict[str, Any]:
        plan = None if self.plan is None else self.plan.as_dict()
        grown = {"ram_grown_bytes": self.ram_grown_bytes}
        return {**asdict(self), "stage": self.stage.value, "plan": plan, **grown}


@dataclass(frozen=True)
class ImageReport:
    """The stages that ran, in their order; `sampling` is the last sampler's own report, None where none ran.

    `limits`: what the stages were allowed, None where no plan was made. `machine`: what a bug report has to say.
    """

    stages: tuple[StageReport, ...]
    sampling: MemoryReport | None = None
    machine: Mapping[str, str] = field(default_factory=dict)

    @property
    def limits(self) -> Limits | None:
        return None if self.sampling is None else self.sampling.plan.limits

    @property
    def moved(self) -> Moved:
        return sum((stage.moved for stage in self.stages), Moved())

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "numerics_version": NUMERICS_VERSION,
            "machine": dict(self.machine),
            "stages": [stage.as_dict() for stage in self.stages],
            "seconds": self.seconds,
            "moved": asdict(self.moved),
            "sampling": None if self.sampling is None else self.sampling.as_dict(),
        }

    def __str__(self) -> str:
        return text_of(self.parts())

    def parts(self) -> list[Part]:
        """What it says: a table of the stages, sentences, and what sampling's own report says."""
        sampling: list[Part] = [] if self.sampling is None else ["", *self.sampling.parts()]
        return [Table((COLUMNS, *map(_row, self.stages))), "", *self._sentences(), *sampling]

    def _sentences(self) -> Iterator[Told]:
        moved = self.moved
        yield Told(
            "{seconds:.1f} s, {file_bytes} read from files, {copied_bytes} copied over the bus; waited "
            "{disk_seconds:.1f} s for the disk and {bus_seconds:.1f} s for the bus",
            code="memory_report.together",
            seconds=self.seconds,
            file_bytes=moved.file_bytes,
            copied_bytes=moved.copied_bytes,
            disk_seconds=moved.disk_seconds,
            bus_seconds=moved.bus_seconds,
        )
        beside = max((stage.vram_beside_bytes for stage in self.stages), default=0)
        if beside:
            yield Told(
                "VRAM planned counts up to {beside_bytes} of other models that stayed on the device.",
                code="memory_report.beside",
                beside_bytes=beside,
            )
        for stage in self.stages:
            if stage.attempts > 1:
                yield Told(
                    "{stage}: {attempts} attempts, because memory ran out or a number overflowed",
                    code="memory_report.attempts",
                    stage=stage.stage.value,
                    attempts=stage.attempts,
                )
        missing = [stage.value for stage in Stage if stage not in {report.stage for report in self.stages}]
        if missing:
            yield Told(
                "not run, because the result was already known or another node did it: {stages}",
                code="memory_report.not_run",
                stages=missing,
            )


def _row(report: StageReport) -> tuple[str, ...]:
    plan = report.plan
    own = report.vram_bytes is not None
    return (
        report.stage.value,
        _forecast(plan),
        f"{report.seconds:.1f}",
        size_text(plan.peak_bytes + report.vram_beside_bytes) if plan and own else "-",
        size_text(report.vram_bytes) if report.vram_bytes is not None else "-",
        size_text(plan.ram_bytes) if plan else "-",
        size_text(report.ram_grown_bytes),
        size_text(report.moved.file_bytes),
        size_text(report.moved.copied_bytes),
    )


def _forecast(plan: StagePlan | None) -> str:
    """Seconds of the first image, and of another seed."""
    if plan is None or plan.seconds is None:
        return "-"
    return f"{plan.seconds:.1f} s, then {plan.again_seconds or 0.0:.1f} s"
