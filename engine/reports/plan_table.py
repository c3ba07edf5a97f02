"""The plan of an image for several cards as a table of text. Imports no torch."""

from collections.abc import Sequence

from ..planning.request import GIB
from ..planning.stages import ImagePlan, Stage
from ..told import Part, Table, Told
from .charts import Card


def plan_table(cards: Sequence[Card]) -> list[Part]:
    """Two tables, and what does not fit. What a step takes on each card, then the peaks of its stages in GiB: on the
    device/in RAM. Where blocks keep what they make of prompt and images, how much that is, and for how many blocks it
    lies where."""
    seconds = ("s per step", "bound by", "first image", "another seed", "another prompt")
    keeps = any(_keeps(card.plan) for card in cards if card.plan)
    kept = ("prompt kept", "of it on card", "of it in RAM", "made anew") if keeps else ()
    rows: list[tuple[str, ...]] = [("", "format", *seconds, "stay", "in RAM", "from file", "VAE tiles", *kept)]
    rows += [_step_row(card, card.plan) for card in cards if card.plan]
    peaks = [("GiB: VRAM/RAM", "limit", *(stage.value for stage in Stage))]
    peaks += [_peak_row(card, card.plan) for card in cards if card.plan]
    refused = [
        Told("{card}: {error}", code="memory_plan.refused", card=card.name, error=card.error)
        for card in cards
        if card.error is not None
    ]
    return [Table(tuple(rows)), "", Table(tuple(peaks)), *([""] if refused else []), *refused]


def _step_row(card: Card, plan: ImagePlan) -> tuple[str, ...]:
    sampling = plan.sampling
    blocks = (len(sampling.resident), len(sampling.held), sampling.from_file, len(plan.tiles))
    forecast = sampling.forecast
    step = (f"{forecast.seconds:.1f}", forecast.bound.value)
    images = (f"{seconds:.0f} s" for seconds in (plan.seconds, plan.again_seconds, plan.prompt_seconds))
    kept = sampling.kept
    prompt: tuple[str, ...] = ()
    if _keeps(plan):
        nbytes = (kept.blocks - kept.remade) * kept.block_bytes
        prompt = (f"{nbytes / GIB:.2f} GiB", *map(str, (kept.on_device, kept.in_host, kept.remade)))
    return (card.name, card.weight_format, *step, *images, *map(str, blocks), *prompt)


def _keeps(plan: ImagePlan) -> bool:
    return plan.sampling.kept.block_bytes > 0


def _peak_row(card: Card, plan: ImagePlan) -> tuple[str, ...]:
    peaks = (f"{stage.peak_bytes / GIB:.2f}/{stage.ram_bytes / GIB:.1f}" for stage in plan.stages)
    return (card.name, f"{card.limit_bytes / GIB:.2f}", *peaks)
