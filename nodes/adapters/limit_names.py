"""The limits that a person sets in the loader, by the names of its inputs."""

from ...engine.runs.limit import Limit
from ..display_names import LOADER

VRAM_LIMIT, RAM_LIMIT = "vram_limit_gb", "ram_limit_gb"


def loader_limit(limit_bytes: int | None, name: str = VRAM_LIMIT) -> Limit:
    """What was set as `name`; None for none."""
    return Limit(limit_bytes, name, f"'{LOADER}'")
