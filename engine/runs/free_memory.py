"""How much memory of a device and of the host is free for a model, and what of it stays free. Moves nothing."""

import torch

from ..errors import DoesNotFit
from ..host_ram import HostRam, RamBound

# of what is free, even where nothing is reserved: fragments of torch's allocator, cuBLAS, cuDNN, attention workspaces
HEADROOM_BYTES = 384 * 1024**2
# of free RAM, for the system, its page cache and other programs; ComfyUI empties its caches of outputs when a tenth of
# RAM (at least 2 GiB, at most 10) is no longer free, and this stays clear of that
RAM_HEADROOM_BYTES = 3_500 * 1024**2
RAM_HEADROOM_PART = 0.15
RAM_HEADROOM_MOST = 11_500 * 1024**2


def headroom_bytes(block_bytes: int = 0) -> int:
    """Of what is free on a device, what stays free. `block_bytes`: of the largest block, which is allocated as a whole:
    what is free may lie in pieces of which none is as large."""
    return max(HEADROOM_BYTES, block_bytes)


def free_ram(kept_bytes: int = 0) -> int:
    """Bytes of RAM that models may have; negative where even the system's share is taken.

    `kept_bytes`: of the system's free RAM, what others want to stay free at least.
    """
    system, *others = HostRam.now().bounds
    kept = max(_reserve(system), kept_bytes)
    return min([system.available_bytes - kept, *(other.available_bytes - _reserve(other) for other in others)])


def free_bytes(device: torch.device) -> int:
    """What this process may still take on `device`: what the driver has, and what torch keeps unused."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    if device.type == "xpu":
        return int(total_bytes(device) - torch.xpu.memory_allocated(device))
    return HostRam.now().available_bytes


def total_bytes(device: torch.device) -> int:
    """All memory of `device`; of the host what this process can ever have."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    if device.type == "xpu":
        return int(torch.xpu.get_device_properties(device).total_memory)
    return HostRam.now().total_bytes


def check_room(nbytes: int, what: str, instead: str) -> None:
    """Raise DoesNotFit where the host has not so much free memory for `what`."""
    free = HostRam.now().available_bytes
    if nbytes > free:
        raise DoesNotFit(
            "{what} needs {need_bytes} of RAM, but {free_bytes} are free.\n{instead}",
            code="memory.lacks_ram",
            what=what,
            need_bytes=nbytes,
            free_bytes=max(0, free),
            instead=instead,
        )


def empty_cache(device: torch.device) -> None:
    """Give what torch keeps unused on `device` back to the driver."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "xpu":
        torch.xpu.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def _reserve(bound: RamBound) -> int:
    return min(RAM_HEADROOM_MOST, max(RAM_HEADROOM_BYTES, int(bound.total_bytes * RAM_HEADROOM_PART)))
