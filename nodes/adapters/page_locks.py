"""Page-locking through ComfyUI, where it locks pages too: its count and its limit then bound what both hold."""

import inspect
import threading
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...engine.log import logger
from ...engine.page_locks import CudaPageLocks, PageLocks


@dataclass(frozen=True)
class ComfyPageLocks:
    """ComfyUI's own functions. Before more is locked than its limit allows, it is asked to give back what its models
    hold locked and do not use. One thread at a time calls them: they count as if there were no others."""

    name: str = "ComfyUI or the system"
    turn: threading.RLock = field(default_factory=threading.RLock, compare=False)

    def has_room(self, nbytes: int) -> bool:
        if _locked_bytes() + nbytes <= _most_bytes():
            return True
        make_room = getattr(comfy.model_management, "ensure_pin_registerable", None)
        return make_room is not None and bool(make_room(nbytes))

    def lock(self, data: Tensor, device: torch.device) -> bool:
        with self.turn, torch.cuda.device(device):
            return bool(comfy.model_management.pin_memory(data))

    def unlock(self, data: Tensor, device: torch.device) -> bool:
        with self.turn, torch.cuda.device(device):
            return bool(comfy.model_management.unpin_memory(data))


def page_locks() -> PageLocks:
    """ComfyUI's where this version has them and uses them; else the driver's."""
    missing = [name for name in ("pin_memory", "unpin_memory") if not _takes_a_tensor(name)]
    missing += [name for name in ("TOTAL_PINNED_MEMORY", "MAX_PINNED_MEMORY") if not hasattr(_management(), name)]
    if missing:
        logger.debug("This ComfyUI has no %s for a tensor: pages are locked beside its count.", ", ".join(missing))
        return CudaPageLocks()
    if _most_bytes() <= 0:
        logger.debug("This ComfyUI locks no pages by itself: ours are locked without it.")
        return CudaPageLocks()
    return ComfyPageLocks()


def _takes_a_tensor(name: str) -> bool:
    """Whether the function is there, and asks for one value."""
    function = getattr(_management(), name, None)
    if function is None:
        return False
    asked = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    return len(asked) == 1


def _locked_bytes() -> int:
    return int(_management().TOTAL_PINNED_MEMORY)


def _most_bytes() -> int:
    return int(_management().MAX_PINNED_MEMORY)


def _management() -> Any:
    return comfy.model_management
