"""Plan sampling on one device or several: branches divided, or blocks, whichever is faster. Imports no torch."""

from collections.abc import Sequence
from dataclasses import replace

from ..errors import DoesNotFit
from .block_split import share_out_blocks
from .branch_split import Card, plan_branches
from .footprint import TransformerFootprint
from .forecast import Speeds
from .memory import plan_memory
from .memory_plan import MemoryPlan
from .request import Limits, SamplingRequest
from .run_forecast import load_seconds


def plan_on_cards(
    footprint: TransformerFootprint,
    request: SamplingRequest,
    limits: Limits,
    speeds: Speeds,
    others: Sequence[Card],
    *,
    one_by_one: bool = False,
) -> MemoryPlan:
    """limits, speeds: of the first device. `others`: further ones. `one_by_one`: branches may not be computed at the
    same time. Raises DoesNotFit, as `plan_memory` does."""
    divided = None if one_by_one else plan_branches(footprint, request, limits, speeds, others)
    devices = [(card.device, card.limit_bytes) for card in others]
    secondaries = share_out_blocks(footprint, request, limits.vram_bytes, devices)
    try:
        together = plan_memory(footprint, request, limits, speeds, secondaries)
    except DoesNotFit:
        if divided is None:
            raise
        return divided
    if divided is not None and divided.forecast.seconds < together.forecast.seconds:
        return divided
    away = load_seconds(footprint, sum(len(secondary.blocks) for secondary in secondaries), speeds)
    return replace(together, run=replace(together.run, load_seconds=together.run.load_seconds + away))
