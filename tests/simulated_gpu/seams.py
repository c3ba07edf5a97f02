"""Where a SimulatedGPU is put under the engine: reads of files, the store's lock; and under torch, where
that looks for a driver past every mode. All else comes to it through Hardware. The only module that knows these names.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from types import FunctionType, ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.planning.memory import plan_memory
from qwenimage_lowvram.engine.planning.memory_plan import BranchDevice, SecondaryDevice
from qwenimage_lowvram.engine.planning.request import GIB, Limits, SamplingRequest
from qwenimage_lowvram.engine.runs import sampling_run
from qwenimage_lowvram.engine.runs.memory_watch import MemoryWatch
from qwenimage_lowvram.engine.streaming import BlockStore, FileSource, transfer
from qwenimage_lowvram.engine.streaming.streams import StreamOrder
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function
from torch.utils import _device as torch_device

from .host_threads import Disk, OrderedLock
from .reserved import Reserved
from .tensors import DeviceTensor

if TYPE_CHECKING:
    from .device import SimulatedGPU


CARD, CARD_BYTES = "simulated card", 16 * 1024**3


@contextmanager
def installed(gpu: "SimulatedGPU") -> Iterator[None]:
    torch_device._device_constructors()  # what torch remembers from its first use on: its own functions, not these
    with ExitStack() as stack:
        for owner, name, replacement in (*_engine(gpu), *_torch(gpu)):
            stack.enter_context(patch.object(owner, name, replacement))
        torch._C._ensureCUDADeviceGuardSet()  # as fake tensors do it: indexing asks for a guard
        yield


def _engine(gpu: "SimulatedGPU") -> Iterator[tuple[Any, str, Any]]:
    made, read, disk = BlockStore.__init__, FileSource.read, Disk(gpu.threads)

    def init(store: BlockStore, *args: Any, **kwargs: Any) -> None:
        made(store, *args, **kwargs)
        store._lock = OrderedLock(gpu.threads)

    def read_file(source: FileSource, index: int, out: Tensor, start: int = 0) -> None:
        gpu.page_locks.host_access(out, True, f"block {index} read from its file, from byte {start} on")
        read(source, index, out, start)
        if gpu.costs is not None:
            disk.read(gpu.costs.read_seconds(out.nbytes))

    yield BlockStore, "__init__", init
    yield MemoryWatch, "_counter", lambda watch: None
    yield sampling_run, "TELLING_FLOPS", 0.0
    yield FileSource, "read", read_file


def _torch(gpu: "SimulatedGPU") -> Iterator[tuple[Any, str, Any]]:
    make, attention = torch.tensor, F.scaled_dot_product_attention

    def tensor(data: Any, *, dtype: torch.dtype | None = None, device: Any = None, **options: Any) -> Tensor:
        if device is not None and torch.device(device).type == "cuda":
            return make(data, dtype=dtype, **options).to(device)
        return make(data, dtype=dtype, device=device, **options)

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        if torch._C._is_torch_function_mode_enabled():  # which is asked first, as by torch's own
            answer: Tensor = handle_torch_function(attend, (), *args, **kwargs)
            return answer
        on_device = any(isinstance(t, DeviceTensor) for t in (*args, *kwargs.values()))
        return gpu.attend(attention, args, kwargs) if on_device else attention(*args, **kwargs)

    if gpu.costs is not None:
        yield time, "perf_counter", lambda: gpu.threads.here().seconds
    yield torch, "tensor", tensor
    yield F, "scaled_dot_product_attention", attend
    yield torch.cuda, "_lazy_init", lambda: None
    yield torch.cuda, "device", nullcontext  # which is a class, too
    yield torch.cuda, "current_device", lambda: 0
    yield torch.cuda, "set_device", lambda device: None
    allocator = gpu.allocator
    yield torch.cuda, "memory_allocated", lambda device=None: allocator.allocated_bytes
    yield torch.cuda, "max_memory_allocated", lambda device=None: allocator.peak_bytes
    yield torch.cuda, "reset_peak_memory_stats", lambda device=None: allocator.reset_peak()
    yield torch.cuda, "memory_reserved", lambda device=None: allocator.reserved.nbytes
    yield torch.cuda, "mem_get_info", lambda device=None: (CARD_BYTES - allocator.reserved.nbytes, CARD_BYTES)
    yield torch.cuda, "memory_stats", lambda device=None: _memory_stats(allocator.reserved)
    properties = SimpleNamespace(name=CARD, total_memory=CARD_BYTES, major=8, minor=6)
    yield torch.cuda, "get_device_properties", lambda device=None: properties


def _memory_stats(reserved: Reserved) -> dict[str, int]:
    return {"reserved_bytes.all.current": reserved.nbytes, "active_bytes.all.current": reserved.allocated_bytes}


def kept_stand_ins() -> list[str]:
    """Where a module holds what has stood in for a function of torch's: it was imported meanwhile."""
    return [
        f"{name}.{key}"
        for name, module in list(sys.modules.items())
        if isinstance(module, ModuleType)
        for key, value in list(vars(module).items())
        if type(value) is FunctionType and value.__module__ == __name__ and "<locals>" in value.__qualname__
    ]


def small_pieces(nbytes: int) -> AbstractContextManager[object]:
    """Within it, blocks pass through pieces of at most that many bytes."""
    return patch.object(transfer, "PIECE_BYTES", nbytes)


# what orders streams, and the names by which the engine's objects know theirs
STREAM_ORDER = StreamOrder
NAMES_OF_ORDER = ("order", "_order", "streams", "_streams")


def on_second(device: torch.device, blocks: range) -> tuple[SecondaryDevice, ...]:
    """A plan's blocks on a further card."""
    return (SecondaryDevice(str(device), blocks, 0, 0),)


def beside(
    model: QwenImageTransformer, device: torch.device, resident: tuple[int, ...], branches: int
) -> tuple[BranchDevice, ...]:
    """A further card that computes so many branches, with these blocks resident."""
    plan = plan_memory(model.footprint, SamplingRequest(64, 48, branches, 8), Limits(GIB))
    return (BranchDevice(str(device), replace(plan, resident=resident, held=(), slots=1)),)


def session(
    model: QwenImageTransformer, slots: int, elsewhere: tuple[SecondaryDevice, ...]
) -> AbstractContextManager[Any]:
    return model.session(slots=slots, secondaries=elsewhere)


def forget_tables() -> None:
    """What comfy-kitchen keeps on each device, some 100 KB, for as long as it lives."""
    eager = "backends.eager"
    for name, table in (
        (f"{eager}.convrot_w4a4", "_HADAMARD_CACHE"),
        (f"{eager}.quantization", "E2M1_LUT_CACHE"),
        ("tensor.int8_utils", "_HADAMARD_CACHE"),
    ):
        kept = sys.modules.get(f"comfy_kitchen.{name}")
        if kept is not None:
            getattr(kept, table).clear()
