"""What there is to run on, as one value. Reports; decides nothing."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from .host_ram import HostRam
from .page_locks import CUDA_PAGE_LOCKS, PageLocks

# Windows grants page-locked memory up to about half of RAM, and lets the card borrow from the same half
PINNED_PART = 0.4 if os.name == "nt" else 0.9
# that models compute in
FLOATS = frozenset((torch.float32, torch.float16, torch.bfloat16))


@dataclass(frozen=True)
class Hardware:
    """A device and what can be done with it. Everything that depends on the kind of device reads these fields.

    streams: copies can run on a side stream, ordered by events.
    pinned: host memory can be page-locked by page_locks, up to pinned_limit_bytes.
    prefetch: reader threads fetch ahead of compute.
    host_device: device memory is host memory, so that file bytes can be read straight into a slot.
    decodes_fp8: the device can cast fp8 to other dtypes; Apple's cannot.
    unified: the device has buffers of its own, but in the host's memory.
    fused_attention: dtypes in which torch's attention has a kernel that makes no matrix of scores there;
    fused_shared_attention: the same where several heads look at the same keys.
    """

    device: torch.device
    streams: bool
    pinned: bool
    prefetch: bool
    host_device: bool
    pinned_limit_bytes: int = 0
    unified: bool = False
    decodes_fp8: bool = True
    fused_attention: frozenset[torch.dtype] = FLOATS
    fused_shared_attention: frozenset[torch.dtype] = FLOATS
    page_locks: PageLocks = CUDA_PAGE_LOCKS

    @classmethod
    def detect(cls, device: torch.device) -> "Hardware":
        gpu, host = device.type in ("cuda", "xpu"), device.type == "cpu"
        return cls(
            device,
            streams=gpu,
            pinned=device.type == "cuda",
            prefetch=gpu or host,
            host_device=host,
            unified=device.type == "mps",
            decodes_fp8=device.type != "mps",
            fused_attention=_fused_dtypes(device, shared_keys=False),
            fused_shared_attention=_fused_dtypes(device, shared_keys=True),
            pinned_limit_bytes=int(HostRam.now().total_bytes * PINNED_PART),
        )

    @property
    def accelerator(self) -> Any:
        """torch's module of stream functions for this device (only where `streams`)."""
        return torch.xpu if self.device.type == "xpu" else torch.cuda


def _fused_dtypes(device: torch.device, *, shared_keys: bool) -> frozenset[torch.dtype]:
    """As torch itself would choose, for heads of the models' size: what it can do depends on the device's generation,
    on how torch was built and on what the process has switched off.

    Apple's GPUs are not asked: torch chooses there by other means, and in most of its releases makes all scores.
    """
    if device.type == "mps":
        return frozenset()
    if device.type not in ("cpu", "cuda", "xpu") or not torch.get_device_module(device).is_available():
        return FLOATS  # nothing runs there
    return frozenset(dtype for dtype in FLOATS if _is_fused(device, dtype, shared_keys))


def _is_fused(device: torch.device, dtype: torch.dtype, shared_keys: bool) -> bool:
    query, key = (torch.empty(1, heads, 64, 128, dtype=dtype, device=device) for heads in (2, 1 if shared_keys else 2))
    chosen = torch._fused_sdp_choice(query, key, key, is_causal=shared_keys, enable_gqa=shared_keys)
    return bool(chosen != int(SDPBackend.MATH.value))
