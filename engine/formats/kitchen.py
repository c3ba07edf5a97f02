"""ComfyUI's 4-bit and block-scaled formats (nvfp4, mxfp8, convrot_w4a4): told by its notes. Never encodes.

The block scales of nvfp4 and mxfp8 lie in tiles of 128 rows (cuBLAS' layout for block scaling factors), so that a chunk
is a whole number of tiles.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import MissingPackage, WrongModel
from ..files.checkpoint import TensorEntry
from .chunks import chunk_rows
from .comfy_notes import GROUPS, Note, NotedFormat, require_comfy_kitchen
from .format import Layout, StoredParam, Tensors
from .kitchen_decoders import CONVROT_W4A4 as CONVROT_W4A4_DECODER
from .kitchen_decoders import MXFP8 as MXFP8_DECODER
from .kitchen_decoders import NVFP4 as NVFP4_DECODER
from .kitchen_decoders import TILE_COLUMNS, TILE_ROWS, Chunk, Decoder
from .kitchen_kernels import decode_by_kernel
from .scratch import Scratch

# what the parts behind the data are called beside `<layer>.weight`, in their order
SCALES = ("weight_scale", "weight_scale_2")
_NO_BLOCKS = 1


@dataclass(frozen=True)
class KitchenCodec:
    """Two or three parts: data (N, K / `packed`), scales, and for nvfp4 the scale of the whole tensor.

    block: weights of a row that share a scale, 1 where a row does. group: neighbours of a row that were rotated
    together, None where none were. Decoded bit for bit as comfy-kitchen decodes it: by its kernel where it has one for
    the device, else by the same operators in the same order, in chunks of rows.
    """

    name: str
    packed: int
    block: int
    decoder: Decoder
    group: int | None = None

    @property
    def dtype(self) -> str:
        """What tensors of this format are called in a checkpoint."""
        return self.name.upper()

    def raw_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (*shape[:-1], shape[-1] // self.packed)

    @property
    def tile_rows(self) -> int:
        """How many rows' scales belong together."""
        return 1 if self.block == _NO_BLOCKS else TILE_ROWS

    def scale_count(self, shape: Sequence[int]) -> int:
        """How many scales a weight of `shape` has, those that fill up tiles included."""
        rows, columns = shape
        if self.block == _NO_BLOCKS:
            return rows
        tiles = -(-rows // TILE_ROWS) * -(-(columns // self.block) // TILE_COLUMNS)
        return tiles * TILE_ROWS * TILE_COLUMNS

    def decode_into(self, out: Tensor, parts: Sequence[Tensor], scratch: Scratch) -> None:
        data, scales, rest = parts[0], parts[1].reshape(-1), parts[2:]
        kernel = self.decoder.kernel(out, data, scales, *rest, group=self.group)
        if kernel is not None and decode_by_kernel(*kernel):
            return
        step = self._rows(out.shape, on_host=scratch.on_host)
        with scratch.lent():
            constants = self.decoder.take_constants(out.dtype, self.group, rest, scratch)
            for start in range(0, len(out), step):
                chunk = out[start : start + step]
                begin, count = self.scale_count((start, out.shape[1])), self.scale_count(tuple(chunk.shape))
                of_chunk = Chunk(chunk, data[start : start + step], scales[begin : begin + count], constants)
                with scratch.lent():
                    self.decoder.decode(of_chunk, scratch)

    def scratch_bytes(self, shape: Sequence[int], *, on_host: bool) -> int:
        rows = self._rows(shape, on_host=on_host)
        padding = -rows % self.tile_rows  # the scales of a last tile that is not full
        per_row = self._row_bytes(shape, on_host=on_host)
        return (rows + padding) * per_row + self.decoder.constant_bytes(self.group)

    def _rows(self, shape: Sequence[int], *, on_host: bool) -> int:
        """Rows of a chunk: whole tiles."""
        row_bytes, kept = self._row_bytes(shape, on_host=on_host), self.decoder.constant_bytes(self.group)
        return chunk_rows(shape, row_bytes, on_host=on_host, kept=kept, tile=self.tile_rows)

    def _row_bytes(self, shape: Sequence[int], *, on_host: bool) -> int:
        return self.decoder.row_bytes(shape[1], on_host=on_host)


def load_kitchen() -> Any:
    """comfy-kitchen, a second to import. Raises ImportError, or AttributeError where it is too old."""
    import comfy_kitchen

    for name in ("dequantize_nvfp4", "dequantize_mxfp8", "dequantize_convrot_w4a4_weight"):
        getattr(comfy_kitchen, name)
    return comfy_kitchen


NVFP4 = KitchenCodec("nvfp4", 2, NVFP4_DECODER.block, NVFP4_DECODER)
MXFP8 = KitchenCodec("mxfp8", 1, MXFP8_DECODER.block, MXFP8_DECODER)
CONVROT_W4A4: Mapping[int, KitchenCodec] = {
    group: KitchenCodec(f"convrot_w4a4_{group}", 2, _NO_BLOCKS, CONVROT_W4A4_DECODER, group) for group in GROUPS
}
KITCHEN: Mapping[str, KitchenCodec] = {codec.dtype: codec for codec in (NVFP4, MXFP8, *CONVROT_W4A4.values())}
# by what notes call it: the dtypes of the data, of its scales, and of the tensor's scale; fp8 scales may be written as
# plain bytes
_PARTS = {
    "nvfp4": (("U8",), ("F8_E4M3", "U8"), ("F32",)),
    "mxfp8": (("F8_E4M3",), ("F8_E8M0", "U8")),
    "convrot_w4a4": (("I8",), ("F32",)),
}
_DATA = {NVFP4.dtype: torch.uint8, MXFP8.dtype: torch.float8_e4m3fn}  # the others' is int8
_EXPONENTS = "F8_E8M0"  # powers of two, as scales: seen as the bytes they are


class Kitchen(NotedFormat):
    """nvfp4, mxfp8 and convrot_w4a4."""

    dtypes = (*KITCHEN, _EXPONENTS)
    fp8_dtypes = (NVFP4.dtype, MXFP8.dtype, _EXPONENTS)
    codecs = tuple(KITCHEN.values())
    notes = tuple(_PARTS)

    def noted(self, note: Note) -> Tensors:
        entry, kind = note.entry, note.kind
        group = note.group() if kind == "convrot_w4a4" else None
        codec = KITCHEN[kind.upper()] if group is None else CONVROT_W4A4[group]
        shape = (*entry.shape[:-1], entry.shape[-1] * codec.packed) if entry.shape else ()
        if note.part("pre_quant_scale") is not None:
            raise WrongModel(
                "{where} has scales for its inputs (pre_quant_scale), which are not supported. Use a file in bf16, "
                "fp8 or int8.",
                code="comfy_quant.pre_quant_scale",
                where=note.where,
            )
        if not _fits(note, codec, shape):
            raise note.broken()
        if group is not None:
            note.require_rotated(group, shape)
        return note.weight_as(codec.dtype, shape)

    def require_packages(self, dtypes: Collection[str], path: Path) -> None:
        found = sorted(KITCHEN[dtype].name for dtype in KITCHEN.keys() & dtypes)
        if found:
            require_comfy_kitchen(path, f"weights in {', '.join(found)}", "0.2.26", load_kitchen)
        if MXFP8.dtype in dtypes and not hasattr(torch, "float8_e8m0fnu"):
            raise MissingPackage(
                "{file} holds weights in mxfp8, whose scales need torch 2.7 or newer; this is torch "
                "{version}.\n\nWhat to do: update torch with ComfyUI, or use a file in bf16, fp8 or int8.",
                code="package.torch_too_old",
                file=path,
                version=torch.__version__,
            )

    def recognise(self, name: str, tensors: Tensors) -> StoredParam | None:
        data = tensors[name]
        codec = KITCHEN.get(data.dtype)
        if codec is None:
            return None
        layer = name.removesuffix(".weight")
        scales = (tensors.get(f"{layer}.{scale}") for scale in SCALES)
        parts = (data, *(scale for scale in scales if scale))
        return StoredParam(name, data.shape, codec, parts, tile_rows=codec.tile_rows)

    def raw_layout(self, part: TensorEntry) -> Layout:
        if part.dtype == _EXPONENTS:
            return torch.uint8, part.shape
        return _DATA.get(part.dtype, torch.int8), KITCHEN[part.dtype].raw_shape(part.shape)


def _fits(note: Note, codec: KitchenCodec, shape: tuple[int, ...]) -> bool:
    """Whether the weight, `shape` without its packing, and its scales are what its note promises."""
    stored, *dtypes = _PARTS[note.kind]
    if note.entry.dtype not in stored or len(shape) != 2 or 0 in shape or shape[1] % codec.block:
        return False
    expected = zip(SCALES, dtypes, (codec.scale_count(shape), 1), strict=False)
    scales = [(note.part(name), kinds, count) for name, kinds, count in expected]
    return all(scale and scale.dtype in kinds and prod(scale.shape) == count for scale, kinds, count in scales)
