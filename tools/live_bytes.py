"""Count the bytes of live tensor storages on one device, with real, meta or fake tensors. For tests and benchmarks."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_SCORES = torch.ops.aten._scaled_dot_product_attention_math.default


class LiveBytes(TorchDispatchMode):
    """`with LiveBytes("cuda") as live: ...` then `live.peak` and `live.now`, in bytes; "cuda:1" is one of several.

    Counts each storage once, from the operation that made it until it is freed. Storages that were there before are
    counted when an operation first returns them. What a kernel allocates inside itself is not seen.

    Fused attention counts as one kernel: its output, and while it runs one fp32 number per query and head (the
    log-sum-exp that flash and memory-efficient kernels keep). Only inference mode hands it over as one operation.
    `fused` False: it makes scores, and is counted operation by operation, as torch computes it without such a kernel.
    """

    def __init__(self, device: str, *, fused: bool = True) -> None:
        super().__init__()
        self._device = device
        self._fused = fused
        self._sizes: dict[int, int] = {}
        self.now = 0
        self.peak = 0

    def reset_peak(self) -> None:
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ATTENTION and not self._fused and self._is_here(args[0]):
            with self, _scores_in_fp32():
                return _SCORES.decompose(*args, **(kwargs or {}))[0]
        if func is _ATTENTION and self._device != "cpu" and self._is_here(args[0]):
            query, value = args[0], args[2]
            self.peak = max(self.peak, self.now + query.shape[:-1].numel() * 4)
            out = query.new_empty(*query.shape[:-1], value.shape[-1])
        else:
            out = None if has_no_work(func, args) else func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, out)
        return out

    def _is_here(self, tensor: torch.Tensor) -> bool:
        return self._device in (tensor.device.type, str(tensor.device))

    def _count(self, tensor: torch.Tensor) -> None:
        if not self._is_here(tensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = nbytes = storage.nbytes()
        self.now += nbytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, nbytes)

    def _free(self, key: int, nbytes: int) -> None:
        self._sizes.pop(key, None)
        self.now -= nbytes


def has_no_work(func: Any, args: Sequence[Any]) -> bool:
    """Whether an operator returns nothing and is called without memory to write to; it may not know how to do that."""
    return not func._schema.returns and any(isinstance(argument, FakeTensor) for argument in args)


@contextmanager
def _scores_in_fp32() -> Iterator[None]:
    """As torch makes them, which plans count. ComfyUI has it make them in half precision, which takes less."""
    cuda = torch.backends.cuda
    before = cuda.fp16_bf16_reduction_math_sdp_allowed()
    cuda.allow_fp16_bf16_reduction_math_sdp(False)
    try:
        yield
    finally:
        cuda.allow_fp16_bf16_reduction_math_sdp(before)


def allocated_peak_bytes(work: Callable[[], Any]) -> int:
    """The most bytes that `work` holds beyond what was there before, inside of operators too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    now = peak = 0
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
