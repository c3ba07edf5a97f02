"""comfy-kitchen's kernels for one device, where it has any of its own, made to write where the weight is wanted.

Its functions return what they allocate. Here the first tensor of the weight's shape and dtype that one asks torch for
is the weight's own memory, so that nothing is allocated and nothing is copied. Where one takes its memory in another
way, its result is copied.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# comfy-kitchen's own forms for any device, made of many operators of torch's
_FOR_ANY_DEVICE = "comfy_kitchen.backends.eager"


def decode_by_kernel(name: str, out: Tensor, arguments: Mapping[str, Any]) -> bool:
    """Whether comfy-kitchen has a kernel of that name for these arguments; then it has written `out`."""
    kernel = _kernel(name, arguments)
    if kernel is None:
        return False
    with _ResultIn(out):
        result = kernel(**arguments)
    if result is not out:
        out.copy_(result)
    return True


def _kernel(name: str, arguments: Mapping[str, Any]) -> Callable[..., Tensor] | None:
    try:
        from comfy_kitchen.registry import registry
    except ImportError:  # older than its registry
        return None
    found: Callable[..., Tensor] = registry.get_implementation(name, kwargs=arguments)
    return None if found.__module__.startswith(_FOR_ANY_DEVICE) else found


class _ResultIn(TorchFunctionMode):
    """Answers the first call for an empty tensor like `out` with `out`."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self._out: Tensor | None = out

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = self._out
        if out is not None and func is torch.empty and _is_like(out, args, kwargs):
            self._out = None
            return out
        return func(*args, **kwargs)


def _is_like(out: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    size = kwargs.get("size", args[0] if len(args) == 1 and not isinstance(args[0], int) else args)
    device = torch.device(kwargs.get("device", "cpu"))
    same_device = device.type == out.device.type and device.index in (None, out.device.index)
    return tuple(size) == tuple(out.shape) and kwargs.get("dtype") is out.dtype and same_device
