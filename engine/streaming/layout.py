"""Where each tensor of a block lies in a flat byte buffer: as stored (raw), and as computed with (slot)."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from ..checkpoint import TensorEntry
from ..errors import WrongModel
from ..formats import CODECS, StoredParam, is_native, raw_layout, stored_param

# of every tensor's offset; torch's own allocators align to at least 64 bytes, kernels ask for 16
ALIGNMENT = 256

FORMAT_OF_DTYPE = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


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


@dataclass(frozen=True)
class StoredBlock:
    """A block's parameters as a file stores them, and the layouts of its raw bytes and of its slot.

    `native`: the raw bytes are the slot's bytes, so that nothing has to be decoded.
    """

    params: tuple[StoredParam, ...]
    raw: FlatLayout
    slot: FlatLayout
    native: bool

    @property
    def staging_bytes(self) -> int:
        """What `decode` needs as staging: room for the largest stored parameter."""
        return max(items[-1].end - items[0].offset for items in self._parts())

    @property
    def scratch_bytes(self) -> int:
        """What `decode` allocates beside the slot, at the most."""
        return max(param.scratch_bytes for param in self.params)

    def decode(self, raw: Tensor, slot: Tensor, staging: Tensor | None = None) -> None:
        """Write the parameters that the `raw` buffer stores into the `slot` buffer.

        Where the two lie on different devices, each parameter passes through `staging`, which lies beside the slot.
        """
        for param, items, item in zip(self.params, self._parts(), self.slot.items, strict=True):
            source, base = raw, 0
            if staging is not None:
                base, nbytes = items[0].offset, items[-1].end - items[0].offset
                source = staging[:nbytes].copy_(raw[base : base + nbytes], non_blocking=raw.is_pinned())
            CODECS[param.codec].decode_into(item.view(slot), [part.view(source, base) for part in items])

    def _parts(self) -> Iterator[list[FlatItem]]:
        parts = iter(self.raw.items)
        for param in self.params:
            yield [next(parts) for _ in param.parts]


def store_block(
    names: Mapping[str, tuple[int, ...]], tensors: Mapping[str, TensorEntry], dtype: torch.dtype, where: str
) -> StoredBlock:
    """The parameters `names` (name -> shape) of one block; `where` names the file and block in errors.

    Raises WrongModel for a parameter that is missing, has another shape, or an unsupported format.
    """
    params = []
    for name, shape in names.items():
        if name not in tensors:
            raise WrongModel(f"{where} lacks {name}. The file is not whole: download it again.")
        param = stored_param(name, tensors, where)
        if param.shape != shape:
            raise WrongModel(f"{where}: {name} has shape {list(param.shape)}, {list(shape)} is needed.")
        params.append(param)
    raw = FlatLayout.of(
        (f"{param.name}/{i}", *raw_layout(part)) for param in params for i, part in enumerate(param.parts)
    )
    slot = FlatLayout.of((name, dtype, shape) for name, shape in names.items())
    native = all(is_native(param, FORMAT_OF_DTYPE[dtype]) for param in params)
    return StoredBlock(tuple(params), raw, slot, native)


def bind(module: nn.Module, views: Mapping[str, Tensor]) -> None:
    """Make `views` the parameters of `module` (names as in its state dict), without copying."""
    for name, view in views.items():
        owner, _, attribute = name.rpartition(".")
        module.get_submodule(owner)._parameters[attribute] = nn.Parameter(view, requires_grad=False)
