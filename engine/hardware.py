"""What there is to run on, as one value. Reports; decides nothing."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Hardware:
    """A device and what can be done with it. Everything that depends on the kind of device reads these fields.

    streams: copies can run on a side stream, ordered by events.
    pinned: host buffers can be page-locked.
    prefetch: a reader thread fetches ahead of compute.
    host_device: device memory is host memory, so that file bytes can be read straight into a slot.
    """

    device: torch.device
    streams: bool
    pinned: bool
    prefetch: bool
    host_device: bool

    @classmethod
    def detect(cls, device: torch.device) -> "Hardware":
        gpu, host = device.type in ("cuda", "xpu"), device.type == "cpu"
        return cls(device, streams=gpu, pinned=gpu, prefetch=gpu or host, host_device=host)

    @property
    def accelerator(self) -> Any:
        """torch's module of stream functions for this device (only where `streams`)."""
        return torch.xpu if self.device.type == "xpu" else torch.cuda
