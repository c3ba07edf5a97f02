"""Where each of several tensors lies in one flat byte buffer."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

# of every tensor's offset; torch's own allocators align to at least 64 bytes, kernels ask for 16
ALIGNMENT = 256


@dataclass(frozen=True)
class FlatItem:
    """One tensor of a flat buffer: `nbytes` bytes from `offset`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes

    def view(self, buffer: Tensor, base: int = 0) -> Tensor:
        """The tensor in `buffer`, which holds the layout's bytes from `base` on."""
        return buffer[self.offset - base : self.end - base].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class FlatLayout:
    """Tensors one after another in one buffer of `nbytes` bytes, each at an aligned offset."""

    items: tuple[FlatItem, ...]
    nbytes: int

    @classmethod
    def of(cls, specs: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> "FlatLayout":
        items: list[FlatItem] = []
        offset = 0
        for name, dtype, shape in specs:
            nbytes = prod(shape) * dtype.itemsize
            items.append(FlatItem(name, dtype, shape, offset, nbytes))
            offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return cls(tuple(items), offset)

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        return {item.name: item.view(buffer) for item in self.items}
