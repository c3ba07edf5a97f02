"""Tensors on "cuda:N" whose bytes lie in host memory, and the mode that brings every operator on them here."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .allocator import Allocation

if TYPE_CHECKING:
    from .device import SimulatedGPU


class DeviceTensor(Tensor):
    """`inner`: the same elements as a tensor on the host, in its allocation's memory. Only work on streams, which may
    run long after it was issued, reads or writes it."""

    inner: Tensor
    allocation: Allocation
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, allocation: Allocation, device: torch.device) -> "DeviceTensor":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=device,
            requires_grad=False,
        )
        tensor.inner, tensor.allocation = inner, allocation
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpu = next(t for t in tensors_in((args, tuple((kwargs or {}).values()))) if type(t) is DeviceTensor)
        return gpu.allocation.gpu.dispatch(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype}, {self.device})"


class DeviceMode(TorchDispatchMode):
    """Within it, tensors can be made on the device, and reads and writes of page-locked memory are seen."""

    def __init__(self, gpu: "SimulatedGPU") -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._gpu.dispatch(func, args, kwargs or {})


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Of an operator's arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def on_host(value: Any) -> Any:
    """The same arguments with the inner tensors of those on the device."""
    return map_tensors(lambda tensor: tensor.inner if isinstance(tensor, DeviceTensor) else tensor, value)


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """The same arguments or results with what `function` makes of each tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)([map_tensors(function, item) for item in value])
    if isinstance(value, Mapping):
        return {name: map_tensors(function, item) for name, item in value.items()}
    return value


def view_of(base: DeviceTensor, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a view operator returns: other tensors of the same allocation. No work for the device."""
    with torch.inference_mode(False):
        result = func(*on_host(args), **on_host(kwargs))
    inference = torch.inference_mode(base.is_inference()) if torch.is_inference_mode_enabled() else nullcontext()
    with inference:
        return map_tensors(lambda inner: DeviceTensor(inner, base.allocation, base.device), result)
