"""What Qwen-Image-2.1's blocks make of a prompt and its images is made once, through the nodes: counted, reported, and
within limits that push it off the card."""

import gc
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.planning.draft import least_bytes
from qwenimage_lowvram.engine.reports.memory_report import MemoryReport
from torch import Tensor

from .test_editing_21 import BASE, CASES, encode, load  # noqa: F401

pytestmark = pytest.mark.slow
GUIDED = {**CASES["one image"], "cfg": 3.0}
STEPS = 3


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device has memory beside the host's."""
    detect = Hardware.detect.__func__  # type: ignore[attr-defined]
    beside = classmethod(lambda cls, device: replace(detect(cls, device), host_device=False))
    monkeypatch.setattr(Hardware, "detect", beside)


def sample(model: Any, conds: Any, seed: int) -> Tensor:
    from qwenimage_lowvram.nodes.sample import QwenLowVRAMSample

    positive, negative, latent = conds
    settings = {"seed": seed, "steps": STEPS, "cfg": GUIDED["cfg"], "denoise": 1.0}
    settings |= {"sampler": "euler", "scheduler": "qwen_image", "norm_rescale": True}
    return QwenLowVRAMSample().sample(model, positive, negative, latent, **settings)["result"][0]["samples"]


def instruction(number: int) -> dict[str, Any]:
    """The same words in another order: all are of one length, and so of one plan."""
    words = list(permutations(("red", "green", "blue", "round")))[number]
    return {**GUIDED, "positive": f"make <image1> {' '.join(words)}"}


def tokens_of(conds: Any) -> tuple[int, int, int]:
    """Of the images with the text before the last of them, and of the positive and the negative text behind."""
    positive, negative = (cond[0] for cond in conds[:2])
    before = positive[1]["image_slots"][-1]
    images = sum(latent.shape[-2] * latent.shape[-1] for latent in positive[1]["reference_latents"])
    return images + before, positive[0].shape[1] - before, negative[0].shape[1] - before


def bytes_of(model: Any, tokens: int) -> int:
    """Keys and values of so many tokens in one block each, in fp32."""
    return int(tokens * 2 * model.model.transformer.config.inner_dim * 4)


def test_a_second_seed_makes_nothing_and_a_second_instruction_no_references(load: Any) -> None:  # noqa: F811
    model, clip, vae = load()
    transformer = model.model.transformer
    blocks, store = transformer.config.layers, transformer.store
    conds = encode(clip, vae, instruction(0))
    encoder_bytes = clip.encoder.fetched_bytes
    assert encoder_bytes > 0
    sample(model, conds, 1)
    first: MemoryReport = model.model.last_report
    assert first.made_tokens == blocks * sum(tokens_of(conds))
    assert first.passes == STEPS  # each block once per step, for both prompts
    assert first.fetched_blocks == blocks
    assert first.kept_device_bytes == bytes_of(model, first.made_tokens)
    assert first.kept_ram_bytes == 0

    second_seed = sample(model, encode(clip, vae, instruction(0)), 2)
    report: MemoryReport = model.model.last_report
    assert clip.encoder.fetched_bytes == encoder_bytes
    assert (report.made_tokens, report.fetched_bytes, report.passes) == (0, 0, STEPS)

    other = encode(clip, vae, instruction(1))
    sample(model, other, 2)
    report = model.model.last_report
    assert report.made_tokens == blocks * tokens_of(other)[1]  # the negative prompt is the same
    assert tokens_of(other)[0] == tokens_of(conds)[0]
    assert report.passes == STEPS
    assert store.fetched_blocks == blocks

    fresh, *_ = load()
    assert torch.equal(sample(fresh, conds, 2), second_seed)


class Live:
    """Bytes of all tensors of this process, each storage once, and of what a transformer holds."""

    def __init__(self, model: Any) -> None:
        self._transformer = model.model.transformer

    def now(self) -> dict[str, int]:
        gc.collect()
        storages: dict[int, int] = {}
        for tensor in _tensors():
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        store = self._transformer.store
        return {
            "all": sum(storages.values()),
            "device": store.resident_bytes,
            "host": store.held_bytes,
            "kept": store.kept.resident_bytes + store.kept.held_bytes,
        }


def _tensors() -> Iterator[Tensor]:
    for one in gc.get_objects():
        if type(one) in (Tensor, torch.nn.Parameter) and one.device.type == "cpu" and one.layout is torch.strided:
            yield one


@pytest.mark.parametrize(("in_ram", "remade"), [(True, False), (False, True)], ids=["in RAM", "made anew"])
def test_memory_is_flat_over_ten_images_where_the_card_has_no_room_for_the_prefix(
    in_ram: bool,
    remade: bool,
    load: Any,  # noqa: F811
) -> None:
    model, clip, vae = load()
    conds = encode(clip, vae, instruction(0))
    sample(model, conds, 0)
    footprint, request = model.model.transformer.footprint, model.model.last_report.plan.request
    model.model.transformer.unload()
    model.model.transformer.store.leave_host()
    kept_bytes = footprint.all_blocks * footprint.kept_block_bytes(request)
    model.model.limit_bytes = least_bytes(footprint, request) + footprint.kept_block_bytes(request) // 2
    model.model.ram_limit_bytes = footprint.ring_bytes + (kept_bytes + kept_bytes // 2 if in_ram else 0)
    live, seen, reports = Live(model), list[dict[str, int]](), list[MemoryReport]()
    for number in range(10):
        sample(model, encode(clip, vae, instruction(number)), number)
        reports.append(model.model.last_report)
        seen.append(live.now())
    kept = reports[0].plan.kept
    assert kept.on_device == 0
    assert (kept.in_host > 0, kept.remade > 0) == (in_ram, remade)
    assert all(report.plan.kept == kept for report in reports)
    assert all(one["host"] <= model.model.ram_limit_bytes for one in seen)
    assert all(one == seen[1] for one in seen[2:]), seen
    made = [report.made_tokens for report in reports]
    assert len(set(made[1:])) == 1  # none takes longer than the one before
    blocks = footprint.all_blocks
    assert made[-1] == (blocks * tokens_of(conds)[1] if in_ram else STEPS * blocks * sum(tokens_of(conds)))
    assert all(report.passes == STEPS for report in reports)


def test_the_report_says_what_was_made_kept_and_brought(load: Any) -> None:  # noqa: F811
    from qwenimage_lowvram.nodes.memory_report import QwenLowVRAMMemoryReport

    model, clip, vae = load()
    conds = encode(clip, vae, instruction(0))
    sample(model, conds, 1)
    footprint, request = model.model.transformer.footprint, model.model.last_report.plan.request
    model.model.transformer.unload()
    model.model.transformer.store.leave_host()
    model.model.limit_bytes = least_bytes(footprint, request) + footprint.kept_block_bytes(request) // 2
    for seed in (1, 2):
        sample(model, conds, seed)
        report: MemoryReport = model.model.last_report
        assert (report.made_tokens > 0) == (seed == 1)
        assert report.kept_device_bytes == 0
        assert report.kept_ram_bytes == bytes_of(model, footprint.all_blocks * sum(tokens_of(conds)))
        assert report.kept_ram_bytes <= report.plan.kept.host_bytes
        # in the first step they are where they were made
        copies = STEPS if seed == 2 else STEPS - 1
        assert report.kept_brought_bytes == copies * report.kept_ram_bytes
        assert report.copied_bytes > report.kept_brought_bytes
    text, _, numbers = QwenLowVRAMMemoryReport().report(model)["result"]
    assert "  prompt and references: 0 tokens computed through all blocks; kept 0.0 MiB on the device and " in text
    assert "brought from there" in text
    sampling = json.loads(numbers)["sampling"]
    assert sampling["kept_brought_bytes"] == report.kept_brought_bytes
    assert sampling["made_tokens"] == 0
    assert BASE["steps"] > STEPS
