"""Simulated seconds that work on a card takes: rates that a test chooses, so that it knows what is true."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
# operator -> the argument whose last axis is multiplied away
PRODUCTS = {aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1, aten.mm.out: 0}


@dataclass(frozen=True)
class Rates:
    """A card that computes matrix products at `flops`, takes `launch_seconds` for every kernel, and copies at
    `bus_bytes` per second. Copies and kernels of different streams do not slow each other down. The host takes
    `issue_seconds` for every piece of work that it gives to the card, and reads files at `disk_bytes` per second,
    whatever the number of threads."""

    flops: float = float("inf")
    bus_bytes: float = float("inf")
    disk_bytes: float = float("inf")
    launch_seconds: float = 0.0
    issue_seconds: float = 0.0

    def kernel_seconds(self, func: Any, args: Sequence[Any], tensors: Sequence[Tensor]) -> float:
        seconds = self.launch_seconds
        if func in PRODUCTS:
            result = tensors[-1]  # or where it is to lie
            seconds += 2 * result.numel() * args[PRODUCTS[func]].shape[-1] / self.flops
        return seconds

    def copy_seconds(self, nbytes: int) -> float:
        return nbytes / self.bus_bytes

    def read_seconds(self, nbytes: int) -> float:
        return nbytes / self.disk_bytes
