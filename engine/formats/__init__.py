"""How weights are stored: a table from format name to codec, and which codec a file's tensors call for.

A codec turns a parameter's stored parts (its data, then its scales) into one tensor of the compute dtype.
Formats never move memory between devices: parts and destination lie on the same one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from ..errors import WrongModel
from ..files.checkpoint import TensorEntry
from ..texts import printable
from .bnb4 import FP4, NF4
from .gguf import GGUF, GgufCodec
from .int8 import BNB_INT8, INT8
from .int8_convrot import INT8_CONVROT
from .kitchen import KITCHEN, SCALES
from .kitchen_w4a8 import W4A8, W4A8_PARTS
from .nunchaku import AWQ, AWQ_BIAS, NUNCHAKU, PARTS, SVDQ, SVDQ_BIAS, SVDQ_SHIFTED_BIAS
from .plain import PLAIN, TORCH_DTYPES
from .scaled_fp8 import SCALED_FP8

__all__ = [
    "CODECS",
    "ENCODERS",
    "TORCH_DTYPES",
    "Codec",
    "Encoder",
    "StoredParam",
    "is_native",
    "raw_layout",
    "stored_param",
]


class Codec(Protocol):
    """How the weights of one storage format are decoded."""

    @property
    def name(self) -> str: ...

    def decode_into(self, out: Tensor, parts: Sequence[Tensor]) -> None:
        """Write the weight that `parts` store into `out` (contiguous, compute dtype)."""

    def scratch_bytes(self, shape: Sequence[int]) -> int:
        """The most that decoding a weight of `shape` allocates beside `out`, where `out` lies."""


class Encoder(Codec, Protocol):
    """A format that weights can also be brought into."""

    def encode(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The parts that store `weight`."""


ENCODERS: Mapping[str, Encoder] = {codec.name: codec for codec in (*PLAIN, *SCALED_FP8, INT8, NF4, FP4)}
_NUNCHAKU: tuple[Codec, ...] = (*SVDQ.values(), SVDQ_BIAS, SVDQ_SHIFTED_BIAS, AWQ, AWQ_BIAS)
_DECODERS: tuple[Codec, ...] = (BNB_INT8, *INT8_CONVROT.values(), *KITCHEN.values(), *W4A8.values(), *GGUF, *_NUNCHAKU)
CODECS: Mapping[str, Codec] = {**ENCODERS, **{codec.name: codec for codec in _DECODERS}}

_PLAIN_OF_DTYPE = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F8_E4M3": "fp8_e4m3fn", "F8_E5M2": "fp8_e5m2"}
_GGUF_OF_DTYPE: Mapping[str, GgufCodec] = {codec.type: codec for codec in GGUF}
_BNB_OF_DTYPE = {"NF4": NF4.name, "FP4": FP4.name}
_BNB_SCALES = ("absmax", "nested_absmax", "nested_quant_map", "nested_offset")
# ComfyUI's int8 is told by its notes (comfy_quant.py)
_INT8_OF_DTYPE = {name.upper(): name for name in (INT8.name, *(codec.name for codec in INT8_CONVROT.values()))}
_SCALED_OF_DTYPE = {"F8_E4M3": "fp8_e4m3fn_scaled", "F8_E5M2": "fp8_e5m2_scaled", **_INT8_OF_DTYPE}
_KITCHEN_DATA = {"nvfp4": torch.uint8, "mxfp8": torch.float8_e4m3fn}
# what is decoded by casting fp8 numbers, whatever tensors hold them
FP8_DTYPES = frozenset({"F8_E4M3", "F8_E5M2", "F8_E8M0", "NVFP4", "MXFP8"})
# what a scale is called beside `<layer>.weight`: older and newer ComfyUI files
_SCALE_NAMES = ("scale_weight", "weight_scale")
# of ComfyUI's formats, whose weights say nothing of themselves
_NOTED_DTYPES = ("I8", "U8")
_LOST_NOTES = "If ComfyUI quantized it, its notes (comfy_quant) were lost since: use the file as it was. "
# what may stand beside a quantized weight and says nothing of it: scales of what goes in and out
_NOT_OF_THE_WEIGHT = ("weight", "bias", "input_scale", "scale_input", "output_scale", "scale_output")


@dataclass(frozen=True)
class StoredParam:
    """A parameter as a file stores it: the codec's name and its parts, the data first."""

    name: str
    shape: tuple[int, ...]
    codec: str
    parts: tuple[TensorEntry, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def read_beside(self) -> str | None:
        """The parameter whose decoded weight its codec reads as a last part."""
        return f"{self.name.removesuffix('bias')}weight" if self.codec == SVDQ_SHIFTED_BIAS.name else None

    @property
    def scratch_bytes(self) -> int:
        """What decoding it allocates for a moment."""
        return CODECS[self.codec].scratch_bytes(self.shape)


def raw_layout(part: TensorEntry) -> tuple[torch.dtype, tuple[int, ...]]:
    """How a part's bytes are seen as a tensor: its own dtype and shape, or the bytes of its blocks row by row."""
    if part.dtype in _BNB_OF_DTYPE:
        return torch.uint8, (part.nbytes,)
    if part.dtype in _GGUF_OF_DTYPE:
        return torch.uint8, _GGUF_OF_DTYPE[part.dtype].raw_shape(part.shape)
    if part.dtype in _INT8_OF_DTYPE:
        return torch.int8, part.shape
    if part.dtype in KITCHEN:
        codec = KITCHEN[part.dtype]
        return _KITCHEN_DATA.get(codec.name, torch.int8), codec.raw_shape(part.shape)
    if part.dtype in W4A8 or part.dtype in SVDQ:
        return torch.int8, (part.shape[0], part.shape[1] // 2)
    if part.dtype == AWQ.name.upper():
        return torch.int32, (part.shape[0] // 4, part.shape[1] // 2)
    if part.dtype in NUNCHAKU:  # a bias
        return TORCH_DTYPES[part.dtype.rpartition("_")[2]], part.shape
    if part.dtype == "F8_E8M0":  # powers of two, as scales: the bytes they are
        return torch.uint8, part.shape
    return TORCH_DTYPES[part.dtype], part.shape


def is_native(param: StoredParam, compute: str) -> bool:
    """True where the stored bytes are the compute dtype's (`compute` is a format name such as "bf16")."""
    return param.codec == compute


def stored_param(name: str, tensors: Mapping[str, TensorEntry], where: str) -> StoredParam:
    """The parameter `name` of `tensors` with the codec that its dtype and its neighbours' names call for.

    Raises WrongModel for a dtype or a quantization that no codec here reads; `where` names the file.
    """
    data = tensors[name]
    layer = name.removesuffix(".weight")
    if data.dtype in _BNB_OF_DTYPE:
        parts = (f"{name}.{part}" for part in _BNB_SCALES)
        return StoredParam(
            name, data.shape, _BNB_OF_DTYPE[data.dtype], (data, *(tensors[part] for part in parts if part in tensors))
        )
    if data.dtype == "I8" and name != layer and (row_maxima := tensors.get(f"{layer}.SCB")) is not None:
        if not _is_scale(row_maxima, data) or row_maxima.shape != data.shape[:1]:
            raise _unknown_format(where, name, data)
        return StoredParam(name, data.shape, BNB_INT8.name, (data, row_maxima))
    if data.dtype in KITCHEN:
        found = (tensors.get(f"{layer}.{scale}") for scale in SCALES)
        return StoredParam(name, data.shape, KITCHEN[data.dtype].name, (data, *(scale for scale in found if scale)))
    if data.dtype in W4A8:
        found = (tensors.get(f"{layer}.{part}") for part in W4A8_PARTS)
        return StoredParam(name, data.shape, W4A8[data.dtype].name, (data, *(part for part in found if part)))
    if data.dtype in NUNCHAKU:
        return _nunchaku_param(name, data, tensors)
    scales = [tensors[f"{layer}.{scale}"] for scale in _SCALE_NAMES if f"{layer}.{scale}" in tensors]
    others = _others_beside(name, tensors)
    narrow = data.dtype not in ("F32", "F16", "BF16")
    if any(narrow or other.startswith("weight_") for other in others):
        raise _unknown_format(where, name, data, others)  # a second scale, or one of another meaning
    if name != layer and scales:
        if data.dtype not in _SCALED_OF_DTYPE or len(scales) != 1 or not _is_scale(scales[0], data):
            raise _unknown_format(where, name, data, [scale for scale in _SCALE_NAMES if f"{layer}.{scale}" in tensors])
        return StoredParam(name, data.shape, _SCALED_OF_DTYPE[data.dtype], (data, scales[0]))
    if data.dtype in _GGUF_OF_DTYPE and data.shape:
        return StoredParam(name, data.shape, _GGUF_OF_DTYPE[data.dtype].name, (data,))
    if data.dtype not in _PLAIN_OF_DTYPE:
        raise _unknown_format(where, name, data)
    return StoredParam(name, data.shape, _PLAIN_OF_DTYPE[data.dtype], (data,))


def _nunchaku_param(name: str, data: TensorEntry, tensors: Mapping[str, TensorEntry]) -> StoredParam:
    codec, layer = NUNCHAKU[data.dtype], name.rpartition(".")[0]
    beside = ("proj_down", "proj_up") if codec is SVDQ_SHIFTED_BIAS else PARTS.get(type(codec), ())
    found = (tensors.get(f"{layer}.{part}") for part in beside)
    return StoredParam(name, data.shape, codec.name, (data, *(part for part in found if part)))


def _is_scale(scale: TensorEntry, data: TensorEntry) -> bool:
    """Whether the scale of a matrix is one number, or one for each row."""
    floating = scale.dtype in ("F32", "F16", "BF16")
    return floating and len(data.shape) == 2 and prod(scale.shape) in (1, data.shape[0])


def _others_beside(name: str, tensors: Mapping[str, TensorEntry]) -> list[str]:
    """What a layer holds that neither is its weight's scale nor has nothing to do with it."""
    layer = name.removesuffix(".weight")
    if layer == name:
        return []
    beside = (other.removeprefix(f"{layer}.") for other in tensors if other.startswith(f"{layer}."))
    return [other for other in beside if other not in (*_SCALE_NAMES, *_NOT_OF_THE_WEIGHT)]


def _unknown_format(where: str, name: str, data: TensorEntry, beside: Sequence[str] = ()) -> WrongModel:
    stored = f"{where}: {name} is stored as {data.dtype}{list(data.shape)}"
    if data.dtype == "F64":
        return WrongModel(f"{stored}, which is not read. Save the model in fp32, bf16 or fp16.")
    scales = f" (beside it: {', '.join(map(printable, beside[:3])):.99})" if beside else ""
    lost = _LOST_NOTES if data.dtype in _NOTED_DTYPES and "weight_scale" in beside else ""
    return WrongModel(
        f"{stored} in a quantization that is not supported{scales}. {lost}Use a bf16, fp16, fp32, fp8 or fp8-scaled "
        "file, one of ComfyUI's own formats (int8, convrot, nvfp4, mxfp8), GGUF, bitsandbytes (nf4, fp4, int8) or "
        "nunchaku."
    )
