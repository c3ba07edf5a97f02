"""Let work on huge images be interrupted within a block: between its operations.

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

from .chunk_sizes import LONG_TOKENS

SECONDS_BETWEEN_CHECKS = 0.2


def is_long(tokens: int) -> bool:
    """Whether work on so many tokens is interrupted within a block."""
    return tokens > LONG_TOKENS


def interruptible(tokens: int, check: Callable[[], None] | None) -> AbstractContextManager[Any]:
    """Work within it on more than LONG_TOKENS calls `check` a few times per second; `check` may raise."""
    return _Interruptible(check) if check is not None and is_long(tokens) else nullcontext()


class _Interruptible(TorchFunctionMode):  # of this thread alone
    def __init__(self, check: Callable[[], None]) -> None:
        super().__init__()
        self._check = check
        self._last = time.monotonic()

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self._look()
        result = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention and isinstance(result, Tensor):
            _finish(result.device)
        return result

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._last > SECONDS_BETWEEN_CHECKS:
            self._last = now
            self._check()


def _finish(device: torch.device) -> None:
    """Wait for what a card was given to do: it takes orders far ahead, which no interruption would recall."""
    if device.type in ("cuda", "xpu"):
        torch.accelerator.current_stream(device).synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()
