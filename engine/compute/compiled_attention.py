"""Attention within compiled code: one operator that is not looked into, computed as it is around the block."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional as F

_NAME = "qwenimage_lowvram::attend"
_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, bool is_causal=False, "
    "float? scale=None, bool enable_gqa=False) -> Tensor"
)


class AttentionFailed(Exception):
    """What attention raised, an interruption too: it is no failure of the compiled code around it."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


def call_compiled(function: Callable[..., Any], *args: Any) -> Any:
    """The result of compiled code. Modes that meet torch's functions (`attention_by`) are met in attention alone, not
    while the code is made or chosen. Raises AttentionFailed."""
    with torch._C.DisableTorchFunction():
        return function(*args)


def keep_attention(graph: GraphModule) -> None:
    """Have the operator in the place of torch's products in a graph that is about to be compiled."""
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target is F.scaled_dot_product_attention:
            node.target = _operator()
    graph.recompile()


@cache
def _operator() -> Any:
    """Known to torch from its first use on."""
    operator = torch.library.custom_op(_NAME, _attend, mutates_args=(), schema=_SCHEMA)
    operator.register_fake(lambda query, *args, **kwargs: torch.empty_like(query))
    return operator._opoverload


def _attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """As torch's; in the query's strides, which the code behind it counts on."""
    try:
        with torch._C._EnableTorchFunction():
            out = F.scaled_dot_product_attention(query, key, value, *args, **kwargs)
    except BaseException as error:
        raise AttentionFailed(error) from error
    return out if _lie_alike(out, query) else torch.empty_like(query).copy_(out)


def _lie_alike(one: Tensor, other: Tensor) -> bool:
    strides = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(own == wanted for size, own, wanted in strides if size > 1)
