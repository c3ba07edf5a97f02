"""Products of weights in int8 and fp8 as they are stored, by comfy-kitchen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .stored_products import FOR_ANY_DEVICE, WORKSPACE_BYTES, OfAnyRows

# comfy-kitchen's codes of the dtypes that it answers in (backends/eager/quantization.py: DTYPE_CODE_TO_DTYPE)
_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_GROUP = 256  # that its functions take for granted where nothing is rotated
_FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Int8Product(OfAnyRows):
    """int8 with a scale of one number or of one per row: rows of x are quantized to int8. `group`: neighbours of a row
    that were rotated together, as those of x are then; None where none were. factor: what scales are multiplied with.
    """

    backend: str
    group: int | None = None
    factor: float = 1.0
    name = "int8"
    parts_by_row = 2

    def __call__(self, x: Tensor, parts: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        data, scale = parts[0], parts[1].float()
        if self.factor != 1:
            scale = scale * self.factor
        return load_int8()(x, data, scale, bias, _DTYPE_CODES[x.dtype], self.group is not None, self.group or _GROUP)

    def some_parts(self, rows: int, columns: int, device: torch.device) -> list[Tensor]:
        data = torch.ones(rows, columns, dtype=torch.int8, device=device)
        return [data, torch.ones(rows, 1, device=device)]

    def row_bytes(self, columns: int, rows: int, element_bytes: int) -> int:
        if self.backend != FOR_ANY_DEVICE:
            return columns + 4 + 4 * rows  # and where no kernel of its own fits, the product in int32
        rotated = columns * element_bytes if self.group else 0
        # x in fp32 while it is quantized; then the product in int32, fp32, its scales, scaled, and rounded twice
        return columns + 4 + rotated + max(2 * 4 * columns, rows * (4 * 4 + 2 * element_bytes))

    def fixed_bytes(self, columns: int, rows: int) -> int:
        if self.backend != FOR_ANY_DEVICE:
            return WORKSPACE_BYTES
        return rows * (columns + 4) + 4 * (self.group or 0) ** 2  # the weight, turned; what turns x


@dataclass(frozen=True)
class Fp8Product(OfAnyRows):
    """fp8 (e4m3) with one scale for the whole weight: x is brought to fp8 as it is, or divided by what the file gives
    as the last part; never by what would depend on how many tokens are multiplied at a time."""

    backend: str
    name = "fp8"
    parts_by_row = 1

    def __call__(self, x: Tensor, parts: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        quantize, multiply = load_fp8()
        data, scale, *given = (part if part.dtype == _FP8 else part.float().reshape(()) for part in parts)
        x_scale = given[0] if given else torch.ones((), device=x.device)
        scales = {"scale_a": x_scale, "scale_b": scale}
        return multiply(quantize(x, x_scale, _FP8), data.t(), **scales, bias=bias, out_dtype=x.dtype)

    def some_parts(self, rows: int, columns: int, device: torch.device) -> list[Tensor]:
        one = torch.ones((), device=device)
        return [torch.ones(rows, columns, device=device).to(_FP8), one, one]

    def row_bytes(self, columns: int, rows: int, element_bytes: int) -> int:
        temporary = 2 * element_bytes if self.backend == FOR_ANY_DEVICE else 0  # scaled, and within range
        return columns * (1 + temporary)

    def fixed_bytes(self, columns: int, rows: int) -> int:
        return 0


@cache
def load_fp8() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """comfy-kitchen's way to fp8, and its product. Raises ImportError or AttributeError where they are missing."""
    import comfy_kitchen
    from comfy_kitchen.scaled_mm_v2 import scaled_mm_v2

    return comfy_kitchen.quantize_per_tensor_fp8, scaled_mm_v2


@cache
def load_int8() -> Any:
    """comfy-kitchen's operator. Raises ImportError or AttributeError where it is missing or too old."""
    import comfy_kitchen  # noqa: F401  # registers the operator; takes a second

    return torch.ops.comfy_kitchen.int8_linear.default
