"""Where each tensor of a block lies in a flat byte buffer: as stored (raw), and as computed with (slot)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from math import prod
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import WrongModel
from ..files.checkpoint import TensorEntry
from ..formats import FORMATS, Formats, StoredParam, is_native

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


class WeightPatch(Protocol):
    """What is added to the parameter `name` each time it is decoded; its `parts` are streamed with the block."""

    @property
    def name(self) -> str: ...

    def named(self, name: str) -> "WeightPatch":
        """The same for the parameter of that name: in its block, where it was of the whole model."""

    @property
    def parts(self) -> tuple[TensorEntry, ...]: ...

    @property
    def scratch_bytes(self) -> int:
        """Room that `apply` needs beside the weight."""

    @property
    def allocated_bytes(self) -> int:
        """What `apply` allocates by itself, at the most."""

    def apply(self, weight: Tensor, parts: Sequence[Tensor], scratch: Tensor) -> None:
        """Change `weight` in place. `scratch` has scratch_bytes (uint8); all lie on one device."""


@dataclass(frozen=True)
class DecodeGroup:
    """Neighbours in a block's raw bytes that are brought and written together: bytes `start` to `end`.

    members: what writes (a parameter's codec, or a patch), stored parts, the place in the slot, and those of the slot
    that a codec reads, decoded before it, as further parts.
    """

    start: int
    end: int
    members: tuple[tuple[StoredParam | WeightPatch, tuple[FlatItem, ...], FlatItem, tuple[FlatItem, ...]], ...]

    def decode(self, raw: Tensor, slot: Tensor, scratch: Tensor, *, base: int = 0) -> None:
        """Write into `slot`; `raw` lies beside it and holds the block's raw bytes from `base` on."""
        for writer, items, item, decoded in self.members:
            weight, parts = item.view(slot), [part.view(raw, base) for part in items]
            parts += [other.view(slot) for other in decoded]
            if isinstance(writer, StoredParam):
                writer.decoder.decode_into(weight, parts)
            else:
                writer.apply(weight, parts, scratch)


@dataclass(frozen=True)
class StoredBlock:
    """A block's parameters as a file stores them, and the layouts of its raw bytes and of its slot.

    The parts of patches lie behind those of the parameters. `native`: the parameters' raw bytes are the slot's bytes,
    so that only patches have to be applied.
    """

    params: tuple[StoredParam, ...]
    patches: tuple[WeightPatch, ...]
    slot: FlatLayout
    native: bool
    formats: Formats = FORMATS

    @cached_property
    def raw(self) -> FlatLayout:
        return FlatLayout.of((str(i), *self.formats.raw_layout(part)) for i, part in enumerate(self.parts))

    @cached_property
    def parts(self) -> tuple[TensorEntry, ...]:
        """What `raw` is made of, in its order."""
        params = (part for param in self.params for part in param.parts)
        return (*params, *(part for patch in self.patches for part in patch.parts))

    @property
    def nbytes(self) -> int:
        """To be read from the files."""
        return sum(part.nbytes for part in self.parts)

    @cached_property
    def groups(self) -> tuple[DecodeGroup, ...]:
        """All that has to be decoded, in groups no larger than the largest member, so that small ones are not brought
        singly; patches after the parameters that they change."""
        items = iter(self.raw.items)
        places = {item.name: item for item in self.slot.items}
        writers: tuple[StoredParam | WeightPatch, ...] = (*self.params, *self.patches)
        singles = []
        for writer in writers:
            own = tuple(islice(items, len(writer.parts)))
            other = writer.read_beside if isinstance(writer, StoredParam) else None
            if not (self.native and isinstance(writer, StoredParam)):
                decoded = () if other is None else (places[other],)
                singles.append(DecodeGroup(own[0].offset, own[-1].end, ((writer, own, places[writer.name], decoded),)))
        largest = max((group.end - group.start for group in singles), default=0)
        groups: list[DecodeGroup] = []
        for group in singles:
            last = groups[-1] if groups else None
            if last is not None and group.end - last.start <= largest:
                groups[-1] = DecodeGroup(last.start, group.end, last.members + group.members)
            else:
                groups.append(group)
        return tuple(groups)

    @property
    def staging_bytes(self) -> int:
        """Room for any of the groups."""
        return max((group.end - group.start for group in self.groups), default=0)

    @property
    def scratch_bytes(self) -> int:
        """What codecs and patches allocate beside the slot, at the most: one after another."""
        codecs = 0 if self.native else max(param.scratch_bytes for param in self.params)
        return max([codecs, *(patch.allocated_bytes for patch in self.patches)])

    @property
    def patch_scratch_bytes(self) -> int:
        """Room that patches need beside the slot."""
        return max((patch.scratch_bytes for patch in self.patches), default=0)


def store_block(
    names: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, TensorEntry],
    dtype: torch.dtype,
    where: str,
    patches: Sequence[WeightPatch] = (),
    formats: Formats = FORMATS,
) -> StoredBlock:
    """The parameters `names` (name -> shape) of one block; `where` names the file and block in errors. `formats`: those
    that it may be stored in.

    Raises WrongModel for a parameter that is missing, has another shape, or an unsupported format.
    """
    params = []
    for name, shape in names.items():
        if name not in tensors:
            raise WrongModel(
                "{where} lacks {name}. The file is not whole: download it again.",
                code="model.block_lacks_tensor",
                where=where,
                name=name,
            )
        param = formats.stored_param(name, tensors, where)
        if param.shape != shape:
            raise WrongModel(
                "{where}: {name} has shape {shape}, {needed_shape} is needed.",
                code="model.block_wrong_shape",
                where=where,
                name=name,
                shape=list(param.shape),
                needed_shape=list(shape),
            )
        params.append(param)
    slot = FlatLayout.of((name, dtype, shape) for name, shape in names.items())
    native = all(is_native(param, FORMAT_OF_DTYPE[dtype]) for param in params)
    return StoredBlock(tuple(params), tuple(patches), slot, native, formats)


def bind(module: nn.Module, views: Mapping[str, Tensor]) -> None:
    """Make `views` the parameters of `module` (names as in its state dict), without copying."""
    for name, view in views.items():
        owner, _, attribute = name.rpartition(".")
        module.get_submodule(owner)._parameters[attribute] = nn.Parameter(view, requires_grad=False)
