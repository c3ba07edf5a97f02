"""GGUF's quantized types as codecs: blocks decoded in chunks, so that scratch memory stays small. Never encodes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

import torch
from torch import Tensor

from ..files.checkpoint import TensorEntry
from ..packages import ggml_types
from .chunks import CHUNK_WEIGHTS
from .format import Format, Layout, StoredParam, Tensors
from .gguf_blocks import DECODERS, SCRATCH_PER_WEIGHT, TABLE_BYTES
from .gguf_grids import GRID_BYTES, GRID_DECODERS, grid_decoder
from .neighbours import stands_alone


@dataclass(frozen=True)
class GgufCodec:
    """One part: blocks as bytes, (..., bytes of a row); a row is a whole number of blocks.

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

    def scratch_bytes(self, shape: Sequence[int]) -> int:
        return min(prod(shape), CHUNK_WEIGHTS) * SCRATCH_PER_WEIGHT + _TABLE_BYTES.get(self.type, 0)

    def decode_into(self, out: Tensor, parts: Sequence[Tensor]) -> None:
        blocks = parts[0].view(-1, self.block_bytes)
        weights = out.view(-1, self.block_weights)
        chunk = CHUNK_WEIGHTS // self.block_weights
        decode = grid_decoder(self.type, out.device) if self.type in GRID_DECODERS else DECODERS[self.type]
        for start in range(0, len(blocks), chunk):
            decoded = decode(blocks[start : start + chunk])
            weights[start : start + chunk].view(decoded.shape).copy_(decoded)
            del decoded  # before the next one is made


@cache
def _block_size(kind: str) -> tuple[int, int]:
    """Weights and bytes of a block of that ggml type."""
    types = ggml_types()
    size: tuple[int, int] = types.GGML_QUANT_SIZES[types.GGMLQuantizationType[kind]]
    return size


_TABLE_BYTES = {**TABLE_BYTES, **GRID_BYTES}
GGUF = tuple(GgufCodec(kind) for kind in (*DECODERS, *GRID_DECODERS))
_OF_DTYPE = {codec.type: codec for codec in GGUF}


class Gguf(Format):
    """Told by the tensor's type, which the file states."""

    dtypes = _OF_DTYPE.keys()
    codecs = GGUF

    def recognise(self, name: str, tensors: Tensors) -> StoredParam | None:
        data = tensors[name]
        alone = bool(data.shape) and stands_alone(name, tensors)
        return StoredParam(name, data.shape, _OF_DTYPE[data.dtype], (data,)) if alone else None

    def raw_layout(self, part: TensorEntry) -> Layout:
        return torch.uint8, _OF_DTYPE[part.dtype].raw_shape(part.shape)
