"""Stacked LoRAs as patches: what streaming adds to a weight each time it is decoded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..compute.stored_linear import LowRank
from ..files.checkpoint import TensorEntry
from .changes import Sum
from .deltas import Delta, apply, scratch_elements
from .lora_file import LoraMatch


@dataclass(frozen=True)
class LoraPatch:
    """All deltas of one weight, in the order of the stack, with their strengths. `name`: of the weight."""

    name: str
    stack: tuple[tuple[Delta, float], ...]

    def named(self, name: str) -> "LoraPatch":
        return replace(self, name=name)

    @property
    def parts(self) -> tuple[TensorEntry, ...]:
        return tuple(part for delta, _ in self.stack for part in delta.parts)

    @property
    def scratch_bytes(self) -> int:
        return 4 * scratch_elements(self.stack[0][0].shape, [delta for delta, _ in self.stack])

    @property
    def allocated_bytes(self) -> int:
        return max(delta.allocated_bytes for delta, _ in self.stack)

    def low_rank(self) -> Sequence[tuple[LowRank, TensorEntry, TensorEntry]] | None:
        """None where one of the stack is no product of two matrices, or normalises the weight."""
        found = []
        for delta, strength in self.stack:
            if not isinstance(delta.change, Sum) or not delta.change.matrix.is_product or delta.dora is not None:
                return None
            up, down = delta.change.matrix.entries
            found.append((LowRank(strength * delta.scale, delta.rows.start, delta.rows.stop), up, down))
        return found

    def apply(self, weight: Tensor, parts: Sequence[Tensor], scratch: Tensor) -> None:
        """Computed in fp32, rounded once."""
        stack, start = [], 0
        for delta, strength in self.stack:
            stop = start + len(delta.parts)
            stack.append((delta, parts[start:stop], strength))
            start = stop
        apply(weight, stack, scratch[: self.scratch_bytes].view(torch.float32))


def lora_patches(loras: Sequence[tuple[LoraMatch, float]]) -> Mapping[str, LoraPatch]:
    """Patches by the names of the weights that they change, of (LoRA, strength) in order; strength 0 is left out."""
    stacks: dict[str, list[tuple[Delta, float]]] = {}
    for lora, strength in loras:
        for delta in lora.deltas.values():
            if strength:
                stacks.setdefault(delta.weight, []).append((delta, strength))
    return {name: LoraPatch(name, tuple(stack)) for name, stack in stacks.items()}
