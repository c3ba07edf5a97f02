"""How much memory a stage may use: the person's limits, what is free, and what our own models hold."""

import weakref
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.model_patcher
import psutil
import torch

from ...engine.transformer.model import QwenImageTransformer
from ...engine.vae import ImageVAE
from .patcher import LowVRAMPatcher

# of what is free: fragments of torch's allocator, cuBLAS, cuDNN and attention workspaces
HEADROOM_BYTES = 384 * 1024**2
# of free RAM, for the system, its page cache and other programs; ComfyUI empties its caches of outputs when a tenth of
# RAM (at least 2 GiB, at most 10) is no longer free, and this stays clear of that
RAM_HEADROOM_BYTES = 3_500 * 1024**2
RAM_HEADROOM_PART = 0.15
RAM_HEADROOM_MOST = 11_500 * 1024**2

# who may hold blocks in host memory; a model that is let go of is not kept here
_holders: weakref.WeakSet[QwenImageTransformer] = weakref.WeakSet()


def stage_bytes(
    device: torch.device,
    limit_bytes: int | None,
    wanted_bytes: int,
    *,
    reused: comfy.model_patcher.ModelPatcher | None = None,
    beside: Sequence[comfy.model_patcher.ModelPatcher] = (),
) -> int:
    """What a stage may hold on `device`, at most `limit_bytes` (None: what is free) with all that is ours there.

    Whatever lies in the way of `wanted_bytes` is asked to leave first: other models through ComfyUI, and resident
    blocks of ours, which come back when their turn comes. `reused` is the model that the stage itself
    works with, and `beside` are other people's that it needs as well: they stay, and count as part of the stage.
    """
    management = comfy.model_management
    wanted = wanted_bytes if limit_bytes is None else min(wanted_bytes, limit_bytes)
    there = [loaded for loaded in management.current_loaded_models if loaded.device == device]
    own = [*beside, *([] if reused is None else [reused])]
    kept = [loaded for loaded in there if any(patcher.is_clone(loaded.model) for patcher in own)]
    others = [loaded for loaded in there if _is_ours(loaded.model) and loaded not in kept]
    held = sum(loaded.model_loaded_memory() for loaded in kept)
    if device.type != "cpu":  # as ComfyUI does: what lies in RAM is not asked to leave
        management.free_memory(wanted + HEADROOM_BYTES - held, device, keep_loaded=kept)
    free = int(management.get_free_memory(device)) + held - HEADROOM_BYTES
    if limit_bytes is None:
        return max(0, free)
    for loaded in others:
        excess = _held(others) + wanted - limit_bytes
        if excess > 0:
            _ask_away(loaded.model, excess)
    return max(0, min(free, limit_bytes - _held(others)))


def _is_ours(patcher: Any) -> bool:
    return isinstance(patcher, LowVRAMPatcher) or isinstance(getattr(patcher, "model", None), ImageVAE)


def _ask_away(patcher: Any, nbytes: int) -> None:
    if isinstance(patcher, LowVRAMPatcher):
        patcher.partially_unload(patcher.offload_device, nbytes)
    else:
        patcher.detach()


def _held(models: list[comfy.model_management.LoadedModel]) -> int:
    return sum(loaded.model_loaded_memory() for loaded in models)


def host_bytes(transformer: QwenImageTransformer, limit_bytes: int | None, wanted_bytes: int, least_bytes: int) -> int:
    """What sampling with `transformer` may hold in host memory, at most `limit_bytes` (None: what is free) with what
    our other models hold there.

    Blocks of other models that lie in the way of `wanted_bytes` are given back; they are read again when their turn
    comes. `least_bytes` is granted within the limit even where the system says that nothing is free.
    """
    _holders.add(transformer)
    others = [other for other in _holders if other is not transformer]
    free = free_ram() + transformer.store.held_bytes
    for other in others:
        beside = sum(model.store.held_bytes for model in others)
        enough = free if limit_bytes is None else min(free, limit_bytes - beside)
        if other.store.held_bytes and enough < wanted_bytes:
            free += other.store.held_bytes
            other.store.set_held(())
    if limit_bytes is None:
        return max(free, least_bytes)
    left = limit_bytes - sum(model.store.held_bytes for model in others)
    return min(left, max(free, least_bytes))


def could_be_free(device: torch.device) -> tuple[int, int]:
    """(bytes on `device`, bytes of RAM) that a model could have if all others left."""
    management = comfy.model_management
    loaded = [entry for entry in management.current_loaded_models if entry.device == device]
    on_device = int(management.get_free_memory(device)) + _held(loaded) - HEADROOM_BYTES
    return max(0, on_device), max(0, free_ram() + sum(model.store.held_bytes for model in _holders))


def free_ram() -> int:
    """Bytes of RAM that models may have; negative where even the system's share is taken."""
    memory = psutil.virtual_memory()
    headroom = min(RAM_HEADROOM_MOST, max(RAM_HEADROOM_BYTES, int(memory.total * RAM_HEADROOM_PART)))
    return int(memory.available) - headroom
