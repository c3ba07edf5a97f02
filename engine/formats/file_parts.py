"""How a weight in a format is written to a safetensors file, so that others read it too. Writes nothing itself."""

from dataclasses import dataclass
from math import prod
from typing import Protocol

from .format import Encoder
from .plain import TORCH_DTYPES

ALIGNMENT = 8  # of a matrix's first byte among a file's data


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


class FileEncoder(Encoder, Protocol):
    """An encoder whose parts a file can hold."""

    def file_parts(self, name: str, shape: tuple[int, ...], source: str) -> tuple[Part, ...]:
        """The tensors that store the weight `name`, a matrix of `shape` that was in torch's dtype `source` before:
        those that `encode` gives, in that order, and known ones."""


def name_beside(weight: str, part: str) -> str:
    """What a part is called that lies beside `<layer>.weight`."""
    return f"{weight.removesuffix('weight')}{part}"
