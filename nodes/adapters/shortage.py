"""Say which limit is short where something does not fit: one that a person set, or what is free. Plans nothing."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ...engine.errors import DoesNotFit
from ...engine.planning.request import size_text
from ..display_names import LOADER

VRAM_LIMIT, RAM_LIMIT = "vram_limit_gb", "ram_limit_gb"


@contextmanager
def naming_limit(
    device: torch.device, limit_bytes: int | None, budget_bytes: int, name: str = VRAM_LIMIT
) -> Iterator[None]:
    """What does not fit within says of which limit it is short. limit_bytes: that a person set as `name`, None for
    none; budget_bytes: what came of it, which is less where so much is not free."""
    try:
        yield
    except DoesNotFit as error:
        raise DoesNotFit(f"{error}\n{_sentence(device, limit_bytes, budget_bytes, name)}") from error


def _sentence(device: torch.device, limit_bytes: int | None, budget_bytes: int, name: str) -> str:
    if limit_bytes is None:
        return f"No limit is set: {size_text(budget_bytes)} are free on {device}. Close other programs that use it."
    if budget_bytes < limit_bytes:
        return (
            f"Of {name} ({size_text(limit_bytes)}), {size_text(budget_bytes)} are free on {device}: other programs or "
            "models use the rest."
        )
    return f"The limit is {name} in '{LOADER}'."
