"""Measured beside planned: what a run held, read and took. Values only; whoever runs, measures."""

from dataclasses import asdict, dataclass
from typing import Any

from .plan import MemoryPlan, size_text


@dataclass(frozen=True)
class MemoryReport:
    """What sampling did, for the person and for bug reports.

    passes: visits of all blocks. fetched_blocks, fetched_bytes: blocks read from the file during the run.
    modulation_bytes: read to compute the modulation table; 0 where it was known. waited_seconds: compute waiting for
    reads. peak_vram_bytes: torch's peak on the device, None where the device is the host. one_by_one: why branches
    ran one after another, empty where each block was visited once per step.
    """

    plan: MemoryPlan
    device: str
    weight_format: str
    steps: int
    passes: int
    seconds: float
    fetched_blocks: int
    fetched_bytes: int
    modulation_bytes: int
    waited_seconds: float
    peak_vram_bytes: int | None
    peak_ram_bytes: int
    one_by_one: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields, the plan's, and both as text."""
        return {**asdict(self), "plan_text": str(self.plan), "text": str(self)}

    def __repr__(self) -> str:
        vram = (
            "the device is the host" if self.peak_vram_bytes is None else f"{size_text(self.peak_vram_bytes)} measured"
        )
        lines = [
            f"MemoryReport: {self.steps} steps in {self.seconds:.1f} s ({self.seconds / max(1, self.steps):.2f} "
            f"s/step), {self.passes} passes on {self.device}, weights {self.weight_format}",
            f"  device memory: {size_text(self.plan.peak_bytes)} planned of {size_text(self.plan.limit_bytes)}, {vram}",
            f"  process memory: {size_text(self.peak_ram_bytes)} at its peak",
            f"  blocks: {len(self.plan.resident)} of {self.plan.blocks} resident, {self.fetched_blocks} fetched "
            f"({size_text(self.fetched_bytes)}), modulation {size_text(self.modulation_bytes)}, "
            f"{self.waited_seconds:.1f} s waited",
        ]
        if self.one_by_one:
            lines.append(f"  prompts ran one after another, each block was visited for each: {self.one_by_one}")
        return "\n".join(lines)
