"""Run a module over a few tokens at a time, so that its widest activation stays small."""

from itertools import pairwise

import torch
from torch import Tensor, nn


class ChunkedTokens(nn.Module):
    """Wraps a module that treats every token alike, such as an MLP: (B, N, dim) -> (B, N, dim).

    Parameters keep their names. Chunks are of almost equal length and depend on the number of tokens alone; results
    are bit-equal to the whole for chunks of 64 tokens and more.
    """

    def __init__(self, inner: nn.Module, chunk_tokens: int | None = None) -> None:
        super().__init__()
        self._modules = inner._modules  # the same children, also when one is replaced
        self._inner = (inner,)  # in a tuple: registered, its parameters would be listed twice
        self.chunk_tokens = chunk_tokens

    def forward(self, hidden_states: Tensor) -> Tensor:
        inner = self._inner[0]
        tokens = hidden_states.shape[1]
        if self.chunk_tokens is None or tokens <= self.chunk_tokens:
            return inner(hidden_states)
        out = torch.empty_like(hidden_states)
        for begin, end in chunk_bounds(tokens, self.chunk_tokens):
            out[:, begin:end] = inner(hidden_states[:, begin:end])
        return out


def chunk_bounds(tokens: int, chunk_tokens: int) -> list[tuple[int, int]]:
    """Split `tokens` into the fewest chunks of at most `chunk_tokens`, as even as can be."""
    count = -(-tokens // chunk_tokens)
    return list(pairwise(tokens * i // count for i in range(count + 1)))


def chunk_tokens(block: nn.Module, tokens: int | None) -> None:
    """From now on the block's ChunkedTokens take so many tokens at a time; None: all at once."""
    for child in block.children():
        if isinstance(child, ChunkedTokens):
            child.chunk_tokens = tokens
