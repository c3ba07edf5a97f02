"""Measured beside planned: what a run held, read and took. Values only; whoever runs, measures."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ..numerics import NUMERICS_VERSION
from ..planning.memory_plan import MemoryPlan
from ..told import Told, text_of
from .plan_facts import plan_facts


@dataclass(frozen=True)
class MemoryReport:
    """What sampling did, for the person and for bug reports.

    passes: visits of all blocks, which took pass_seconds. fetched_blocks, fetched_bytes: blocks read from the file
    during the run. copied_bytes: from host memory to the device, kept_brought_bytes of it what blocks had made of
    prompts and references, of which kept_device_bytes and kept_ram_bytes stay. made_tokens: of these, that blocks made
    it of, each counted in every block; 0 where it was kept from the run before. modulation_bytes: read to compute the
    modulation table; 0 where it was known. waited_disk_seconds, waited_bus_seconds: compute waiting for blocks that
    came from the file, and for others. pinned_bytes: of the blocks held in host memory, those that are page-locked.
    peak_vram_bytes: torch's peak on the device, None where the device is the host; further_peaks_bytes: the same of the
    plan's further devices, in their order. one_by_one: why branches ran one
    after another, empty where each block was visited once per step. out_of_memory: how many times memory ran
    out and a smaller plan was made. first_step_seconds: from the run's beginning to the end of its first pass.
    attention_notes: why torch's own kernel computed attention in place of the plan's; empty where it did not.
    compiled: as the plan's; such code was made compiled_times in this run, in compiling_seconds with the blocks that it
    was made for; compiled_error: the largest of a block that was found, beside its norm. not_compiled: why blocks were
    not, where that was asked for.
    computed_steps, predicted_steps: of a run with a step_cache; not_measured: why its table tells nothing certain of
    this run. done_steps: of `steps`, where the run was ended before its end; None: all. later_seconds: of a pass behind
    the first, in the mean; 0 where there was none.
    """

    plan: MemoryPlan
    device: str
    weight_format: str
    steps: int
    passes: int
    seconds: float
    pass_seconds: float
    fetched_blocks: int
    fetched_bytes: int
    modulation_bytes: int
    copied_bytes: int
    pinned_bytes: int
    waited_disk_seconds: float
    waited_bus_seconds: float
    peak_vram_bytes: int | None
    peak_ram_bytes: int
    one_by_one: str = ""
    out_of_memory: int = 0
    first_step_seconds: float = 0.0
    attention_notes: str = ""
    made_tokens: int = 0
    kept_device_bytes: int = 0
    kept_ram_bytes: int = 0
    kept_brought_bytes: int = 0
    compiled: str = ""
    compiled_times: int = 0
    compiling_seconds: float = 0.0
    compiled_error: float = 0.0
    not_compiled: str = ""
    computed_steps: int = 0
    predicted_steps: int = 0
    not_measured: str = ""
    done_steps: int | None = None
    later_seconds: float = 0.0
    further_peaks_bytes: tuple[int | None, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields, the plan's, both as text, the plan's facts, and which numbers the engine makes."""
        texts = {"plan_text": str(self.plan), "text": str(self)}
        facts = plan_facts(self.plan, host=self.peak_vram_bytes is None, one_by_one=self.one_by_one)
        return {**asdict(self), **texts, "facts": facts, "numerics_version": NUMERICS_VERSION}

    def __repr__(self) -> str:
        return text_of(self.parts())

    def parts(self) -> list[Told]:
        """What it says, a line each."""
        return [*self._of_every_run(), *self._of_some_runs()]

    def _of_every_run(self) -> Iterator[Told]:
        plan, run = self.plan, self.plan.run
        yield Told(
            "MemoryReport: {run} {seconds:.1f} s, the first after {first_seconds:.1f} s, {passes} passes of "
            "{pass_seconds:.2f} s on {device} (forecast {forecast_seconds:.2f} s), weights {format}",
            code="run_report.run",
            run=self._steps_told(),
            seconds=self.seconds,
            first_seconds=self.first_step_seconds,
            passes=self.passes,
            pass_seconds=self.pass_seconds / max(1, self.passes),
            device=self.device,
            forecast_seconds=plan.forecast.seconds,
            format=self.weight_format,
        )
        yield Told(
            "  forecast of the run: {first_seconds:.1f} s where its weights are read for the first time, "
            "{again_seconds:.1f} s with another seed",
            code="run_report.forecast",
            first_seconds=run.first_seconds,
            again_seconds=run.again_seconds,
        )
        yield self._device_told()
        for other, measured_bytes in zip(plan.further, self.further_peaks_bytes, strict=False):
            if measured_bytes is not None:
                yield Told(
                    "  memory of {device}: {planned_bytes} planned of {limit_bytes}, {measured_bytes} measured",
                    code="run_report.further",
                    device=other.device,
                    planned_bytes=other.peak_bytes,
                    limit_bytes=other.limit_bytes,
                    measured_bytes=measured_bytes,
                )
        yield Told(
            "  process memory: {peak_bytes} at its peak, {planned_bytes} of it planned",
            code="run_report.ram",
            peak_bytes=self.peak_ram_bytes,
            planned_bytes=plan.ram_peak_bytes,
        )
        yield Told(
            "  blocks: {resident} of {blocks} resident{held}, {fetched} read from the file ({fetched_bytes}), "
            "modulation {modulation_bytes}, {disk_seconds:.1f} s waited for the disk, {bus_seconds:.1f} s for the bus",
            code="run_report.blocks",
            resident=len(plan.resident),
            blocks=plan.blocks,
            held=self._held_told(),
            fetched=self.fetched_blocks,
            fetched_bytes=self.fetched_bytes,
            modulation_bytes=self.modulation_bytes,
            disk_seconds=self.waited_disk_seconds,
            bus_seconds=self.waited_bus_seconds,
        )

    def _steps_told(self) -> Told:
        if self.done_steps is None or self.done_steps >= self.steps:
            return Told("{steps} steps in", code="run_report.all_steps", steps=self.steps)
        return Told(
            "stopped after {done} of {steps} steps,",
            code="run_report.stopped",
            done=self.done_steps,
            steps=self.steps,
        )

    def _device_told(self) -> Told:
        if self.peak_vram_bytes is None:
            return Told(
                "  device memory: {planned_bytes} planned of {limit_bytes}, the device uses RAM",
                code="run_report.host",
                planned_bytes=self.plan.peak_bytes,
                limit_bytes=self.plan.limit_bytes,
            )
        return Told(
            "  device memory: {planned_bytes} planned of {limit_bytes}, {measured_bytes} measured",
            code="run_report.vram",
            planned_bytes=self.plan.peak_bytes,
            limit_bytes=self.plan.limit_bytes,
            measured_bytes=self.peak_vram_bytes,
        )

    def _held_told(self) -> Told | str:
        if not self.plan.held:
            return ""
        return Told(
            ", {held} in RAM ({pinned}), {copied_bytes} copied to the device",
            code="run_report.held",
            held=len(self.plan.held),
            pinned="page-locked" if self.pinned_bytes else "not page-locked",
            copied_bytes=self.copied_bytes,
        )

    def _of_some_runs(self) -> Iterator[Told]:
        request = self.plan.request
        if self.plan.kept.block_bytes:
            yield Told(
                "  prompt and references: {tokens:,.0f} tokens computed through all blocks; kept {device_bytes} on the "
                "device and {ram_bytes} in RAM, {brought_bytes} brought from there",
                code="run_report.kept",
                tokens=self.made_tokens / self.plan.blocks,
                device_bytes=self.kept_device_bytes,
                ram_bytes=self.kept_ram_bytes,
                brought_bytes=self.kept_brought_bytes,
            )
        if request.controls:
            yield Told(
                "  beside the transformer: {controls} planned, counted above",
                code="run_report.controls",
                controls=str(request.controls),
            )
        if request.step_cache is not None:
            yield Told(
                "  not exact: {computed} of {steps} steps computed, {predicted} predicted ({name}), which do not "
                "count as passes{advice}",
                code="run_report.step_cache",
                computed=self.computed_steps,
                steps=self.steps,
                predicted=self.predicted_steps,
                name=request.step_cache.name,
                advice=f"; {self.not_measured}" if self.not_measured else "",
            )
        if self.out_of_memory:
            yield Told(
                "  memory ran out {times} times; the plan above is the last",
                code="run_report.out_of_memory",
                times=self.out_of_memory,
            )
        if self.attention_notes:
            yield Told(
                "  attention partly by torch's own kernel: {why}",
                code="run_report.attention",
                why=self.attention_notes,
            )
        if self.compiled or self.compiled_times:
            yield self._compiled_told()
        if self.not_compiled:
            yield Told("  blocks not compiled: {why}", code="run_report.not_compiled", why=self.not_compiled)
        if self.one_by_one:
            yield Told(
                "  prompts ran one after another, so blocks were brought once per prompt: {one_by_one}",
                code="run_report.one_by_one",
                one_by_one=self.one_by_one,
            )

    def _compiled_told(self) -> Told:
        error: Told | str = ""
        if self.compiled_error:
            error = Told(
                "; not exact: errors of a block up to {error}",
                code="run_report.compiled_error",
                error=f"{self.compiled_error:.1g}",
            )
        return Told(
            "  compiled: {times} time{plural}, {seconds:.0f} s{error}",
            code="run_report.compiled",
            times=self.compiled_times,
            plural="" if self.compiled_times == 1 else "s",
            seconds=self.compiling_seconds,
            error=error,
        )
