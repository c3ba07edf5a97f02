"""The functions behind the kernels of attention: torch's variants, and other packages'. Each is imported when it is
asked for; none is fetched from anywhere.

Signatures are those of flash-attn 2.8, xformers 0.0.35, sageattention 1.0.6 to 2.2 and comfy-kitchen 0.2.40.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..hardware import FLOATS
from .attention import Operands, torchs_own
from .attention_kernels import (
    FLASH,
    FUSED,
    KITCHEN_INT8,
    PYTORCH_EFFICIENT,
    PYTORCH_FLASH,
    SAGE,
    SPLIT,
    XFORMERS,
    AttentionKernel,
)

HALVES = frozenset((torch.float16, torch.bfloat16))


def _torchs_own(module: ModuleType, operands: Operands) -> Tensor:
    return torchs_own(operands)


def _by_backend(backend: SDPBackend) -> Callable[[ModuleType, Operands], Tensor]:
    def attend(module: ModuleType, operands: Operands) -> Tensor:
        with sdpa_kernel(backend):
            return torchs_own(operands)

    return attend


def _tokens_first(attend: Callable[..., Tensor], operands: Operands, **options: Any) -> Tensor:
    """Of functions that take (B, L, H, D)."""
    query, key, value = (part.transpose(1, 2) for part in (operands.query, operands.key, operands.value))
    return attend(query, key, value, **options).transpose(1, 2)


def _flash(module: ModuleType, operands: Operands) -> Tensor:
    return _tokens_first(module.flash_attn_func, operands, softmax_scale=operands.scale)


def _xformers(module: ModuleType, operands: Operands) -> Tensor:
    return _tokens_first(module.memory_efficient_attention, operands, scale=operands.scale)


def _sage(module: ModuleType, operands: Operands) -> Tensor:
    given = operands
    out: Tensor = module.sageattn(given.query, given.key, given.value, tensor_layout="HND", sm_scale=given.scale)
    return out


def _kitchen_int8(module: ModuleType, operands: Operands) -> Tensor:
    given = operands
    out: Tensor = module.int8_attention(given.query, given.key, given.value, scale=given.scale, attn_mask=given.mask)
    return out


def _has_int8_kernel(module: ModuleType, device: torch.device) -> bool:
    """comfy-kitchen's question of a device; an older one has no such kernel."""
    return hasattr(module, "int8_attention") and bool(module.int8_attention_is_available(device))


@dataclass(frozen=True)
class KernelFunction:
    """How a kernel is called. module: what is imported, of the package that pip calls `package`. head_dims: that it
    takes; empty: any. masks, shared_keys: whether it takes these. devices: types that it runs on; works_on asks for
    more of the module and the device."""

    kernel: AttentionKernel
    module: str
    attend: Callable[[ModuleType, Operands], Tensor]
    package: str = "torch"
    dtypes: frozenset[torch.dtype] = FLOATS
    head_dims: frozenset[int] = frozenset()
    masks: bool = False
    shared_keys: bool = False
    devices: frozenset[str] = frozenset(("cuda",))
    works_on: Callable[[ModuleType, torch.device], bool] = lambda module, device: True

    def imported(self) -> ModuleType:
        """Raises what importing the package raises."""
        return importlib.import_module(self.module)

    @property
    def version(self) -> str:
        """Of the package; empty where its metadata are missing."""
        try:
            return version(self.package) or ""
        except (PackageNotFoundError, KeyError):
            return ""

    def lacks(self, operands: Operands) -> str:
        """What of this product it does not do; empty where it does all."""
        head_dim = operands.query.shape[-1]
        if (operands.mask is not None or operands.causal) and not self.masks:
            return "takes no mask"
        if operands.causal:
            return "is not used for causal attention"
        if operands.shares_keys and not self.shared_keys:
            return "does not support heads that share keys"
        if self.head_dims and head_dim not in self.head_dims:
            return f"does not support heads of {head_dim} numbers"
        if operands.query.dtype not in self.dtypes:
            return f"does not compute in {str(operands.query.dtype).removeprefix('torch.')}"
        return ""


_UP_TO_256 = frozenset(range(8, 257, 8))
ANY_DEVICE = frozenset(("cuda", "xpu", "mps", "cpu"))

# by the names that a person chooses; the first three are torch's own
FUNCTIONS: dict[str, KernelFunction] = {
    function.kernel.name: function
    for function in (
        KernelFunction(
            FUSED,
            "torch",
            _torchs_own,
            masks=True,
            shared_keys=True,
            devices=ANY_DEVICE,
        ),
        KernelFunction(
            SPLIT,
            "torch",
            _by_backend(SDPBackend.MATH),
            masks=True,
            shared_keys=True,
            devices=ANY_DEVICE,
        ),
        KernelFunction(PYTORCH_FLASH, "torch", _by_backend(SDPBackend.FLASH_ATTENTION), shared_keys=True),
        KernelFunction(PYTORCH_EFFICIENT, "torch", _by_backend(SDPBackend.EFFICIENT_ATTENTION), masks=True),
        KernelFunction(FLASH, "flash_attn", _flash, "flash-attn", HALVES, head_dims=_UP_TO_256, shared_keys=True),
        KernelFunction(XFORMERS, "xformers.ops", _xformers, "xformers"),
        KernelFunction(SAGE, "sageattention", _sage, "sageattention", HALVES, head_dims=frozenset((64, 96, 128))),
        KernelFunction(
            KITCHEN_INT8,
            "comfy_kitchen",
            _kitchen_int8,
            "comfy-kitchen",
            head_dims=frozenset(range(1, 257)),
            masks=True,
            shared_keys=True,
            works_on=_has_int8_kernel,
        ),
    )
}
