"""ComfyUI's 4-bit and block-scaled formats (nvfp4, mxfp8, convrot_w4a4), through comfy-kitchen, its own library.

Each weight is decoded as comfy-kitchen's `dequantize_*` functions decode it, bit for bit, in chunks of rows. Never
encodes. The block scales of nvfp4 and mxfp8 lie in tiles of 128 rows (cuBLAS' layout for block scaling factors), so
that a chunk is a whole number of tiles.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .chunks import even_rows
from .int8_convrot import INT8_CONVROT

TILE_ROWS = 128
TILE_COLUMNS = 4  # of scales
# what the parts behind the data are called beside `<layer>.weight`, in their order
SCALES = ("weight_scale", "weight_scale_2")
_NO_BLOCKS = 1


@dataclass(frozen=True)
class KitchenCodec:
    """Two or three parts: data (N, K / `packed`), scales, and for nvfp4 the scale of the whole tensor.

    block: weights of a row that share a scale, 1 where a row does. group: neighbours of a row that were rotated
    together, None where none were.
    """

    name: str
    packed: int
    block: int
    decode: Callable[..., Tensor]
    group: int | None = None

    @property
    def dtype(self) -> str:
        """What tensors of this format are called in a checkpoint."""
        return self.name.upper()

    def raw_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (*shape[:-1], shape[-1] // self.packed)

    def scale_count(self, shape: Sequence[int]) -> int:
        """How many scales a weight of `shape` has, those that fill up tiles included."""
        rows, columns = shape
        if self.block == _NO_BLOCKS:
            return rows
        tiles = -(-rows // TILE_ROWS) * -(-(columns // self.block) // TILE_COLUMNS)
        return tiles * TILE_ROWS * TILE_COLUMNS

    def decode_into(self, out: Tensor, parts: Sequence[Tensor]) -> None:
        data, scales, rest = parts[0], parts[1].reshape(-1), parts[2:]
        rows = self._rows(out.shape)
        for start in range(0, len(out), rows):
            chunk = out[start : start + rows]
            begin, count = self.scale_count((start, out.shape[1])), self.scale_count(tuple(chunk.shape))
            options = {} if self.group is None else {"group": self.group}
            chunk.copy_(
                self.decode(data[start : start + rows], scales[begin : begin + count], *rest, chunk.dtype, **options)
            )

    def scratch_bytes(self, shape: Sequence[int]) -> int:
        # the library's own forms for any device hold a chunk's codes as 32-bit integers, its values and the result
        rotation = 0 if self.group is None else self.group**2 * 8
        return self._rows(shape) * shape[1] * 16 + rotation

    @staticmethod
    def _rows(shape: Sequence[int]) -> int:
        """Rows of a chunk: whole tiles."""
        rows = even_rows(shape)
        return min(-(-rows // TILE_ROWS) * TILE_ROWS, max(1, shape[0]))


def load_kitchen() -> Any:
    """comfy-kitchen, a second to import. Raises ImportError, or AttributeError where it is too old."""
    import comfy_kitchen

    for name in ("dequantize_nvfp4", "dequantize_mxfp8", "dequantize_convrot_w4a4_weight"):
        getattr(comfy_kitchen, name)
    return comfy_kitchen


def _nvfp4(data: Tensor, scales: Tensor, whole: Tensor, dtype: torch.dtype) -> Tensor:
    result: Tensor = load_kitchen().dequantize_nvfp4(data, whole, scales.view(torch.float8_e4m3fn), dtype)
    return result


def _mxfp8(data: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    result: Tensor = load_kitchen().dequantize_mxfp8(data, scales.view(torch.float8_e8m0fnu), dtype)
    return result


def _convrot_w4a4(data: Tensor, scales: Tensor, dtype: torch.dtype, group: int) -> Tensor:
    dequantize = load_kitchen().dequantize_convrot_w4a4_weight
    result: Tensor = dequantize(data, scales, convrot_groupsize=group, output_dtype=dtype)
    return result


NVFP4 = KitchenCodec("nvfp4", 2, 16, _nvfp4)
MXFP8 = KitchenCodec("mxfp8", 1, 32, _mxfp8)
CONVROT_W4A4: Mapping[int, KitchenCodec] = {
    group: KitchenCodec(f"convrot_w4a4_{group}", 2, _NO_BLOCKS, _convrot_w4a4, group) for group in INT8_CONVROT
}
KITCHEN: Mapping[str, KitchenCodec] = {codec.dtype: codec for codec in (NVFP4, MXFP8, *CONVROT_W4A4.values())}
