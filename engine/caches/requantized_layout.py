"""The formats that weights can be brought into at their first load, and the tensors that store a matrix then."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..files.checkpoint import TensorEntry
from ..formats import StoredParam
from ..formats.bnb4 import FP4, NF4
from ..formats.file_parts import FileEncoder, Part
from ..formats.int8 import BNB_INT8
from ..formats.scaled_fp8 import SCALED_FP8

# what a person can choose -> its codec; int8 is stored with each row's largest value
FORMATS: Mapping[str, FileEncoder] = {SCALED_FP8[0].name: SCALED_FP8[0], "int8": BNB_INT8, "nf4": NF4, "fp4": FP4}
# what can be quantized -> torch's names of these dtypes
UNQUANTIZED = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


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
    parts = FORMATS[weight_format].file_parts(prefix + param.name, param.shape, UNQUANTIZED[param.codec])
    return Matrix(param.parts[0], parts)
