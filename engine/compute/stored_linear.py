"""A linear layer that computes on its weight as it is stored, in the place of one of a block. Decodes nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .half_products import HalfLinear
from .stored_products import StoredProduct, at_once, rows_of


@dataclass(frozen=True)
class LowRank:
    """What a LoRA adds to rows `start` to `stop` of a layer's result: strength * (x @ down.T) @ up.T."""

    strength: float
    start: int
    stop: int


@dataclass(frozen=True)
class StoredLayer:
    """How a layer computes: its product, how many parts its weight has, and what is added to its result, for each of
    which up and down follow the parts."""

    product: StoredProduct
    parts: int
    added: tuple[LowRank, ...] = ()

    @property
    def tensors(self) -> int:
        """What it is computed with: parts, and each up and down."""
        return self.parts + 2 * len(self.added)


def part_name(weight: str, index: int) -> str:
    """Of a parameter that holds a part of that weight: the first has the weight's name."""
    return f"{weight}_{index}" if index else weight


class StoredLinear(nn.Module):
    """x (..., K) to (..., N). Its parameters are the parts, by `part_name`, and the bias."""

    def __init__(self, like: nn.Linear, layer: StoredLayer) -> None:
        super().__init__()
        self.in_features, self.out_features = like.in_features, like.out_features
        self.layer = layer
        self.bias = like.bias
        for index in range(layer.tensors):
            self.register_parameter(part_name("weight", index), None)

    def forward(self, x: Tensor) -> Tensor:
        return self.of_rows(x, 0, self.out_features)

    def of_rows(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Of the weight's rows `start` to `stop` alone."""
        layer, parts = self.layer, self._parts()
        flat = x.reshape(-1, self.in_features).contiguous()
        together = at_once(layer.product, self.in_features, stop - start, x.element_size())
        stored = [*parts[: layer.parts], *layer.product.measured(flat)]
        if together is None or (len(flat) <= together.tokens and stop - start <= together.rows):
            out = self._product(flat, stored, start, stop)
        else:
            out = flat.new_empty(len(flat), stop - start)
            for first in range(start, stop, together.rows):
                last = min(first + together.rows, stop)
                for tokens in range(0, len(flat), together.tokens):
                    some = slice(tokens, tokens + together.tokens)
                    out[some, first - start : last - start] = self._product(flat[some], stored, first, last)
        for index, low_rank in enumerate(layer.added):
            first, last = max(start, low_rank.start), min(stop, low_rank.stop)
            if first < last:
                up, down = (part.to(x.dtype) for part in parts[layer.parts + 2 * index :][:2])
                up = up[first - low_rank.start : last - low_rank.start]
                place = out[:, first - start : last - start]
                place.addmm_(F.linear(flat, down), up.T, alpha=low_rank.strength)
        return out.reshape(*x.shape[:-1], stop - start)

    def _product(self, x: Tensor, stored: Sequence[Tensor], start: int, stop: int) -> Tensor:
        product, rows = self.layer.product, self.out_features
        first = start // product.tile_rows * product.tile_rows
        last = min(-(-stop // product.tile_rows) * product.tile_rows, rows)
        bias = None if self.bias is None else self.bias[first:last]
        return product(x, rows_of(product, stored, rows, first, last), bias)[:, start - first : stop - first]

    def _parts(self) -> Sequence[Tensor]:
        return [self._parameters[part_name("weight", index)] for index in range(self.layer.tensors)]


def halves(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer makes by the first and by the second half of its rows: two products, one as wide as both may round
    in another way."""
    if isinstance(layer, (StoredLinear, HalfLinear)):
        half = layer.out_features // 2
        return layer.of_rows(x, 0, half), layer.of_rows(x, half, 2 * half)
    first, second = layer.weight.chunk(2)
    return F.linear(x, first), F.linear(x, second)


def compute_as_stored(module: nn.Module, layers: Mapping[str, StoredLayer]) -> nn.Module:
    """Put a StoredLinear in the place of each linear layer of `module` whose weight has one of these names; returns
    `module`."""
    for weight, layer in layers.items():
        name = weight.removesuffix(".weight")
        owner, _, attribute = name.rpartition(".")
        linear = module.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{name} is no linear layer: {type(linear).__name__}")
        with torch.device("meta"):
            module.get_submodule(owner)._modules[attribute] = StoredLinear(linear, layer)
    return module
