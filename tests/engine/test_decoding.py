"""Decoding a block takes few launches, no memory but the scratch that is planned, and one way or the other the same
bits."""

from types import SimpleNamespace
from typing import Any

import bnb_in_place  # noqa: F401  # operators that bitsandbytes has on a GPU alone
import pytest
import torch
from format_blocks import STORES, block_in, block_shapes, filled
from live_bytes import has_no_work
from qwenimage_lowvram.engine.formats import Scratch, chunks, kitchen_kernels
from qwenimage_lowvram.engine.formats.kitchen_kernels import decode_by_kernel
from qwenimage_lowvram.engine.formats.scratch import SCRATCH_BYTES
from qwenimage_lowvram.engine.streaming import StoredBlock
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

KERNELS = {
    "int8_convrot": "dequantize_int8_convrot_weight_dtype",
    "nvfp4": "dequantize_nvfp4",
    "convrot_w4a4": "dequantize_convrot_w4a4_weight",
}
by_format = pytest.mark.parametrize("format_", STORES)


class Launches(TorchDispatchMode):
    """Counts operators that compute, and the tensors that they allocate on the device. Views are neither."""

    def __init__(self, device: str, *known: Tensor) -> None:
        super().__init__()
        self.count = 0
        self.allocated: list[str] = []
        self._device = device
        self._storages = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = None if has_no_work(func, args) else func(*args, **(kwargs or {}))
        returns, arguments = func._schema.returns, func._schema.arguments
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in arguments)
        computes = writes or not any(r.alias_info is not None for r in returns)
        if computes and func.namespace != "prim":  # questions that fake tensors ask
            self.count += 1
        tree_map_only(Tensor, lambda tensor: self._note(func, tensor), result)
        return result

    def _note(self, func: Any, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()._cdata
        if tensor.device.type == self._device and storage not in self._storages:
            self.allocated.append(str(func))


def decode(block: StoredBlock, raw: Tensor, slot: Tensor, scratch: Tensor) -> None:
    with torch.no_grad():
        for group in block.groups:
            group.decode(raw, slot, scratch)


def launches(block: StoredBlock) -> Launches:
    """Of a block that is decoded on a GPU."""
    sizes = (block.raw.nbytes, block.slot.nbytes, block.scratch_bytes(on_host=False))
    with FakeTensorMode():
        raw, slot, scratch = (torch.empty(size, dtype=torch.uint8, device="cuda") for size in sizes)
        with Launches("cuda", raw, slot, scratch) as counted:
            decode(block, raw, slot, scratch)
    return counted


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend of comfy-kitchen that stands for its CUDA kernels: each allocates its result and fills it at once."""
    from comfy_kitchen.constraints import FunctionConstraints
    from comfy_kitchen.registry import registry

    def kernel(rows: int, columns: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty((rows, columns), dtype=dtype, device=like.device).fill_(1)

    def of_int8(q: Tensor, scale: Tensor, group_size: int, output_dtype_code: int) -> Tensor:
        return kernel(*q.shape, q, (torch.float32, torch.float16, torch.bfloat16)[output_dtype_code])

    def of_nvfp4(
        qx: Tensor, per_tensor_scale: Tensor, block_scales: Tensor, output_type: torch.dtype, hi_first: bool
    ) -> Tensor:
        return kernel(qx.shape[0], qx.shape[1] * 2, qx, output_type)

    def of_w4a4(qdata: Tensor, scales: Tensor, convrot_groupsize: int, output_dtype: torch.dtype) -> Tensor:
        return kernel(qdata.shape[0], qdata.shape[1] * 2, qdata, output_dtype)

    module = SimpleNamespace(**dict(zip(KERNELS.values(), (of_int8, of_nvfp4, of_w4a4), strict=True)))
    constraints = FunctionConstraints(params={}, default_devices=frozenset({"cuda", "cpu"}))
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))
    monkeypatch.setattr(registry, "_capabilities", dict(registry._capabilities))
    monkeypatch.setattr(registry, "_constraints", dict(registry._constraints))
    monkeypatch.setattr(registry, "_priority", ["stand-in", *registry._priority])
    registry.register("stand-in", module, dict.fromkeys(KERNELS.values(), constraints))


# what a block of the real size takes on a GPU, without comfy-kitchen's kernels
LAUNCHES = {
    "bf16": 0, "fp8": 7, "fp8, scaled": 25, "fp8, scaled by row": 26, "int8": 14, "int8 of bitsandbytes": 26,
    "nf4": 13, "nf4, doubly": 37, "fp4": 13,
    "int8_convrot": 182, "nvfp4": 225, "mxfp8": 49, "convrot_w4a4": 290, "asym_w4a8": 494,
    "gguf Q8_0": 25, "gguf Q6_K": 161, "gguf Q5_K": 301, "gguf Q5_1": 181, "gguf Q5_0": 145, "gguf Q4_K": 221,
    "gguf Q4_1": 101, "gguf Q4_0": 61, "gguf Q3_K": 289, "gguf Q2_K": 217, "gguf IQ4_NL": 129, "gguf IQ4_XS": 257,
    "gguf MXFP4": 225, "gguf TQ2_0": 73, "gguf TQ1_0": 225, "gguf IQ3_S": 321, "gguf IQ3_XXS": 301, "gguf IQ2_S": 257,
    "gguf IQ2_XS": 301, "gguf IQ2_XXS": 241, "gguf IQ1_M": 649, "gguf IQ1_S": 481,
    "svdq int4 r32": 337, "svdq int4 r128": 427, "svdq fp4 r32": 507, "svdq fp4 r128": 637,
}  # fmt: skip


@pytest.mark.slow
@by_format
def test_a_block_of_the_real_size_takes_few_launches_and_allocates_nothing(format_: str) -> None:
    block = block_in(format_, block_shapes())
    counted = launches(block)
    assert not counted.allocated
    assert counted.count == LAUNCHES[format_]


@pytest.mark.slow
@by_format
def test_the_scratch_of_a_block_of_the_real_size_is_needed_and_within_64_mib(format_: str) -> None:
    block = block_in(format_, block_shapes())
    said = block.scratch_bytes(on_host=False)
    assert said <= SCRATCH_BYTES
    with FakeTensorMode(), Launches("cuda"), torch.no_grad():
        raw, slot = (
            torch.empty(size, dtype=torch.uint8, device="cuda") for size in (block.raw.nbytes, block.slot.nbytes)
        )
        taken = [Scratch(torch.empty(said, dtype=torch.uint8, device="cuda")) for _ in block.params]
        places = {item.name: item.view(slot) for item in block.slot.items}
        items = iter(block.raw.items)
        seen: dict[Any, Scratch] = {}  # what a codec takes for one shape it takes for all
        for i, param in enumerate(block.params):
            parts = [next(items).view(raw) for _ in param.parts]
            parts += [places[param.read_beside]] if param.read_beside else []
            key = param.codec, param.shape, *(tuple(part.shape) for part in parts)
            if key in seen:
                taken[i] = seen[key]
                continue
            scratch = seen[key] = taken[i]
            param.decoder.decode_into(places[param.name], parts, scratch)
            assert scratch.most <= param.scratch_bytes(on_host=False)
    # some of it is for fp32, or for quantized scales
    assert max(scratch.most for scratch in taken) >= 0.75 * said - 3 * 2**20


@pytest.mark.parametrize("format_", KERNELS)
def test_where_comfy_kitchen_has_a_kernel_it_is_launched_once_a_weight(format_: str, kernels: None) -> None:
    block = block_in(format_, block_shapes())
    counted = launches(block)
    assert not counted.allocated
    # the vectors between matrices of two groups are written at once
    assert counted.count == 12 + sum(writer.name.endswith("bias") for g in block.groups for writer, *_ in g.members)
    assert counted.count <= 40


def test_a_kernels_result_takes_the_weights_memory_and_no_other_tensor_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = torch.zeros(3, 4)
    made: list[Tensor] = []

    def kernel(values: Tensor) -> Tensor:
        made.append(torch.empty(4, 3))
        made.append(torch.empty((3, 4), dtype=torch.float32, device=values.device))
        made.append(torch.empty(3, 4))
        return made[1].copy_(values)

    monkeypatch.setattr(kitchen_kernels, "_kernel", lambda name, arguments: kernel)
    values = torch.arange(12.0).view(3, 4)
    assert decode_by_kernel("any", out, {"values": values})
    assert torch.equal(out, values)
    assert [tensor is out for tensor in made] == [False, True, False]


def test_a_kernels_result_that_lies_elsewhere_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    out = torch.zeros(3, 4)

    def kernel(values: Tensor) -> Tensor:
        torch.empty(3, 4).fill_(7)  # something in between, which lies where the result is wanted
        return values + 1

    monkeypatch.setattr(kitchen_kernels, "_kernel", lambda name, arguments: kernel)
    assert decode_by_kernel("any", out, {"values": torch.ones(3, 4)})
    assert torch.equal(out, torch.full((3, 4), 2.0))


def decoded(block: StoredBlock, raw: Tensor, *, on_host: bool) -> Tensor:
    """All numbers of a block, decoded on the CPU in its way or in a GPU's."""
    slot = torch.zeros(block.slot.nbytes, dtype=torch.uint8)
    scratch = torch.empty(block.scratch_bytes(on_host=on_host), dtype=torch.uint8)
    places, items = {item.name: item.view(slot) for item in block.slot.items}, iter(block.raw.items)
    with torch.no_grad():
        for param in block.params:
            parts = [next(items).view(raw) for _ in param.parts]
            parts += [places[param.read_beside]] if param.read_beside else []
            param.decoder.decode_into(places[param.name], parts, Scratch(scratch, on_host=on_host))
    return torch.cat([place.flatten() for place in places.values()])


@pytest.mark.slow
@by_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_way_of_a_gpu_and_the_size_of_its_chunks_change_no_bit(
    format_: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = block_in(format_, block_shapes(256, 64), dtype)
    raw = filled(block)
    expected = decoded(block, raw, on_host=True)
    assert expected.isfinite().float().mean() > 0.5
    assert torch.equal(decoded(block, raw, on_host=False).nan_to_num(3), expected.nan_to_num(3))
    whole = block.scratch_bytes(on_host=False)
    monkeypatch.setattr(chunks, "SCRATCH_BYTES", whole // 2)
    assert block.scratch_bytes(on_host=False) < whole or whole < 2**16
    assert torch.equal(decoded(block, raw, on_host=False).nan_to_num(3), expected.nan_to_num(3))
