"""Shapes, strides and dtypes of what an operator returns, before it has run. Remembered."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .streams import as_device
from .tensors import map_tensors


@dataclass(frozen=True)
class Layout:
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "Layout":
        return cls(tuple(tensor.size()), tuple(tensor.stride()), tensor.dtype)


# by operator and layouts of its arguments: the same for every GPU
_known: dict[Any, Any] = {}


def results_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], *, run: bool = False) -> Any:
    """The operator's result with a Layout in each tensor's place. `run`: by running it on zeros, where its strides
    depend on the kernel that is chosen."""
    key = func, _key(args), tuple((name, _key(value)) for name, value in kwargs.items())
    if key not in _known:
        _known[key] = map_tensors(Layout.of, (_on_zeros if run else _run)(func, args, kwargs))
    return _known[key]


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Layout.of(value)
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    return type(value), str(value)


def _run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    try:
        return _on(func, args, kwargs, "meta")
    except (NotImplementedError, RuntimeError):  # not every operator has a meta kernel
        return _on_zeros(func, args, kwargs)


def _on_zeros(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    with as_device():
        return _on(func, args, kwargs, "cpu")


def _on(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], device: str) -> Any:
    def empty(tensor: Tensor) -> Tensor:
        make = torch.empty_strided if device == "meta" else _zeros
        return make(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)

    there = {name: device if name == "device" else map_tensors(empty, value) for name, value in kwargs.items()}
    return func(*map_tensors(empty, tuple(args)), **there)


def _zeros(size: Sequence[int], stride: Sequence[int], **options: Any) -> Tensor:
    return torch.empty_strided(size, stride, **options).zero_()
