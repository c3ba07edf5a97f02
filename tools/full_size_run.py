"""A guided step of a full-size transformer on fake tensors, held against its plan."""

from collections.abc import Callable
from typing import Any

import full_size
import torch
from live_bytes import LiveBytes
from qwenimage_lowvram.engine.compute.linear_choice import DECODED, LinearChoice
from qwenimage_lowvram.engine.files.checkpoint import Checkpoint
from qwenimage_lowvram.engine.models.qwen_image.branch import Branch
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.planning.footprint import TransformerFootprint
from qwenimage_lowvram.engine.planning.memory import plan_memory
from qwenimage_lowvram.engine.planning.request import GIB, Limits, SamplingRequest
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only


def require_planned_peaks(
    checkpoint: Checkpoint, limit_gib: float, linear: LinearChoice = DECODED
) -> TransformerFootprint:
    """Raises AssertionError where a 512x512 step takes a tenth more or less than planned, or more than the limit."""
    with FakeTensorMode(), LiveBytes("cuda") as live, torch.inference_mode():
        transformer = QwenImageTransformer(
            checkpoint,
            dtype=torch.bfloat16,
            hardware=full_size.fake_gpu(),
            source=full_size.EmptySource,
            linear=linear,
        )
        plan = plan_memory(transformer.footprint, SamplingRequest(512, 512, 2, 60), Limits(int(limit_gib * GIB)))
        transformer.load(plan.resident)
        live.reset_peak()
        transformer.modulation.announce([0.9])
        assert abs(live.peak / plan.modulation_peak_bytes - 1) < 0.1
        live.reset_peak()
        with transformer.session(slots=plan.slots, ring=plan.ring, mlp_chunk_tokens=plan.mlp_chunk_tokens) as session:
            tokens = torch.empty(1, 32 * 32, 64, device="cuda", dtype=torch.bfloat16)
            prompt = torch.empty(1, 60, 3584, device="cuda", dtype=torch.bfloat16)
            session.forward([Branch(tokens, ((1, 32, 32),), prompt, None, 0.9) for _ in range(2)])
        assert abs(live.peak / plan.sampling_peak_bytes - 1) < 0.1
        assert live.peak <= plan.limit_bytes
        return transformer.footprint


def once_a_shape(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same memory in less time, for fake tensors on a GPU: `function` runs once for each kind of arguments. Later
    calls take as much as it did at most, give it back, and return tensors like its results."""
    known: dict[Any, tuple[int, Any]] = {}

    def call(*args: Any, **kwargs: Any) -> Any:
        given = tree_leaves((args, kwargs))
        key = tuple((part.shape, part.dtype) if isinstance(part, Tensor) else part for part in given)
        if key not in known:
            with LiveBytes("cuda") as live:
                for part in given:
                    if isinstance(part, Tensor):
                        part.view_as(part)  # counted from here on
                before = live.now
                live.reset_peak()
                results = function(*args, **kwargs)
            known[key] = live.peak - before, tree_map_only(Tensor, lambda made: (made.shape, made.dtype), results)
            return results
        taken, results = known[key]
        torch.empty(taken, dtype=torch.uint8, device="cuda")
        return _empty_like(results)

    return call


def _empty_like(results: Any) -> Any:
    if isinstance(results[-1], torch.dtype):
        shape, dtype = results
        return torch.empty(shape, dtype=dtype, device="cuda")
    return tuple(map(_empty_like, results))
