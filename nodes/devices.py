"""The devices that a person can choose for a part of the model."""

import torch

from .words import AUTO

CPU = "cpu"


def choices() -> list[str]:
    """auto, the CPU, and every accelerator of this machine by torch's name for it."""
    return [AUTO, CPU, *_accelerators()]


def device_of(choice: str, default: torch.device) -> torch.device:
    return default if choice == AUTO else torch.device(choice)


def _accelerators() -> list[str]:
    if not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator()
    if kind is None or kind.type == "mps":
        return [] if kind is None else ["mps"]
    return [f"{kind.type}:{index}" for index in range(torch.accelerator.device_count())]
