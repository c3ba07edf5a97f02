"""This machine's cards, as Memory Plan plans with one of them and with all of them."""

import comfy.model_management
import torch

from ..engine.planning.cards import left_bytes
from ..engine.planning.stages import ImageRequest
from ..engine.reports.charts import Card
from .devices import ALL_CARDS, others_of
from .planned_models import PlannedModels


def machine_cards() -> list[torch.device]:
    """Those that *all cards* would compute on, the first one first; none where there are not several."""
    first = comfy.model_management.get_torch_device()
    others = [] if first.type == "cpu" else others_of(ALL_CARDS, first)
    return [first, *others] if others else []


def only_card(headroom_bytes: int) -> tuple[int, int] | None:
    """Bytes of this machine's card, and what it leaves to a model; None without one, or with several."""
    card = comfy.model_management.get_torch_device()
    if card.type == "cpu" or machine_cards():
        return None
    return _room(card, headroom_bytes)


def cards_of_machine(
    models: PlannedModels, request: ImageRequest, limit_bytes: int | None, ram_bytes: int
) -> tuple[list[str], list[Card]]:
    """Their names, and the plans for one of them and for all; each within `limit_bytes`, None: what it has. Empty where
    there are not several."""
    cards = machine_cards()
    if not cards:
        return [], []
    (capacity, _), *_ = rooms = [_room(card, models.headroom_bytes) for card in cards]
    limits = [left if limit_bytes is None else min(limit_bytes, left) for _, left in rooms]
    first, (_, *others) = (capacity, limits[0], ram_bytes), zip(cards, limits, strict=True)
    one = models.card(request, "one card", *first)
    together = models.card(request, f"all {len(cards)} cards", *first, others)
    return list(map(str, cards)), [one, together]


def _room(card: torch.device, headroom_bytes: int) -> tuple[int, int]:
    """Bytes of a card, and what it leaves to a model."""
    capacity = int(comfy.model_management.get_total_memory(card))
    return capacity, left_bytes(capacity, headroom_bytes)
