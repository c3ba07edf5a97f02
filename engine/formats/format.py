"""What a storage format is: how it is told, how its bytes lie, how they are decoded. Knows no format by name.

A format describes bytes only: it moves no memory between devices, and computes with no weight.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..files.checkpoint import TensorEntry
from .scratch import Scratch

# how a part's bytes are seen as a tensor
Layout = tuple[torch.dtype, tuple[int, ...]]
Tensors = Mapping[str, TensorEntry]


class Codec(Protocol):
    """How the weights of one storage format are decoded. Parts, destination and scratch lie on one device."""

    @property
    def name(self) -> str: ...

    def decode_into(self, out: Tensor, parts: Sequence[Tensor], scratch: Scratch) -> None:
        """Write the weight that `parts` store into `out` (contiguous, compute dtype). Beside it on a device nothing is
        taken but of `scratch`, and nothing is left there."""

    def scratch_bytes(self, shape: Sequence[int], *, on_host: bool) -> int:
        """The most that decoding a weight of `shape` takes of scratch; `on_host` as Scratch has it."""


class Encoder(Codec, Protocol):
    """A codec that weights can also be brought into."""

    def encode(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The parts that store `weight`."""


def decode_alone(codec: Codec, out: Tensor, parts: Sequence[Tensor]) -> None:
    """Write a weight into `out`, in scratch memory of its own: for few weights."""
    nbytes = codec.scratch_bytes(out.shape, on_host=out.device.type == "cpu")
    codec.decode_into(out, parts, Scratch(torch.empty(nbytes, dtype=torch.uint8, device=out.device)))


@dataclass(frozen=True)
class HeldPart:
    """A part as products with the stored weight want it: which it is, the codec that puts its numbers in their order,
    and how they lie then."""

    part: TensorEntry
    codec: Codec
    layout: Layout


@dataclass(frozen=True)
class StoredParam:
    """A parameter as a file stores it: its codec, and its parts, the data first.

    read_beside: the parameter whose decoded weight the codec reads as a last part. tile_rows: how many rows are stored
    so that only together they can be decoded; 1 where each can by itself. For who computes on the weight as stored:
    operand_scale: what numbers are divided by before they are brought to its dtype, where the file says so;
    eight_bit_operands: that they are brought to eight bits though the weight has four; full_products: that products
    are to be computed on the decoded weight; held: its parts in another order than the file's, empty where that is
    theirs; shifted_operands: that numbers are shifted until none is negative. beside_stored: of a bias whose codec
    reads the decoded weight, its codec where the layer computes on the stored one, of the first part alone.
    """

    name: str
    shape: tuple[int, ...]
    decoder: Codec
    parts: tuple[TensorEntry, ...]
    read_beside: str | None = None
    tile_rows: int = 1
    operand_scale: TensorEntry | None = None
    eight_bit_operands: bool = False
    full_products: bool = False
    held: tuple[HeldPart, ...] = ()
    shifted_operands: bool = False
    beside_stored: Codec | None = None

    @property
    def codec(self) -> str:
        """The codec's name."""
        return self.decoder.name

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def scratch_bytes(self, *, on_host: bool) -> int:
        """What decoding it takes of scratch."""
        return self.decoder.scratch_bytes(self.shape, on_host=on_host)


class Format(Protocol):
    """A storage format, or a family of them. Inherit from it and define what differs; all is asked of headers alone.

    dtypes: of data and of parts, as TensorEntry names them, that it is asked of; fp8_dtypes: those of them that are
    decoded by casting numbers in fp8, which not every device can. codecs: all that `recognise` may name; encoders:
    those of them that weights can be brought into.
    """

    dtypes: Collection[str] = ()
    fp8_dtypes: Collection[str] = ()
    codecs: Sequence[Codec] = ()
    encoders: Sequence[Encoder] = ()

    def describe(self, tensors: Tensors, metadata: Mapping[str, str], path: Path) -> Tensors:
        """A whole file's tensors, those of this format under dtypes and names that `recognise` tells it by, in their
        logical shapes. For formats that notes or groups of tensors tell.

        `metadata` is the header's, `path` names the model in errors. Raises DamagedFile where tensors and notes
        disagree, WrongModel for what is not supported, MissingPackage where decoding would need one.
        """
        return tensors

    def recognise(self, name: str, tensors: Tensors) -> StoredParam | None:
        """The parameter `name` of `tensors`, a block's or a file's; None where it is not stored in this format."""
        return None

    def raw_layout(self, part: TensorEntry) -> Layout | None:
        """How a part's bytes are seen as a tensor, None where that is another format's to say."""
        return None
