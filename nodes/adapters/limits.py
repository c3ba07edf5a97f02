"""How much memory a stage may use: the person's limits, what is free, and what our own models hold."""

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.model_management import LoadedModel

from ...engine.host_ram import HostRam
from ...engine.models.qwen_image_vae.image_vae import ImageVAE
from ...engine.models.streamed_transformer import StreamedTransformer
from ...engine.runs import free_memory
from .patcher import LowVRAMPatcher
from .switches import cache_ram_bytes, reserved_bytes

# beyond the free RAM at which ComfyUI empties its caches of outputs, where a person set that
CACHE_MARGIN_BYTES = 1_400 * 1024**2
# who may hold blocks in host memory; a model that is let go of is not kept here
_holders: weakref.WeakSet[StreamedTransformer[Any, Any]] = weakref.WeakSet()


def stage_bytes(
    device: torch.device,
    limit_bytes: int | None,
    wanted_bytes: int,
    block_bytes: int = 0,
    *,
    reused: comfy.model_patcher.ModelPatcher | None = None,
    beside: Sequence[comfy.model_patcher.ModelPatcher] = (),
) -> int:
    """What a stage may hold on `device`, at most `limit_bytes` (None: what is free) with all that is ours there.

    Whatever lies in the way of `wanted_bytes` is asked to leave first: other models through ComfyUI, and resident
    blocks of ours, which come back when their turn comes. `reused` is the model that the stage itself
    works with, and `beside` are other people's that it needs as well: they stay, and count as part of the stage.
    `block_bytes`: of the largest block that it allocates.
    """
    management = comfy.model_management
    wanted = wanted_bytes if limit_bytes is None else min(wanted_bytes, limit_bytes)
    headroom = headroom_bytes(block_bytes)
    there = _loaded(device)
    own = [*beside, *([] if reused is None else [reused])]
    kept = {patcher: loaded for patcher, loaded in there.items() if any(mine.is_clone(patcher) for mine in own)}
    others = [patcher for patcher in there if _is_ours(patcher) and patcher not in kept]
    held = _held(kept)
    if device.type != "cpu":  # as ComfyUI does: what lies in RAM is not asked to leave
        management.free_memory(wanted + headroom - held, device, keep_loaded=list(kept.values()))
    free = _free(device) + held - headroom
    if limit_bytes is None:
        return max(0, free)
    for patcher in others:
        excess = _held(others) + wanted - limit_bytes
        if excess > 0:
            _ask_away(patcher, excess)
    return max(0, min(free, limit_bytes - _held(others)))


def headroom_bytes(block_bytes: int = 0) -> int:
    """Of what is free on a device, what stays free: what ComfyUI reserves for others, and no less than the engine
    needs for itself. `block_bytes`: of the largest block."""
    return max(free_memory.headroom_bytes(block_bytes), reserved_bytes())


def _loaded(device: torch.device) -> dict[Any, LoadedModel]:
    """The patchers of ComfyUI's list on `device` and their entries, without those whose model is gone."""
    entries = ((entry.model, entry) for entry in list(comfy.model_management.current_loaded_models))
    return {patcher: entry for patcher, entry in entries if patcher is not None and entry.device == device}


def _free(device: torch.device) -> int:
    free = int(comfy.model_management.get_free_memory(device))
    if device.type in ("cpu", "mps"):  # the host's memory, of which ComfyUI asks the system alone
        return min(free, HostRam.now().available_bytes)
    return free


def _is_ours(patcher: Any) -> bool:
    return isinstance(patcher, LowVRAMPatcher) or isinstance(getattr(patcher, "model", None), ImageVAE)


def _ask_away(patcher: Any, nbytes: int) -> None:
    if isinstance(patcher, LowVRAMPatcher):
        patcher.partially_unload(patcher.offload_device, nbytes)
    else:
        patcher.detach()


def _held(patchers: Iterable[Any]) -> int:
    return sum(int(patcher.loaded_size()) for patcher in patchers)


def host_bytes(
    transformer: StreamedTransformer[Any, Any], limit_bytes: int | None, wanted_bytes: int, least_bytes: int
) -> int:
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
            other.store.leave_host()
    if limit_bytes is None:
        return max(free, least_bytes)
    left = limit_bytes - sum(model.store.held_bytes for model in others)
    return min(left, max(free, least_bytes))


def could_be_free(device: torch.device) -> tuple[int, int]:
    """(bytes on `device`, bytes of RAM) that a model could have if all others left."""
    on_device = _free(device) + _held(_loaded(device)) - headroom_bytes()
    return max(0, on_device), max(0, free_ram() + sum(model.store.held_bytes for model in _holders))


def free_ram() -> int:
    """Bytes of RAM that models may have; negative where even the system's share is taken."""
    # ComfyUI looks at the system's free RAM alone
    return free_memory.free_ram(kept_bytes=cache_ram_bytes() and cache_ram_bytes() + CACHE_MARGIN_BYTES)
