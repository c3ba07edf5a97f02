"""The devices that a person can choose for a part of the model."""

from dataclasses import replace

import torch

from ..engine.hardware import Hardware
from .adapters.page_locks import page_locks
from .adapters.switches import may_pin
from .display_names import AUTO

CPU = "cpu"
ALL_CARDS = "all cards"


def choices() -> list[str]:
    """auto, the CPU, and every accelerator of this machine by torch's name for it."""
    return [AUTO, CPU, *_accelerators()]


def choices_for_blocks() -> list[str]:
    """As `choices`; where there are several accelerators, also all of them together."""
    return [*choices(), *([ALL_CARDS] if len(_accelerators()) > 1 else [])]


def others_of(choice: str, first: torch.device) -> list[torch.device]:
    """The accelerators that blocks may stay on besides the first one."""
    if choice != ALL_CARDS:
        return []
    return [torch.device(name) for name in _accelerators() if torch.device(name) != first]


def device_of(choice: str, default: torch.device) -> torch.device:
    return default if choice in (AUTO, ALL_CARDS) else torch.device(choice)


def hardware_of(device: torch.device) -> Hardware:
    """The device as ComfyUI's switches let it be used."""
    hardware = Hardware.detect(device)
    if not may_pin():
        return replace(hardware, pinned=False, pinned_limit_bytes=0)
    return replace(hardware, page_locks=page_locks()) if hardware.pinned else hardware


def _accelerators() -> list[str]:
    if not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator()
    if kind is None or kind.type == "mps":
        return [] if kind is None else ["mps"]
    return [f"{kind.type}:{index}" for index in range(torch.accelerator.device_count())]
