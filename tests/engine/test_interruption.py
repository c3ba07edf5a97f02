"""Work on huge images can be interrupted within a block, and its result is that of work that cannot."""

import time
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.compute import interruption
from qwenimage_lowvram.engine.compute.attention import attention_by
from qwenimage_lowvram.engine.compute.attention_kernels import FUSED
from qwenimage_lowvram.engine.compute.chunk_sizes import LONG_TOKENS
from qwenimage_lowvram.engine.compute.chunk_sizes import QUERIES_BETWEEN_CHECKS as QUERIES
from qwenimage_lowvram.engine.compute.interruption import interruptible
from torch.nn.functional import scaled_dot_product_attention

LONG = LONG_TOKENS + 1


class Interrupted(Exception):
    pass


def interrupt() -> None:
    raise Interrupted


def heads(tokens: int, width: int = 32, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """As diffusers' blocks give them, (1, 4, tokens, width), a view of (1, tokens, 4, width)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, tokens, 4, width, generator=generator).to(dtype).transpose(1, 2)


MASKS = {
    "no mask": None,
    "masked keys": torch.rand(1, 1, 1, 2 * QUERIES + 1000) > 0.5,
    "a mask of its own for each query": torch.rand(1, 1, 2 * QUERIES + 1000, 2 * QUERIES + 1000) > 0.5,
}


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_in_chunks_equals_the_whole(mask: Any, dtype: torch.dtype) -> None:
    q, k, v = (heads(2 * QUERIES + 1000, seed=seed, dtype=dtype) for seed in range(3))
    whole = scaled_dot_product_attention(q, k, v, mask)
    checks = 0

    def count() -> None:
        nonlocal checks
        checks += 1

    with pytest.MonkeyPatch.context() as patch, attention_by(FUSED, LONG, count):
        patch.setattr(interruption, "SECONDS_BETWEEN_CHECKS", -1.0)
        chunked = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert checks >= 3
    assert torch.equal(chunked, whole)
    assert chunked.stride() == whole.stride()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_attention_in_chunks_equals_the_whole_on_a_card() -> None:
    q, k, v = (heads(LONG + 77, 128, seed, torch.bfloat16).cuda() for seed in range(3))
    whole = scaled_dot_product_attention(q, k, v)
    with attention_by(FUSED, LONG, lambda: None):
        assert torch.equal(scaled_dot_product_attention(q, k, v), whole)


def test_a_long_attention_is_interrupted_within_it(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (heads(LONG, 16, seed) for seed in range(3))
    start = time.monotonic()
    with attention_by(FUSED, LONG, lambda: None):
        scaled_dot_product_attention(q[:, :, :QUERIES], k, v)
    chunk_seconds = time.monotonic() - start
    start = time.monotonic()
    with pytest.raises(Interrupted), attention_by(FUSED, LONG, interrupt):
        scaled_dot_product_attention(q, k, v)
    assert time.monotonic() - start < 3 * chunk_seconds + 1  # of the 17 chunks that it has


def test_operations_beside_attention_are_interrupted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "SECONDS_BETWEEN_CHECKS", -1.0)
    with pytest.raises(Interrupted), interruptible(LONG, interrupt):
        torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2))


def test_usual_sizes_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "SECONDS_BETWEEN_CHECKS", -1.0)
    with interruptible(LONG_TOKENS, interrupt), interruptible(LONG, None), attention_by(FUSED, LONG_TOKENS, interrupt):
        torch.ones(2) + 1
