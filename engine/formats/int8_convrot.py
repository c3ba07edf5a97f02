"""int8 weights that ComfyUI has rotated ("convrot"), through comfy-kitchen, its own library. Never encodes."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.checkpoint import TensorEntry
from .chunks import even_rows
from .comfy_notes import GROUPS, Note, NotedFormat, require_comfy_kitchen
from .format import Layout, StoredParam, Tensors
from .neighbours import only_scale

# comfy-kitchen's codes of the dtypes that it decodes to (backends/eager/quantization.py: DTYPE_CODE_TO_DTYPE)
_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@dataclass(frozen=True)
class Int8ConvrotCodec:
    """Two parts: int8 data (N, K), and a scale of one element or of N. Each `group` neighbours of a row were multiplied
    with an orthogonal (Hadamard) matrix before they were quantized, which spreads outliers; decoding turns them back.

    Bit-equal to ComfyUI's own dequantization to the compute dtype; in chunks of whole rows, so that scratch memory
    stays small.
    """

    group: int

    @property
    def name(self) -> str:
        return f"int8_convrot{self.group}"

    def decode_into(self, out: Tensor, parts: Sequence[Tensor]) -> None:
        data, scale = parts[0], parts[1].reshape(-1, 1)
        dequantize, code, rows = load_operator(), _DTYPE_CODES[out.dtype], even_rows(out.shape)
        for start in range(0, len(out), rows):
            chunk = slice(start, start + rows)
            scales = scale[chunk] if len(scale) == len(data) else scale
            out[chunk].copy_(dequantize(data[chunk], scales, self.group, code))

    def scratch_bytes(self, shape: Sequence[int]) -> int:
        # a chunk in fp32 before and after it is turned, as the library does it where it has no kernel of its own, and
        # the matrix, which it keeps, while that is made
        return even_rows(shape) * shape[1] * 8 + self.group**2 * 8


@cache
def load_operator() -> Any:
    """comfy-kitchen's dequantization. Raises ImportError or AttributeError where it is missing or too old."""
    import comfy_kitchen  # noqa: F401  # registers the operator; takes a second, and most files need it not

    return torch.ops.comfy_kitchen.dequantize_int8_convrot_weight_dtype.default


INT8_CONVROT: Mapping[int, Int8ConvrotCodec] = {group: Int8ConvrotCodec(group) for group in GROUPS}
_OF_DTYPE = {codec.name.upper(): codec for codec in INT8_CONVROT.values()}


class Int8Convrot(NotedFormat):
    """ComfyUI's int8 where it is rotated."""

    dtypes = _OF_DTYPE.keys()
    codecs = tuple(INT8_CONVROT.values())
    notes = ("int8_tensorwise",)

    def noted(self, note: Note) -> Tensors | None:
        note.require_scaled("I8")
        group = note.rotation()
        if group is None:
            return None
        note.require_rotated(group, note.entry.shape)
        return note.weight_as(INT8_CONVROT[group].name.upper())

    def require_packages(self, dtypes: Collection[str], path: Path) -> None:
        if not _OF_DTYPE.keys().isdisjoint(dtypes):
            require_comfy_kitchen(path, "rotated int8 weights (convrot)", "0.2.15", load_operator)

    def recognise(self, name: str, tensors: Tensors) -> StoredParam | None:
        data = tensors[name]
        scale = only_scale(name, tensors)
        return None if scale is None else StoredParam(name, data.shape, _OF_DTYPE[data.dtype], (data, scale))

    def raw_layout(self, part: TensorEntry) -> Layout:
        return torch.int8, part.shape
