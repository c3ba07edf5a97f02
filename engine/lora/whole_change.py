"""A change that takes its whole weight at once, such as a rotation of its rows; who computes it hands it in."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod

from torch import Tensor

from ..files.checkpoint import TensorEntry


class WholeChange(ABC):
    """A change of a matrix of `shape` that is computed on all of it in fp32, from `parts`."""

    @property
    @abstractmethod
    def kind(self) -> str: ...

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]: ...

    @property
    @abstractmethod
    def parts(self) -> tuple[TensorEntry, ...]: ...

    @property
    @abstractmethod
    def allocated_bytes(self) -> int:
        """The most that `change` allocates beside the weight and the parts, where they lie."""

    @abstractmethod
    def change(self, weight: Tensor, parts: Sequence[Tensor], strength: float) -> None:
        """Change `weight` (rows, columns), contiguous fp32, in place. Raises Unsupported where that cannot be done."""

    @property
    def weight_elements(self) -> int:
        return prod(self.shape)
