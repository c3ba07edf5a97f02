"""Attention without a fused kernel: what it takes is what is planned, and its result is that of the whole."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from qwenimage_lowvram.engine.compute.attention import attention_by, kernel_of
from qwenimage_lowvram.engine.compute.attention_kernels import (
    FUSED,
    SCORES,
    AttentionChunk,
    AttentionKernel,
    AttentionShape,
)
from qwenimage_lowvram.engine.hardware import FLOATS, Hardware
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = Hardware.detect(torch.device("cpu"))
TOKENS = 700
KERNELS = {  # by what a chunk may take: several heads of five, one head, a part of its queries
    "heads": AttentionKernel("native", 15_000_000),
    "one head": AttentionKernel("native", 8_000_000),
    "queries": AttentionKernel("native", 3_000_000),
}
MASKS: dict[str, dict[str, Any]] = {
    "no mask": {},
    "causal": {"is_causal": True},
    "masked keys": {"attn_mask": torch.rand(2, 1, 1, TOKENS, generator=torch.Generator().manual_seed(1)) > 0.5},
    "a mask for each query": {"attn_mask": torch.rand(TOKENS, TOKENS, generator=torch.Generator().manual_seed(2))},
}


def operands(images: int, heads: int, keys: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """As diffusers' blocks give them, views of (B, N, H, E)."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(images, TOKENS, count, 64) for count in (heads, keys, keys)]
    return [torch.randn(size, generator=generator).to(dtype).transpose(1, 2) for size in sizes]


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys", [6, 2], ids=["keys of their own", "shared keys"])
def test_chunks_equal_the_whole(
    keys: int, dtype: torch.dtype, options: dict[str, Any], kernel: AttentionKernel
) -> None:
    q, k, v = operands(2, 6, keys, dtype)
    more = options | {"enable_gqa": keys != 6}
    mask = more.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        more["attn_mask"] = mask.to(dtype)
    with sdpa_kernel(SDPBackend.MATH):
        whole = scaled_dot_product_attention(q, k, v, **more)
        calls = 0

        class Count(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                nonlocal calls
                calls += func is scaled_dot_product_attention
                return func(*args, **(kwargs or {}))

        with Count(), attention_by(kernel):
            chunked = scaled_dot_product_attention(q, k, v, **more)
    assert calls >= 4
    assert torch.equal(chunked, whole)


def test_a_fused_kernel_is_left_as_it_is() -> None:
    q, k, v = operands(1, 6, 6, torch.bfloat16)
    calls: list[Any] = []

    class Seen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append((func, args))
            return func(*args, **(kwargs or {}))

    with Seen(), attention_by(FUSED, 10_000, lambda: None):
        scaled_dot_product_attention(q, k, v)
    assert calls == [(scaled_dot_product_attention, (q, k, v))]


SHAPES = [
    AttentionShape(tokens, tokens, heads, 128, shared, masked)
    for tokens in (500, 1000, 4096)
    for heads, shared, masked in ((24, 1, False), (28, 7, True))
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.queries}, {shape.heads}")
def test_scores_take_what_is_planned(shape: AttentionShape, dtype: torch.dtype) -> None:
    """Counted operation by operation on fake tensors, beside the operands and the result."""
    with FakeTensorMode(), LiveBytes("cuda", fused=False) as live, torch.inference_mode():
        own = shape.heads // shape.shared
        q, k, v = (
            torch.empty(1, shape.keys, n, 128, dtype=dtype, device="cuda").transpose(1, 2)
            for n in (shape.heads, own, own)
        )
        before = live.now + q.numel() * dtype.itemsize
        with attention_by(SCORES):
            out = scaled_dot_product_attention(q, k, v, is_causal=shape.masked, enable_gqa=shape.shared > 1)
        assert out.shape == q.shape
    planned = SCORES.scratch_bytes(shape)
    assert 0.5 * planned < live.peak - before <= planned
    assert planned <= 128 * 1024**2


def test_without_chunks_nothing_holds_the_scores() -> None:
    """What is prevented: 7,401 tokens and 24 heads."""
    with FakeTensorMode(), LiveBytes("cuda", fused=False) as live, torch.inference_mode():
        q = torch.empty(1, 24, 7401, 128, dtype=torch.bfloat16, device="cuda")
        scaled_dot_product_attention(q, q, q)
    assert live.peak > 8 * 24 * 7401**2


def test_a_chunk_is_at_least_one_query_of_a_head() -> None:
    assert AttentionKernel("native", 1).chunk(SHAPES[0]) == AttentionChunk(1, 1)


def test_heads_with_the_same_keys_stay_together_or_are_alone() -> None:
    for limit in range(1_000_000, 300_000_000, 1_000_000):
        heads = AttentionKernel("native", limit).chunk(AttentionShape(1000, 1000, 28, 128, 7, masked=True)).heads
        assert heads == 1 or heads % 7 == 0


def test_hardware_says_which_kernel() -> None:
    assert kernel_of(CPU, torch.bfloat16) == kernel_of(CPU, torch.bfloat16, shared_keys=True) == FUSED
    only = replace(CPU, fused_attention=frozenset([torch.float32]), fused_shared_attention=frozenset())
    assert kernel_of(only, torch.float32) == FUSED
    assert kernel_of(only, torch.bfloat16) == SCORES
    assert kernel_of(only, torch.float32, shared_keys=True) == SCORES


def test_the_cpu_is_asked_what_torch_would_choose() -> None:
    assert CPU.fused_attention == CPU.fused_shared_attention == FLOATS
    with sdpa_kernel(SDPBackend.MATH):
        switched_off = Hardware.detect(torch.device("cpu"))
    assert switched_off.fused_attention == switched_off.fused_shared_attention == frozenset()


def test_apples_gpus_make_scores() -> None:
    apple = Hardware.detect(torch.device("mps"))
    assert kernel_of(apple, torch.bfloat16) == SCORES


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_chunks_on_a_card_keep_to_what_is_planned() -> None:
    shape = AttentionShape(7401, 7401, 24, 128)
    q, k, v = (torch.randn(1, 7401, 24, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    with sdpa_kernel(SDPBackend.MATH), attention_by(SCORES), torch.inference_mode():
        before = torch.cuda.memory_allocated() + q.numel() * 2
        torch.cuda.reset_peak_memory_stats()
        scaled_dot_product_attention(q, k, v)
        assert torch.cuda.max_memory_allocated() - before <= SCORES.scratch_bytes(shape)
