"""Every format decodes on the copy stream without allocating there: the same bits as on the CPU, and no race."""

from collections.abc import Sequence

import pytest
import torch
from format_blocks import STORES, Shapes, block_in, block_shapes, filled
from qwenimage_lowvram.engine.streaming import BlockStore, BlockStreamer, StoredBlock
from torch import Tensor, nn

from .device import SimulatedGPU

SHAPES: Shapes = block_shapes(256, 64)
QUICK = ("int8", "nf4, doubly", "gguf Q4_K")
# with a block that stays on the card; some without, too
FORMATS = [pytest.param(name, (1,), marks=() if name in QUICK else pytest.mark.slow) for name in STORES]
FORMATS += [pytest.param(name, ()) for name in QUICK]


class RawSource:
    """Blocks' raw bytes from memory."""

    def __init__(self, raw: Sequence[Tensor]) -> None:
        self._raw = raw

    def read(self, index: int, out: Tensor, start: int = 0) -> None:
        out.copy_(self._raw[index][start : start + len(out)])

    def close(self) -> None:
        pass


def make_block() -> nn.Module:
    """Of nothing but its parameters."""
    block = nn.Module()
    for name, shape in SHAPES.items():
        *path, attribute = name.split(".")
        owner = block
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(attribute, nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False))
    return block


def on_the_cpu(block: StoredBlock, raw: Tensor) -> dict[str, Tensor]:
    slot = torch.zeros(block.slot.nbytes, dtype=torch.uint8)
    scratch = torch.empty(block.scratch_bytes(on_host=True), dtype=torch.uint8)
    if block.native:
        slot.copy_(raw[: block.slot.nbytes])
    for group in block.groups:
        group.decode(raw, slot, scratch)
    return block.slot.views(slot)


def allocations(gpu: SimulatedGPU) -> int:
    """Asked for by streams that do not compute."""
    return sum(gpu.allocator.requests_of[stream.name] for stream in gpu.streams if not stream.computes)


@pytest.mark.parametrize(("format_", "resident"), FORMATS, ids=str)
@torch.no_grad()
def test_decoding_allocates_nothing_on_the_copy_stream(format_: str, resident: Sequence[int]) -> None:
    block = block_in(format_, SHAPES)
    raw = [filled(block, seed) for seed in range(3)]
    wanted = [on_the_cpu(block, each) for each in raw]
    with SimulatedGPU("late") as gpu:
        store = BlockStore([block] * len(raw), RawSource(raw), make_block, gpu.hardware())
        store.set_resident(resident)
        with BlockStreamer(store, slots=2) as streamer:
            made = [_visited(streamer, more=True)]
            before = allocations(gpu)  # staging and scratch are there by now
            made.append(_visited(streamer, more=False))
            assert allocations(gpu) == before
            assert before <= 2 + len(resident)
        store.release()
        assert not gpu.races
    for blocks in made:
        for found, expected in zip(blocks, wanted, strict=True):
            assert all(torch.equal(found[name].nan_to_num(3), expected[name].nan_to_num(3)) for name in expected)


def _visited(streamer: BlockStreamer, *, more: bool) -> list[dict[str, Tensor]]:
    return [
        {name: parameter.data.cpu() for name, parameter in module.named_parameters()}
        for _, module in streamer.visit(more=more)
    ]
