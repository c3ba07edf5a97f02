"""Blocks that stay in host memory: within the person's limit, shared by all models, read once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.errors import DoesNotFit
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.planning.draft import least_bytes, least_ram_bytes
from qwenimage_lowvram.engine.planning.request import SamplingRequest

from .conftest import cond, empty_latent
from .test_model import STEPS, ksampler

# a device with memory of its own, as far as the way of the blocks is concerned
CARD = Hardware(torch.device("cpu"), streams=False, pinned=False, prefetch=True, host_device=False)
REQUEST = SamplingRequest(96, 64, 2, 9, timesteps=STEPS)


def on_card(folder: Path, *, blocks_in_ram: int | None) -> Any:
    """A MODEL whose blocks are all streamed; so many of them may stay in host memory."""
    from qwenimage_lowvram.nodes.adapters.model import make_model

    transformer = QwenImageTransformer(open_checkpoint(folder / "transformer"), dtype=torch.float32, hardware=CARD)
    footprint = transformer.footprint
    ram = None
    if blocks_in_ram is not None:
        ram = least_ram_bytes(footprint, REQUEST) + blocks_in_ram * footprint.stored_bytes
    return make_model(transformer, least_bytes(footprint, REQUEST), ram)


def run(model: Any) -> torch.Tensor:
    """Sample, and leave the device, which has room for one model."""
    image = ksampler(model, cond(), cond(5, 2), empty_latent())
    model.detach()
    return image


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_held_blocks_are_read_once_and_the_image_is_the_same(blocks: int, model: Any, small_pipeline: Path) -> None:
    expected = run(model)
    streamed = on_card(small_pipeline, blocks_in_ram=blocks)
    assert torch.equal(run(streamed), expected)
    report = streamed.model.last_report
    assert len(report.plan.held) == blocks
    total = report.plan.blocks
    assert report.fetched_blocks == blocks + STEPS * (total - blocks)
    assert report.copied_bytes >= STEPS * report.plan.streamed_bytes_per_step
    assert torch.equal(run(streamed), expected)
    assert streamed.model.last_report.fetched_blocks == STEPS * (total - blocks)


def test_all_blocks_are_held_where_ram_is_not_limited(small_pipeline: Path) -> None:
    model = on_card(small_pipeline, blocks_in_ram=None)
    run(model)
    report = model.model.last_report
    assert len(report.plan.held) == report.plan.blocks
    run(model)
    assert model.model.last_report.fetched_blocks == 0


def test_two_models_share_one_limit(small_pipeline: Path) -> None:
    first, second = (on_card(small_pipeline, blocks_in_ram=3) for _ in range(2))
    run(first)
    assert first.model.transformer.store.held_bytes > 0
    limit = second.model.ram_limit_bytes
    run(second)
    held = [model.model.transformer.store.held_bytes for model in (first, second)]
    assert len(second.model.last_report.plan.held) == 3
    assert sum(held) + least_ram_bytes(second.model.transformer.footprint, REQUEST) <= limit


def test_a_ram_limit_that_nothing_fits_in_is_refused_before_loading(small_pipeline: Path) -> None:
    model = on_card(small_pipeline, blocks_in_ram=0)
    model.model.ram_limit_bytes = 1000
    with pytest.raises(DoesNotFit, match="a RAM limit of"):
        run(model)
    assert model.loaded_size() == 0
