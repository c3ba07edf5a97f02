"""Attention within a block: by which kernel, in chunks where that needs them, interrupted where it is long.

Blocks are other packages' modules and call torch's scaled_dot_product_attention. It is met there, in this thread alone;
nothing of theirs is patched. Knows no model.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..hardware import Hardware
from .attention_kernels import FUSED, SCORES, AttentionKernel, AttentionShape
from .chunk_sizes import QUERIES_BETWEEN_CHECKS
from .interruption import interruptible, is_long
from .token_chunks import chunk_bounds


def kernel_of(hardware: Hardware, dtype: torch.dtype, *, shared_keys: bool = False) -> AttentionKernel:
    """What attention in `dtype` is computed with there. `shared_keys`: several heads look at the same keys."""
    fused = hardware.fused_shared_attention if shared_keys else hardware.fused_attention
    return FUSED if dtype in fused else SCORES


def kernel_of_all(hardware: Iterable[Hardware], dtype: torch.dtype) -> AttentionKernel:
    """Of several devices, for what is planned for any of them: the one that makes scores, where one does."""
    kernels = {kernel_of(device, dtype) for device in hardware}
    return SCORES if SCORES in kernels else FUSED


@dataclass(frozen=True)
class Operands:
    """Of one product: query (B, H, L, D), key and value (B, H or fewer, S, D), a mask that broadcasts to (B, H, L, S),
    and the factor of the scores, None for one over the root of D."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    causal: bool = False
    scale: float | None = None

    @property
    def shares_keys(self) -> bool:
        return self.key.shape[1] != self.query.shape[1]


class Attend(Protocol):
    """A function of another package, or a node's."""

    def lacks(self, operands: Operands) -> str:
        """What of this product it does not do; empty where it does all."""

    def __call__(self, operands: Operands) -> Tensor:
        """(B, H, L, D)."""


def torchs_own(operands: Operands) -> Tensor:
    """torch's scaled_dot_product_attention, by the kernel that it chooses."""
    return F.scaled_dot_product_attention(
        operands.query,
        operands.key,
        operands.value,
        operands.mask,
        is_causal=operands.causal,
        scale=operands.scale,
        enable_gqa=operands.shares_keys,
    )


@dataclass(frozen=True)
class Attention:
    """How blocks attend: the kernel, as plans and reports name it, and what computes it; None: torch's own."""

    kernel: AttentionKernel
    attend: Attend | None = None


@contextmanager
def attention_by(
    attention: Attention | AttentionKernel,
    tokens: int = 0,
    check: Callable[[], None] | None = None,
    *,
    told: Callable[[str], None] = lambda why: None,
) -> Iterator[None]:
    """Attention within it is computed by that kernel. Where `tokens` are more than LONG_TOKENS, `check` is called a few
    times per second, between operations and between chunks; it may raise. `told`: why a product was computed by
    torch's own in place of another package's kernel.

    Neither heads nor queries depend on each other: a chunk computes what the whole would. Bit-equal, but where a
    library splits its sums by the number of queries or heads: fp32 then differs in its last digit.
    """
    if isinstance(attention, AttentionKernel):
        attention = Attention(attention)
    pausing = check is not None and is_long(tokens)
    with ExitStack() as stack:
        stack.enter_context(interruptible(tokens, check))
        if pausing or attention.attend is not None or attention.kernel.scores_bytes is not None:
            stack.enter_context(_Met(attention, QUERIES_BETWEEN_CHECKS if pausing else None, told))
        yield


class _Met(TorchFunctionMode):  # of this thread alone
    def __init__(self, attention: Attention, most_queries: int | None, told: Callable[[str], None]) -> None:
        super().__init__()
        self._attention, self._most_queries, self._told = attention, most_queries, told

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        run = self._attend if func is F.scaled_dot_product_attention else func
        return run(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """As torch's, of query (B, H, L, E), key (B, H or fewer, S, E) and value (B, as key's, S, E)."""
        if dropout_p or query.ndim != 4 or key.ndim != 4 or query.shape[-1] != value.shape[-1]:
            options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
        whole = Operands(query, key, value, attn_mask, is_causal, scale)
        kernel, attend = self._of(whole)
        chunks = self._chunks(kernel, whole)
        if len(chunks) < 2:
            return attend(whole)
        out = torch.empty_like(query)  # in the query's strides, which what follows counts on
        for chunk in chunks:
            out[chunk.of_queries] = attend(chunk.part(whole))
        return out

    def _of(self, operands: Operands) -> tuple[AttentionKernel, Callable[[Operands], Tensor]]:
        """What computes this product."""
        kernel, attend = self._attention.kernel, self._attention.attend
        if attend is None:
            return kernel, torchs_own
        if why := attend.lacks(operands):
            self._told(f"{kernel.name} {why}")
            return kernel.otherwise or FUSED, torchs_own
        return kernel, attend

    def _chunks(self, kernel: AttentionKernel, whole: Operands) -> list["_Chunk"]:
        images, heads, queries, head_dim = whole.query.shape
        mask, shared = whole.mask, heads // whole.key.shape[1]
        masked = whole.causal or (mask is not None and mask.ndim > 1 and mask.shape[-2] > 1)
        shape = AttentionShape(queries, whole.key.shape[2], heads, head_dim, shared, masked)
        chunk = kernel.chunk(shape)
        most = min(chunk.queries, self._most_queries or chunk.queries)
        alone = kernel.scores_bytes is not None  # scores are counted for one image
        return [
            _Chunk(slice(*image), slice(*of_heads), slice(*of_keys), slice(*bounds))
            for image in chunk_bounds(images, 1 if alone else images)
            for of_heads, of_keys in _heads(shape, chunk.heads)
            for bounds in chunk_bounds(queries, most)
        ]


@dataclass(frozen=True)
class _Chunk:
    images: slice
    heads: slice  # of the queries
    key_heads: slice
    queries: slice

    @property
    def of_queries(self) -> tuple[slice, slice, slice]:
        return self.images, self.heads, self.queries

    @property
    def of_keys(self) -> tuple[slice, slice]:
        return self.images, self.key_heads

    def part(self, whole: Operands) -> Operands:
        """Of all."""
        query, key, value = whole.query[self.of_queries], whole.key[self.of_keys], whole.value[self.of_keys]
        mask = self.causal_mask(key) if whole.causal else self.mask(whole.mask)
        return Operands(query, key, value, mask, scale=whole.scale)

    def mask(self, whole: Tensor | None) -> Tensor | None:
        """This chunk's part of a mask that broadcasts to (B, H, L, S)."""
        if whole is None:
            return None
        whole = whole[(None,) * (4 - whole.ndim)]
        every = slice(None)
        own = [part if size > 1 else every for part, size in zip(self.of_queries, whole.shape[:3], strict=True)]
        return whole[tuple(own)]

    def causal_mask(self, key: Tensor) -> Tensor:
        rows = self.queries.stop - self.queries.start
        return torch.ones(rows, key.shape[2], dtype=torch.bool, device=key.device).tril(self.queries.start)


def _heads(shape: AttentionShape, size: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Bounds of heads of the queries, at most `size`, and of the keys they look at."""
    shared = shape.shared
    if size % shared:  # a part of the heads that share keys: one
        return [((head, head + 1), (head // shared, head // shared + 1)) for head in range(shape.heads)]
    keys = chunk_bounds(shape.heads // shared, size // shared)
    return [((first * shared, last * shared), (first, last)) for first, last in keys]
