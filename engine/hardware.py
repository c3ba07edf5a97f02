"""What there is to run on, as one value. Reports; decides nothing."""

import os
from dataclasses import dataclass
from typing import Any

import torch

from .host_ram import HostRam

# Windows grants page-locked memory up to about half of RAM, and lets the card borrow from the same half
PINNED_PART = 0.4 if os.name == "nt" else 0.9


@dataclass(frozen=True)
class Hardware:
    """A device and what can be done with it. Everything that depends on the kind of device reads these fields.

    streams: copies can run on a side stream, ordered by events.
    pinned: host memory can be page-locked, up to pinned_limit_bytes.
    prefetch: reader threads fetch ahead of compute.
    host_device: device memory is host memory, so that file bytes can be read straight into a slot.
    decodes_fp8: the device can cast fp8 to other dtypes; Apple's cannot.
    unified: the device has buffers of its own, but in the host's memory.
    """

    device: torch.device
    streams: bool
    pinned: bool
    prefetch: bool
    host_device: bool
    pinned_limit_bytes: int = 0
    unified: bool = False
    decodes_fp8: bool = True

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
            pinned_limit_bytes=int(HostRam.now().total_bytes * PINNED_PART),
        )

    @property
    def accelerator(self) -> Any:
        """torch's module of stream functions for this device (only where `streams`)."""
        return torch.xpu if self.device.type == "xpu" else torch.cuda
