"""Parts of the model on devices of choice, and blocks on several of them."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.planning.draft import least_bytes
from qwenimage_lowvram.engine.planning.forecast import TYPICAL
from qwenimage_lowvram.engine.planning.request import SamplingRequest
from qwenimage_lowvram.engine.runs.known_speeds import KnownSpeeds
from qwenimage_lowvram.engine.runs.memory_watch import MemoryWatch
from qwenimage_lowvram.engine.texts import size_text

from .conftest import cond, empty_latent
from .test_model import ksampler

CARD = Hardware(torch.device("cpu"), streams=False, pinned=False, prefetch=True, host_device=False)


def run(model: Any, cfg: float = 3.0) -> torch.Tensor:
    return ksampler(model, cond(), cond(5, 2), empty_latent(), cfg=cfg)


def on_two_devices(folder: Path) -> QwenImageTransformer:
    return QwenImageTransformer(
        open_checkpoint(folder / "transformer"),
        dtype=torch.float32,
        hardware=CARD,
        others=[replace(CARD, device=torch.device("cpu:0"))],
    )


def test_blocks_on_a_second_device_make_the_same_image(model: Any, small_pipeline: Path) -> None:
    from qwenimage_lowvram.nodes.adapters.model import make_model

    expected = run(model, cfg=1.0)  # a single branch
    model.detach()
    transformer = on_two_devices(small_pipeline)
    request = SamplingRequest(96, 64, 1, 9, timesteps=4)
    limit = least_bytes(transformer.footprint, request) + transformer.footprint.slot_bytes
    split = make_model(transformer, limit)
    assert torch.equal(run(split, cfg=1.0), expected)
    plan = split.model.last_report.plan
    (secondary,) = plan.secondaries
    assert secondary.device == "cpu:0"
    assert secondary.peak_bytes <= secondary.limit_bytes <= limit
    assert plan.blocks + len(secondary.blocks) == transformer.config.num_layers
    before = transformer.secondaries["cpu:0"].fetched_blocks
    assert torch.equal(run(split, cfg=1.0), expected)
    assert transformer.secondaries["cpu:0"].fetched_blocks == before == len(secondary.blocks)  # they stayed
    split.detach()
    assert transformer.secondaries["cpu:0"].resident_bytes == 0


def test_prompts_on_two_devices_make_the_same_image(
    model: Any, small_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwenimage_lowvram.nodes.adapters.model import make_model

    monkeypatch.setattr(KnownSpeeds, "get", lambda speeds: replace(TYPICAL, flops=1e8))  # so that computing counts
    reset: list[str] = []
    counted = SimpleNamespace(
        memory_allocated=lambda device: 5,
        max_memory_allocated=lambda device: 3 * 2**20,
        reset_peak_memory_stats=lambda device: reset.append(str(device)),
    )
    counters = {"cpu:0": counted}  # the second card's; the first one has no memory of its own
    monkeypatch.setattr(MemoryWatch, "_counter", lambda watch: counters.get(str(watch.device)))
    expected = run(model)
    model.detach()
    transformer = on_two_devices(small_pipeline)
    request = SamplingRequest(96, 64, 2, 9, timesteps=4)
    limit = least_bytes(transformer.footprint, request) + transformer.footprint.slot_bytes
    divided = make_model(transformer, limit)
    assert torch.equal(run(divided), expected)
    plan = divided.model.last_report.plan
    (other,) = plan.beside
    assert (plan.request.branches, other.plan.request.branches, other.device) == (1, 1, "cpu:0")
    assert max(plan.peak_bytes, other.plan.peak_bytes) <= limit
    assert not plan.secondaries
    report = divided.model.last_report
    assert report.further_peaks_bytes == (3 * 2**20,)
    assert set(reset) == {"cpu:0"}
    planned = f"{size_text(other.plan.peak_bytes)} planned of {size_text(other.plan.limit_bytes)}"
    assert f"\n  memory of cpu:0: {planned}, 3.0 MiB measured\n" in str(report)
    there = transformer.secondaries["cpu:0"]
    assert len(there.resident) == len(other.plan.resident)
    assert not there.fetched_blocks  # what it has, the first one read
    divided.detach()
    assert there.resident_bytes == 0


def test_the_choices_are_this_machines_devices(comfy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwenimage_lowvram.nodes import devices

    first = torch.device("cuda:0")
    assert devices.choices()[:2] == ["auto", "cpu"]
    assert devices.device_of("auto", first) == devices.device_of("all cards", first) == first
    assert devices.device_of("cpu", first) == torch.device("cpu")
    assert devices.others_of("auto", first) == []
    monkeypatch.setattr(devices, "_accelerators", lambda: ["cuda:0", "cuda:1", "cuda:2"])
    assert devices.choices_for_blocks() == ["auto", "cpu", "cuda:0", "cuda:1", "cuda:2", "all cards"]
    assert devices.others_of("all cards", first) == [torch.device("cuda:1"), torch.device("cuda:2")]
