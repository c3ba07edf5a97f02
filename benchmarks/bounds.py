"""How near steps come to the longest of what they cannot do without: simulated, not measured.

    python dev.py bench bounds

Three cases of a card of 4 GB, half a GB of which is taken, in which blocks are read from the file at every step.
`seconds`: a step of today's plan, as the discrete-event model (`tools/streaming_events.py`) takes it; `forecast`: the
planner's own. `bound`: the longest of products, of copies with decoding, and of reads, each by itself, where two slots
and the smallest ring leave the most room for blocks. `small_ring`: that plan's step, in the model.
"""

from dataclasses import dataclass
from typing import Any

import torch
from qwenimage_lowvram.engine.planning.footprint import TransformerFootprint
from qwenimage_lowvram.engine.planning.forecast import Speeds
from qwenimage_lowvram.engine.planning.memory import RINGS, plan_memory
from qwenimage_lowvram.engine.planning.memory_plan import MemoryPlan
from qwenimage_lowvram.engine.planning.request import GIB, Limits, SamplingRequest
from simulated_cards import models
from streaming_events import job_of, machine_of, step_seconds

VRAM_BYTES = 7 * GIB // 2
PROMPT_TOKENS = 512


@dataclass(frozen=True)
class Case:
    """ram_gib: for held blocks and the ring."""

    weight_format: str
    side_px: int
    branches: int
    steps: int
    ram_gib: int
    speeds: Speeds

    def __str__(self) -> str:
        what = "guided" if self.branches > 1 else "Lightning"
        bus, disk = self.speeds.bus_bytes / 1e9, self.speeds.disk_bytes / 1e9
        return f"{self.side_px} {what}, {self.ram_gib} GiB of RAM, bus {bus:.0f} GB/s, disk {disk:.1f} GB/s"


CASES = (
    Case("int8", 1024, 1, 8, 2, Speeds(40e12, 12e9, 3.5e9)),
    Case("int8", 1024, 1, 8, 2, Speeds(60e12, 24e9, 7e9)),
    Case("bf16", 1328, 2, 50, 10, Speeds(60e12, 24e9, 3.5e9)),
)


def rows(quick: bool) -> list[dict[str, Any]]:
    """One for each case, quick or not."""
    return [row(case) for case in CASES]


def row(case: Case) -> dict[str, Any]:
    footprint = models(case.weight_format, torch.bfloat16).transformer
    request = SamplingRequest(case.side_px, case.side_px, case.branches, PROMPT_TOKENS, timesteps=case.steps)
    limits = Limits(VRAM_BYTES, case.ram_gib * GIB)
    plan = plan_memory(footprint, request, limits, case.speeds)
    small = plan_memory(footprint, request, limits, case.speeds, slots=(2,), rings=RINGS[:1])
    alone = small.forecast
    bound = max(alone.compute_seconds, alone.bus_seconds + alone.decode_seconds, alone.disk_seconds)
    seconds = {
        "seconds": _modelled(footprint, plan, case.speeds),
        "forecast": plan.forecast.seconds,
        "bound": bound,
        "small_ring": _modelled(footprint, small, case.speeds),
    }
    return {
        "who": case.weight_format,
        "case": str(case),
        **{name: round(value, 3) for name, value in seconds.items()},
        "slots": plan.slots,
        "ring": plan.ring,
        "stay": len(plan.resident),
        "held": len(plan.held),
        "read": plan.from_file,
    }


def _modelled(footprint: TransformerFootprint, plan: MemoryPlan, speeds: Speeds) -> float:
    return step_seconds(job_of(footprint, plan, speeds), machine_of(speeds))
