"""Measured beside planned: what a run held, read and took. Values only; whoever runs, measures."""

from dataclasses import asdict, dataclass
from typing import Any

from ..numerics import NUMERICS_VERSION
from ..planning.memory_plan import MemoryPlan
from ..texts import size_text
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
    peak_vram_bytes: torch's peak on the device, None where the device is the host. one_by_one: why branches ran one
    after another, empty where each block was visited once per step. out_of_memory: how many times memory ran
    out and a smaller plan was made. first_step_seconds: from the run's beginning to the end of its first pass.
    attention_notes: why torch's own kernel computed attention in place of the plan's; empty where it did not.
    compiled: as the plan's; such code was made compiled_times in this run, in compiling_seconds with the blocks that it
    was made for; compiled_error: the largest of a block that was found, beside its norm. not_compiled: why blocks were
    not, where that was asked for.
    computed_steps, predicted_steps: of a run with a step_cache; not_measured: why its table tells nothing certain of
    this run. done_steps: of `steps`, where the run was ended before its end; None: all.
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

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields, the plan's, both as text, the plan's facts, and which numbers the engine makes."""
        texts = {"plan_text": str(self.plan), "text": str(self)}
        facts = plan_facts(self.plan, host=self.peak_vram_bytes is None, one_by_one=self.one_by_one)
        return {**asdict(self), **texts, "facts": facts, "numerics_version": NUMERICS_VERSION}

    def __repr__(self) -> str:
        vram = (
            "the device is the host" if self.peak_vram_bytes is None else f"{size_text(self.peak_vram_bytes)} measured"
        )
        step = self.pass_seconds / max(1, self.passes)
        held = ""
        if self.plan.held:
            pinned = "page-locked" if self.pinned_bytes else "not page-locked"
            held = f", {len(self.plan.held)} in RAM ({pinned}), {size_text(self.copied_bytes)} copied to the device"
        run = self.plan.run
        stopped = self.done_steps is not None and self.done_steps < self.steps
        steps = f"stopped after {self.done_steps} of {self.steps} steps," if stopped else f"{self.steps} steps in"
        lines = [
            f"MemoryReport: {steps} {self.seconds:.1f} s, the first after {self.first_step_seconds:.1f} "
            f"s, {self.passes} passes of {step:.2f} s on {self.device} (forecast {self.plan.forecast.seconds:.2f} s), "
            f"weights {self.weight_format}",
            f"  forecast of the run: {run.first_seconds:.1f} s where its weights are read for the first time, "
            f"{run.again_seconds:.1f} s with another seed",
            f"  device memory: {size_text(self.plan.peak_bytes)} planned of {size_text(self.plan.limit_bytes)}, {vram}",
            f"  process memory: {size_text(self.peak_ram_bytes)} at its peak, {size_text(self.plan.ram_peak_bytes)} of "
            "it planned",
            f"  blocks: {len(self.plan.resident)} of {self.plan.blocks} resident{held}, {self.fetched_blocks} read "
            f"from the file ({size_text(self.fetched_bytes)}), modulation {size_text(self.modulation_bytes)}, "
            f"{self.waited_disk_seconds:.1f} s waited for the disk, {self.waited_bus_seconds:.1f} s for the bus",
        ]
        if self.plan.kept.block_bytes:
            lines.append(
                f"  prompt and references: {self.made_tokens / self.plan.blocks:,.0f} tokens computed through all "
                f"blocks; kept {size_text(self.kept_device_bytes)} on the device and {size_text(self.kept_ram_bytes)} "
                f"in RAM, {size_text(self.kept_brought_bytes)} brought from there"
            )
        if self.plan.request.controls:
            lines.append(f"  beside the transformer: {self.plan.request.controls} planned, counted above")
        if self.plan.request.step_cache is not None:
            note = f"; {self.not_measured}" if self.not_measured else ""
            lines.append(
                f"  not exact: {self.computed_steps} of {self.steps} steps computed, {self.predicted_steps} predicted "
                f"({self.plan.request.step_cache.name}), which no pass is counted for{note}"
            )
        if self.out_of_memory:
            lines.append(f"  memory ran out {self.out_of_memory} times; the plan above is the last")
        if self.attention_notes:
            lines.append(f"  attention partly by torch's own kernel: {self.attention_notes}")
        if self.compiled or self.compiled_times:
            times = f"{self.compiled_times} time{'' if self.compiled_times == 1 else 's'}"
            error = f"; not exact: errors of a block up to {self.compiled_error:.1g}" if self.compiled_error else ""
            lines.append(f"  compiled: {times}, {self.compiling_seconds:.0f} s{error}")
        if self.not_compiled:
            lines.append(f"  blocks not compiled: {self.not_compiled}")
        if self.one_by_one:
            lines.append(f"  prompts ran one after another, each block was visited for each: {self.one_by_one}")
        return "\n".join(lines)
