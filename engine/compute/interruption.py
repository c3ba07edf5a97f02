"""Let work on huge images be interrupted within a block: between its operations, and between chunks of attention.

Knows no model. Work on images of the usual sizes is left as it is.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .token_chunks import chunk_bounds

# of 16x16 px each, references included: 2896x2896 px, of which a block of the model takes seconds
LONG_TOKENS = 32_768
# of all heads at a time: enough to keep the largest cards busy
QUERIES = 2048
SECONDS_BETWEEN_CHECKS = 0.2


def interruptible(tokens: int, check: Callable[[], None] | None) -> AbstractContextManager[Any]:
    """Work within it on more than LONG_TOKENS calls `check` a few times per second; `check` may raise.

    Attention's queries do not depend on each other: no result changes.
    """
    return _Interruptible(check) if check is not None and tokens > LONG_TOKENS else nullcontext()


class _Interruptible(TorchFunctionMode):  # of this thread alone
    def __init__(self, check: Callable[[], None]) -> None:
        super().__init__()
        self._check = check
        self._last = time.monotonic()

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self._look()
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._last > SECONDS_BETWEEN_CHECKS:
            self._last = now
            self._check()

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        """As torch's, of query (..., L, E), key (..., S, E) and value (..., S, Ev), QUERIES of them at a time."""
        length = query.shape[-2]
        if length <= QUERIES or dropout_p or is_causal or query.shape[-1] != value.shape[-1]:
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
        out = torch.empty_like(query)  # in the query's strides, which what follows counts on
        for begin, end in chunk_bounds(length, QUERIES):
            mask = attn_mask
            if mask is not None and mask.shape[-2] == length:
                mask = mask[..., begin:end, :]
            out[..., begin:end, :] = F.scaled_dot_product_attention(
                query[..., begin:end, :], key, value, mask, **options
            )
            _finish(query.device)
            self._look()
        return out


def _finish(device: torch.device) -> None:
    """Wait for what a card was given to do: it takes orders far ahead, which no interruption would recall."""
    if device.type in ("cuda", "xpu"):
        torch.accelerator.current_stream(device).synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()
