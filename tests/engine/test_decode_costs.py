"""What decoding moves in the device's memory is counted from sizes alone, as it would be counted while it decodes."""

from math import prod

import bnb_in_place  # noqa: F401  # a GPU's way on the CPU
import pytest
import torch
from qwenimage_lowvram.engine.files.checkpoint import Checkpoint
from qwenimage_lowvram.engine.formats import FORMATS, Scratch, StoredParam
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen_image.network import QwenImageParts
from qwenimage_lowvram.engine.streaming.block_layout import StoredBlock
from qwenimage_lowvram.engine.streaming.decode_costs import KernelCounter, _codec_cost, decode_cost
from torch._subclasses.fake_tensor import FakeTensorMode

from ..simulated_gpu.tiny_models import TinyModels

# bytes per weight: what is stored is read, then written; where the scale of fp8 follows, that is read and written again
MOVED = {"bf16": 0.0, "fp8": 1 + 2, "scaled fp8": 1 + 2 + 4, "int8": 1 + 2, "nf4": 0.5 + 4 / 64 + 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return TinyModels(tmp_path_factory.mktemp("decode_costs"))


def block_of(checkpoint: Checkpoint) -> StoredBlock:
    cpu = Hardware.detect(torch.device("cpu"))
    return QwenImageParts(checkpoint, dtype=torch.bfloat16, hardware=cpu).store.blocks[0]


@pytest.mark.parametrize("kind", MOVED)
def test_what_is_stored_is_read_and_written_as_often_as_the_format_says(models: TinyModels, kind: str) -> None:
    block = block_of(models.open(kind))
    weights = sum(prod(param.shape) for param in block.params if len(param.shape) == 2)
    moved = decode_cost(block).moved_bytes / weights
    assert moved == pytest.approx(MOVED[kind], rel=0.08)  # biases and scales come to that


@pytest.mark.parametrize("kind", [*MOVED, "GGUF"])
def test_what_is_counted_from_sizes_is_what_is_counted_while_it_decodes(models: TinyModels, kind: str) -> None:
    block = block_of(models.open(kind))
    raw, slot = (torch.zeros(layout.nbytes, dtype=torch.uint8) for layout in (block.raw, block.slot))
    room = torch.empty(block.scratch_bytes(on_host=False), dtype=torch.uint8)
    with torch.no_grad(), KernelCounter() as counter:
        for param, items, place, _ in (member for group in block.groups for member in group.members):
            assert isinstance(param, StoredParam)
            parts = [item.view(raw) for item in items]
            param.decoder.decode_into(place.view(slot), parts, Scratch(room, on_host=False))
    assert decode_cost(block) == counter.cost
    assert (counter.cost.launches == 0) == (kind == "bf16")


@pytest.mark.parametrize("kind", MOVED)
def test_it_is_the_same_among_fake_tensors(models: TinyModels, kind: str) -> None:
    block = block_of(models.open(kind))
    expected = decode_cost(block)
    _codec_cost.cache_clear()
    with FakeTensorMode():
        assert decode_cost(block) == expected


@pytest.mark.parametrize("name", sorted(FORMATS.encoders))
def test_a_large_weight_is_counted_like_a_small_one(name: str) -> None:
    """Per weight: chunks change how many kernels there are, hardly what they move."""
    codec = FORMATS.encoders[name]
    moved = []
    for rows in (64, 4096):
        weight = torch.randn(rows, 512).to(torch.bfloat16)
        parts, out = codec.encode(weight), torch.empty_like(weight)
        room = torch.empty(codec.scratch_bytes(out.shape, on_host=False), dtype=torch.uint8)
        with KernelCounter() as counter:
            codec.decode_into(out, parts, Scratch(room, on_host=False))
        moved.append(counter.cost.moved_bytes / weight.numel())
    assert moved[0] == pytest.approx(moved[1], rel=0.05)
