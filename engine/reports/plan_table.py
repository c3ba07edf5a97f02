"""The plan of an image for several cards as a table of text. Imports no torch."""

from collections.abc import Sequence

from ..planning.memory_plan import MemoryPlan
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
    refused = _refused(cards)
    return [Table(tuple(rows)), "", Table(tuple(peaks)), *([""] if refused else []), *refused]


def several_cards_table(devices: Sequence[str], cards: Sequence[Card]) -> list[Part]:
    """What a step takes on the first of `devices` and on all of them, of which plans are given: what they divide, and
    the peak on each within its limit, on the first one of all stages."""
    titles = ("this machine", "format", "s per step", "bound by", "first image", "another seed", "divided")
    rows = [(*titles, *(f"{device} GiB/limit" for device in devices))]
    rows += [_row_of_several(card, card.plan, devices) for card in cards if card.plan]
    return [Table(tuple(rows)), *_refused(cards)]


def _row_of_several(card: Card, plan: ImagePlan, devices: Sequence[str]) -> tuple[str, ...]:
    sampling = plan.sampling
    divided = "prompts/images" if sampling.beside else "blocks" if sampling.secondaries else "-"
    peaks = {devices[0]: (plan.peak_bytes, plan.limits.vram_bytes)}
    peaks |= {other.device: (other.peak_bytes, other.limit_bytes) for other in sampling.further}
    cells = (f"{peaks[name][0] / GIB:.2f}/{peaks[name][1] / GIB:.2f}" if name in peaks else "-" for name in devices)
    return (card.name, card.weight_format, *_step_cells(sampling), *_image_cells(plan)[:2], divided, *cells)


def _refused(cards: Sequence[Card]) -> list[Told]:
    return [
        Told("{card}: {error}", code="memory_plan.refused", card=card.name, error=card.error)
        for card in cards
        if card.error is not None
    ]


def _step_cells(plan: MemoryPlan) -> tuple[str, str]:
    return f"{plan.forecast.seconds:.1f}", plan.forecast.bound.value


def _image_cells(plan: ImagePlan) -> tuple[str, ...]:
    """Of the first image, of another seed, of another prompt."""
    return tuple(f"{seconds:.0f} s" for seconds in (plan.seconds, plan.again_seconds, plan.prompt_seconds))


def _step_row(card: Card, plan: ImagePlan) -> tuple[str, ...]:
    sampling = plan.sampling
    blocks = (len(sampling.resident), len(sampling.held), sampling.from_file, len(plan.tiles))
    kept = sampling.kept
    prompt: tuple[str, ...] = ()
    if _keeps(plan):
        nbytes = kept.kept_bytes
        prompt = (f"{nbytes / GIB:.2f} GiB", *map(str, (kept.on_device, kept.in_host, kept.remade)))
    return (card.name, card.weight_format, *_step_cells(sampling), *_image_cells(plan), *map(str, blocks), *prompt)


def _keeps(plan: ImagePlan) -> bool:
    return plan.sampling.kept.block_bytes > 0


def _peak_row(card: Card, plan: ImagePlan) -> tuple[str, ...]:
    peaks = (f"{stage.peak_bytes / GIB:.2f}/{stage.ram_bytes / GIB:.1f}" for stage in plan.stages)
    return (card.name, f"{card.limit_bytes / GIB:.2f}", *peaks)
