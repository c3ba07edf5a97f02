"""Products with a weight as it is stored: x is quantized as the format defines, and the stored numbers are multiplied.

Each is comfy-kitchen's, by its own kernels where it has any for the device. What it computes is another result than
that of the decoded weight, within what quantizing x costs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from ..formats.scratch import SCRATCH_BYTES
from .linear_layers import LayerScratch

# comfy-kitchen's codes of the dtypes that it answers in (backends/eager/quantization.py: DTYPE_CODE_TO_DTYPE)
_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_GROUP = 256  # that its functions take for granted where nothing is rotated
# its forms for any device, made of many operators of torch's, which take more memory than the result
FOR_ANY_DEVICE = "eager"
_LEAST_ROWS = 64


class StoredProduct(Protocol):
    """x @ weight.T + bias of a weight's stored parts, the data first. Values: equal ones compute the same."""

    @property
    def name(self) -> str:
        """What a person reads: the numbers that are multiplied."""

    @property
    def backend(self) -> str:
        """Of comfy-kitchen's, that computes it."""

    def __call__(self, x: Tensor, parts: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        """(M, N) in the dtype of x, (M, K) contiguous."""

    def some_parts(self, rows: int, columns: int, device: torch.device) -> list[Tensor]:
        """Of a weight of that shape, of any numbers, to measure with."""

    def row_bytes(self, columns: int, rows: int, element_bytes: int) -> int:
        """What it takes beside x and the result for each row of x; of a weight (rows, columns)."""

    def fixed_bytes(self, columns: int, rows: int) -> int:
        """What it takes however many rows x has."""


@dataclass(frozen=True)
class Int8Product:
    """int8 with a scale of one number or of one per row: rows of x are quantized to int8. `group`: neighbours of a row
    that were rotated together, as those of x are then; None where none were. factor: what scales are multiplied with.
    """

    backend: str
    group: int | None = None
    factor: float = 1.0
    name = "int8"

    def __call__(self, x: Tensor, parts: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        data, scale = parts
        if self.factor != 1:
            scale = scale.float() * self.factor
        return load_int8()(x, data, scale, bias, _DTYPE_CODES[x.dtype], self.group is not None, self.group or _GROUP)

    def some_parts(self, rows: int, columns: int, device: torch.device) -> list[Tensor]:
        data = torch.ones(rows, columns, dtype=torch.int8, device=device)
        return [data, torch.ones(rows, 1, device=device)]

    def row_bytes(self, columns: int, rows: int, element_bytes: int) -> int:
        if self.backend != FOR_ANY_DEVICE:
            return columns + 4
        rotated = columns * element_bytes if self.group else 0
        # x in fp32 while it is quantized; then the product in int32, fp32, its scales, scaled, and rounded twice
        return columns + 4 + rotated + max(2 * 4 * columns, rows * (4 * 4 + 2 * element_bytes))

    def fixed_bytes(self, columns: int, rows: int) -> int:
        if self.backend != FOR_ANY_DEVICE:
            return 0
        return rows * (columns + 4) + 4 * (self.group or 0) ** 2  # the weight, turned; what turns x


@cache
def load_int8() -> Any:
    """comfy-kitchen's operator. Raises ImportError or AttributeError where it is missing or too old."""
    import comfy_kitchen  # noqa: F401  # registers the operator; takes a second

    return torch.ops.comfy_kitchen.int8_linear.default


def rows_at_once(product: StoredProduct, columns: int, rows: int, element_bytes: int) -> int | None:
    """How many rows of x are multiplied at a time, so that what is taken beside them stays small; None: all. Depends on
    the weight's shape alone, so that results do not depend on memory."""
    if product.backend != FOR_ANY_DEVICE:
        return None
    return max(_LEAST_ROWS, SCRATCH_BYTES // product.row_bytes(columns, rows, element_bytes))


def layer_scratch(product: StoredProduct, columns: int, rows: int, element_bytes: int) -> LayerScratch:
    """What a layer takes that computes so."""
    return LayerScratch(
        columns,
        rows,
        product.row_bytes(columns, rows, element_bytes),
        product.fixed_bytes(columns, rows),
        rows_at_once(product, columns, rows, element_bytes),
    )
