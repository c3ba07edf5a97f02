"""int8 weights that ComfyUI has rotated ("convrot"), through comfy-kitchen, its own library. Never encodes."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.checkpoint import TensorEntry
from .chunks import chunk_rows
from .comfy_notes import GROUPS, Note, NotedFormat, require_comfy_kitchen
from .format import Layout, StoredParam, Tensors
from .kitchen_kernels import decode_by_kernel
from .neighbours import only_scale
from .rotation import hadamard_bytes, take_hadamard, unrotate
from .scaling import scaled
from .scratch import ALIGNMENT, Scratch, padded

_OPERATOR = "dequantize_int8_convrot_weight_dtype"
_KERNELS_GROUP = 256  # the one that comfy-kitchen has a kernel for
# its codes of the dtypes that it decodes to (backends/eager/quantization.py: DTYPE_CODE_TO_DTYPE)
_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@dataclass(frozen=True)
class Int8ConvrotCodec:
    """Two parts: int8 data (N, K), and a scale of one element or of N. Each `group` neighbours of a row were multiplied
    with an orthogonal (Hadamard) matrix before they were quantized, which spreads outliers; decoding turns them back.

    Bit-equal to ComfyUI's own dequantization to the compute dtype: by comfy-kitchen's kernel where it has one for the
    device, else by the same operators in the same order, in chunks of whole rows.
    """

    group: int

    @property
    def name(self) -> str:
        return f"int8_convrot{self.group}"

    def decode_into(self, out: Tensor, parts: Sequence[Tensor], scratch: Scratch) -> None:
        data, scale = parts[0], parts[1].reshape(-1, 1)
        arguments = {"q": data, "scale": scale, "group_size": self.group, "output_dtype_code": _DTYPE_CODES[out.dtype]}
        if self.group == _KERNELS_GROUP and decode_by_kernel(_OPERATOR, out, arguments):
            return
        step = self._rows(out.shape, on_host=scratch.on_host)
        with scratch.lent():
            hadamard = take_hadamard(self.group, torch.float32, scratch)
            for start in range(0, len(out), step):
                rows = slice(start, start + step)
                scales = scale[rows] if len(scale) == len(data) else scale
                with scratch.lent():
                    rotated = scaled(data[rows], scales, scratch)
                    out[rows].copy_(unrotate(scratch.take(*rotated.shape), rotated, hadamard))

    def scratch_bytes(self, shape: Sequence[int], *, on_host: bool) -> int:
        # a chunk in fp32 before and after it is turned, and the matrix
        return 2 * padded(self._rows(shape, on_host=on_host) * shape[1] * 4) + hadamard_bytes(self.group)

    def _rows(self, shape: Sequence[int], *, on_host: bool) -> int:
        return chunk_rows(shape, shape[1] * 8, on_host=on_host, kept=hadamard_bytes(self.group) + 2 * ALIGNMENT)


@cache
def load_operator() -> Any:
    """comfy-kitchen's dequantization. Raises ImportError or AttributeError where it is missing or too old."""
    import comfy_kitchen  # noqa: F401  # registers the operator; takes a second, and most files need it not

    return getattr(torch.ops.comfy_kitchen, _OPERATOR).default


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
