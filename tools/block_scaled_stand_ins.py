"""Stand-ins for torch's products of nvfp4 and mxfp8, which cards of the newest kind alone have: they multiply what
those are given, decoded. They show what is multiplied, not what a card makes of it."""

from typing import Any

import comfy_kitchen
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on comfy-kitchen's products are these, for everybody."""
    monkeypatch.setattr(comfy_kitchen, "scaled_mm_nvfp4", _nvfp4)
    monkeypatch.setattr(comfy_kitchen, "scaled_mm_mxfp8", _mxfp8)


def _nvfp4(a: Tensor, b: Tensor, **of: Any) -> Tensor:
    x = comfy_kitchen.dequantize_nvfp4(a, of["tensor_scale_a"], of["block_scale_a"], torch.float32)
    weight = comfy_kitchen.dequantize_nvfp4(b, of["tensor_scale_b"], of["block_scale_b"], torch.float32)
    return _product(x, weight, of)


def _mxfp8(a: Tensor, b: Tensor, **of: Any) -> Tensor:
    x = comfy_kitchen.dequantize_mxfp8(a, of["block_scale_a"], torch.float32)
    return _product(x, comfy_kitchen.dequantize_mxfp8(b, of["block_scale_b"], torch.float32), of)


def _product(x: Tensor, weight: Tensor, of: dict[str, Any]) -> Tensor:
    # in fp64 sums come out the same, whatever is multiplied at a time
    out = F.linear(x.double(), weight.double()).float()
    bias = of.get("bias")
    return (out if bias is None else out + bias.float()).to(of["out_dtype"])
