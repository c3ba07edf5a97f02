"""GGUF's quantized types as codecs: blocks decoded in chunks, so that scratch memory stays small. Never encodes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ..files.checkpoint import TensorEntry
from ..packages import ggml_types
from .chunks import chunk_rows
from .format import Format, Layout, StoredParam, Tensors
from .gguf_blocks import DECODERS
from .gguf_grids import GRID_DECODERS, tables
from .neighbours import stands_alone
from .scaling import scale_into
from .scratch import Scratch

_SPARE_BYTES = 8192  # of scratch, for small tables and for what pieces are padded with
_PROBED = 512  # blocks


@dataclass(frozen=True)
class GgufCodec:
    """One part: blocks as bytes, (..., bytes of a row); a row is a whole number of blocks. Types with a grid have one
    or two more, int8 tables.

    Decoded in fp32, then rounded once to the compute dtype.
    """

    type: str

    @property
    def name(self) -> str:
        return f"gguf_{self.type.lower()}"

    @property
    def block_weights(self) -> int:
        return _block_size(self.type)[0]

    @property
    def block_bytes(self) -> int:
        return _block_size(self.type)[1]

    def raw_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the bytes that store a weight of `shape`."""
        return (*shape[:-1], shape[-1] // self.block_weights * self.block_bytes)

    def table_parts(self, file: Path) -> tuple[TensorEntry, ...]:
        """The tables, which are in no file."""
        return tuple(TensorEntry(file, 0, len(data), "I8", shape, data=data) for shape, data in tables(self.type))

    def scratch_bytes(self, shape: Sequence[int], *, on_host: bool) -> int:
        blocks = prod(shape) // self.block_weights
        return self._chunk(blocks, on_host=on_host) * _bytes_per_block(self, on_host=on_host) + _SPARE_BYTES

    def decode_into(self, out: Tensor, parts: Sequence[Tensor], scratch: Scratch) -> None:
        blocks, beside = parts[0].view(-1, self.block_bytes), parts[1:]
        weights = out.view(-1, self.block_weights)
        chunk = self._chunk(len(blocks), on_host=scratch.on_host)
        for start in range(0, len(blocks), chunk):
            self._decode_chunk(weights[start : start + chunk], blocks[start : start + chunk], beside, scratch)

    def _decode_chunk(self, out: Tensor, blocks: Tensor, beside: Sequence[Tensor], scratch: Scratch) -> None:
        decode = DECODERS.get(self.type) or GRID_DECODERS[self.type]
        with scratch.lent():
            codes, scale, offset, sign = decode(blocks, scratch, *beside)
            if scale.dim() == 3 and codes.dim() == 2:
                codes = codes.unflatten(1, (scale.shape[1], -1))
            scale_into(out.view(codes.shape), codes, scale, scratch, offset, sign=sign)

    def _chunk(self, blocks: int, *, on_host: bool) -> int:
        """Blocks that are decoded at a time."""
        block_bytes = _bytes_per_block(self, on_host=on_host)
        return chunk_rows((blocks, self.block_weights), block_bytes, on_host=on_host, kept=_SPARE_BYTES)


@cache
def _bytes_per_block(codec: GgufCodec, *, on_host: bool) -> int:
    """Of scratch: found by decoding some on tensors without memory."""
    scratch = Scratch.of_nothing(on_host=on_host)
    with torch.device("meta"):
        out = torch.empty(_PROBED, codec.block_weights, dtype=torch.bfloat16)
        blocks = torch.empty(_PROBED, codec.block_bytes, dtype=torch.uint8)
        beside = [torch.empty(shape, dtype=torch.int8) for shape, _ in tables(codec.type)]
        codec._decode_chunk(out, blocks, beside, scratch)
    return -(-scratch.most // _PROBED)


@cache
def _block_size(kind: str) -> tuple[int, int]:
    """Weights and bytes of a block of that ggml type."""
    types = ggml_types()
    size: tuple[int, int] = types.GGML_QUANT_SIZES[types.GGMLQuantizationType[kind]]
    return size


GGUF = tuple(GgufCodec(kind) for kind in (*DECODERS, *GRID_DECODERS))
_OF_DTYPE = {codec.type: codec for codec in GGUF}


class Gguf(Format):
    """Told by the tensor's type, which the file states."""

    dtypes = _OF_DTYPE.keys()
    codecs = GGUF

    def recognise(self, name: str, tensors: Tensors) -> StoredParam | None:
        data = tensors[name]
        if not data.shape or not stands_alone(name, tensors):
            return None
        codec = _OF_DTYPE[data.dtype]
        return StoredParam(name, data.shape, codec, (data, *codec.table_parts(data.file)))

    def raw_layout(self, part: TensorEntry) -> Layout:
        return torch.uint8, _OF_DTYPE[part.dtype].raw_shape(part.shape)
