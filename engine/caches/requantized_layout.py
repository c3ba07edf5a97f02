"""How a quantized matrix is written to a safetensors file: the tensors of each format, with names, dtypes and sizes.

bitsandbytes' layout for int8 (LLM.int8()), nf4 and fp4, ComfyUI's for scaled fp8: others read these files too.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from ..files.checkpoint import TensorEntry
from ..formats import TORCH_DTYPES, Encoder, StoredParam
from ..formats.bnb4 import BLOCK, FP4, NF4, Bnb4Codec
from ..formats.int8 import BNB_INT8
from ..formats.scaled_fp8 import SCALED_FP8

# what a person can choose -> its codec; int8 is stored with each row's largest value
FORMATS: Mapping[str, Encoder] = {SCALED_FP8[0].name: SCALED_FP8[0], "int8": BNB_INT8, "nf4": NF4, "fp4": FP4}
# what can be quantized -> bitsandbytes' names of these dtypes
UNQUANTIZED = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
ALIGNMENT = 8  # of a matrix's first byte among the data


@dataclass(frozen=True)
class Part:
    """A tensor of the file. `known`: its bytes, where no weight decides them. `held`: dtype and shape as a
    TensorEntry has them once the file is open, where they differ."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    known: bytes | None = None
    held: tuple[str, tuple[int, ...]] | None = None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Matrix:
    """A weight of the source, and the tensors that are to store it: those that its codec gives in that order, and
    known ones."""

    source: TensorEntry
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def quantized_matrix(prefix: str, param: StoredParam, weight_format: str) -> Matrix:
    """How `param`, a matrix in one of UNQUANTIZED, is stored in one of FORMATS; `prefix` stands before its name."""
    name, codec = prefix + param.name, FORMATS[weight_format]
    layer, shape = name.removesuffix("weight"), param.shape
    if isinstance(codec, Bnb4Codec):
        return Matrix(param.parts[0], _four_bit(name, shape, codec, UNQUANTIZED[param.codec]))
    if codec is BNB_INT8:
        return Matrix(param.parts[0], (Part(name, "I8", shape), Part(f"{layer}SCB", "F32", shape[:1])))
    return Matrix(param.parts[0], (Part(name, "F8_E4M3", shape), Part(f"{layer}scale_weight", "F32", ())))


def _four_bit(name: str, shape: tuple[int, ...], codec: Bnb4Codec, dtype: str) -> tuple[Part, ...]:
    count = prod(shape)
    parts = (
        # in the file without its shape, which the quant state tells
        Part(name, "U8", ((count + 1) // 2, 1), held=(codec.name.upper(), shape)),
        Part(f"{name}.absmax", "F32", (-(-count // BLOCK),)),
        Part(f"{name}.quant_map", "F32", (16,), known=codec.code.numpy().tobytes()),
    )
    note = {"quant_type": codec.name, "blocksize": BLOCK, "dtype": dtype, "shape": list(shape)}
    raw = json.dumps(note).encode()
    raw += b" " * (-(len(raw) + sum(part.nbytes for part in parts)) % ALIGNMENT)
    return (*parts, Part(f"{name}.quant_state.bitsandbytes__{codec.name}", "U8", (len(raw),), known=raw))
