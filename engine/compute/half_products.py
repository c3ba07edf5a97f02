"""Products in fp16 of numbers in fp32, for cards that compute no bf16: fast as fp16, and nothing leaves its range.

Between products numbers stay in fp32: residual stream, norms, modulation and gates. Each product's operand is brought
into fp16's range by powers of two, which round nothing, and what comes out is brought back in fp32. The powers follow
from the numbers at hand, token by token: whatever a file's weights are, and whatever a LoRA adds to them, no sum can
overflow. Knows no model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# that sums stay below: half of what fp16 holds, for what is rounded on the way
_LARGEST = 2.0**15
# values of attention: kernels that sum up in fp16 add as many of them as there are keys
_LARGEST_VALUE = 1.0
_SMALLEST = 2.0**-60  # of a size that something is divided by
_EXPONENT = 0x7F800000  # bits of a number in fp32


def activations_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is between products in `dtype`."""
    return torch.float32 if dtype == torch.float16 else dtype


def largest_row(weight: Tensor) -> Tensor:
    """The largest norm among the rows of a weight (N, K); on its device."""
    return torch.linalg.vector_norm(weight, dim=-1, dtype=torch.float32).amax()


def half_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, largest: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias: of x (..., K) in fp32 and weights (N, K) in fp16, in fp32. largest: of `largest_row`.

    A sum of products, whole or in part, is at most the token's norm times the row's (Cauchy and Schwarz).
    """
    if largest is None:
        largest = largest_row(weight)
    sizes = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * largest.clamp_min(1.0)
    scale = _power_of_two(_LARGEST / sizes.clamp_min_(_SMALLEST))
    out, factor = F.linear(_narrowed(x, scale), weight), scale.reciprocal()
    return out * factor if bias is None else torch.addcmul(bias, out, factor)  # in one kernel


class HalfLinear(nn.Linear):
    """A linear layer with weights in fp16 between activations in fp32. largest: of its weight's rows, where that was
    measured for this visit."""

    largest: Tensor | None = None

    @classmethod
    def of(cls, layer: nn.Linear) -> "HalfLinear":
        """With the same parameters."""
        with torch.device("meta"):
            made = cls(layer.in_features, layer.out_features, bias=layer.bias is not None)
        made.weight, made.bias = layer.weight, layer.bias
        return made

    def forward(self, x: Tensor) -> Tensor:
        return half_linear(x, self.weight, self.bias, self.largest)

    def of_rows(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Of the weight's rows `start` to `stop` alone."""
        bias = None if self.bias is None else self.bias[start:stop]
        return half_linear(x, self.weight[start:stop], bias, self.largest)


def in_half(module: nn.Module) -> nn.Module:
    """Put a HalfLinear in the place of each linear layer of `module`; returns it."""
    for name, child in module._modules.items():
        if type(child) is nn.Linear:
            module._modules[name] = HalfLinear.of(child)
        elif child is not None:
            in_half(child)
    return module


@torch.no_grad()
def measure_weights(module: nn.Module) -> None:
    """Once for a visit, however many products follow: the largest rows of each HalfLinear."""
    for layer in module.modules():
        if isinstance(layer, HalfLinear):
            layer.largest = largest_row(layer.weight)


@contextmanager
def half_attention() -> Iterator[None]:
    """torch's attention of tensors in fp32 is computed within it in fp16, and answers in fp32.

    Queries and keys have been through norms, and are as large as their weights. Values are brought into range together:
    what attention makes of them is between them.
    """
    with _InHalf():
        yield


class _InHalf(TorchFunctionMode):  # of this thread alone
    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attend(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attend(
    func: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    if query.dtype != torch.float32:
        return func(query, key, value, *args, **kwargs)
    narrow, factor = narrowed(value)
    out = func(query.to(torch.float16), key.to(torch.float16), narrow, *args, **kwargs)
    del narrow
    return out * factor


def narrowed(x: Tensor) -> tuple[Tensor, Tensor]:
    """Values of attention in fp32 as numbers in fp16, 1 at the most, and the power of two (1,) in fp32 that they are to
    be multiplied with."""
    size = torch.linalg.vector_norm(x, ord=float("inf")).clamp_min(_SMALLEST)
    scale = _power_of_two(_LARGEST_VALUE / size).view(1)  # without a dimension its product would not be wide
    return _narrowed(x, scale), scale.reciprocal()


def joined(parts: Sequence[tuple[Tensor, Tensor]], dim: int) -> tuple[Tensor, Tensor]:
    """Several of what `narrowed` returns, one behind the other, as one of them."""
    if len(parts) == 1:
        return parts[0]
    factor = torch.cat([factor for _, factor in parts]).amax(0, keepdim=True)
    shape = list(parts[0][0].shape)
    shape[dim] = sum(numbers.shape[dim] for numbers, _ in parts)
    out = parts[0][0].new_empty(shape)
    places = out.split([numbers.shape[dim] for numbers, _ in parts], dim)
    for place, (numbers, own) in zip(places, parts, strict=True):
        torch.mul(numbers, (own / factor).to(numbers.dtype), out=place)
    return out, factor


def _narrowed(x: Tensor, scale: Tensor) -> Tensor:
    """x * scale in fp16, in the strides of x, without the product in fp32."""
    out = torch.empty_like(x, dtype=torch.float16)
    return torch.mul(x, scale, out=out)


def _power_of_two(number: Tensor) -> Tensor:
    """The largest that is not above it, of numbers in fp32 that are above 2^-126."""
    return number.view(torch.int32).bitwise_and(_EXPONENT).view(torch.float32)
