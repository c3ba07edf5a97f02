"""Memory that runs out at any point of a run costs a smaller plan, never the image; or there is a clear error."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.out_of_memory import OutOfRam
from qwenimage_lowvram.engine.planning.draft import least_bytes
from qwenimage_lowvram.engine.planning.request import SamplingRequest
from torch.utils._python_dispatch import TorchDispatchMode

from .conftest import cond, empty_latent
from .test_host_memory import on_card
from .test_model import ksampler

STRIDE = 3  # the parts of the test take others of the operations that fail
Sample = Callable[[], torch.Tensor]


class FullMemory(TorchDispatchMode):
    """A card that other programs fill: from operation `first` on, `count` operations find no memory."""

    def __init__(self, first: int, count: int) -> None:
        super().__init__()
        self.fails = range(first, first + count)
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        if self.operations in self.fails:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def sample(model: Any) -> Sample:
    """A run whose model is not loaded yet and whose modulation table is not known."""

    def run() -> torch.Tensor:
        model.detach()
        model.model.transformer.modulation.forget()
        return ksampler(model, cond(), cond(5, 2), empty_latent(), steps=2)

    return run


def count_operations(sample: Sample) -> int:
    with FullMemory(0, 0) as memory:
        sample()
    return memory.operations


@pytest.mark.parametrize("part", range(STRIDE))
def test_memory_that_runs_out_once_anywhere_changes_no_image(part: int, model: Any, sample: Sample) -> None:
    expected = sample()
    retried = refused = 0
    for point in range(1 + 25 * part, count_operations(sample), 25 * STRIDE):
        try:
            with FullMemory(point, 1):
                image = sample()
        except torch.OutOfMemoryError:
            refused += 1  # in ComfyUI's own operations around the run
        else:
            assert torch.equal(image, expected)
            retried += model.model.last_report.out_of_memory
        assert model.model.calls.run is None
    assert retried > 4 * refused
    assert torch.equal(sample(), expected)


def test_memory_that_stays_full_is_an_error_that_leaves_nothing(model: Any, sample: Sample) -> None:
    expected = sample()
    total = count_operations(sample)
    told = 0
    with LiveBytes("cpu") as live:
        sample()
        model.detach()
        model.model.transformer.modulation.forget()
        before = live.now
        for point in range(1, total, total // 40):
            try:
                with FullMemory(point, 10**9):
                    sample()
            except torch.OutOfMemoryError as error:
                told += "The card's memory ran out although" in str(
                    error
                ) and "What to do: close other programs" in str(error)
            else:
                pytest.fail(f"operation {point} and all after it found no memory, and there was an image")
            model.detach()
            model.model.transformer.modulation.forget()
            assert live.now <= before
    assert told > 20
    assert torch.equal(sample(), expected)


def test_what_is_done_when_memory_runs_out_is_said(
    model: Any, sample: Sample, transformer: QwenImageTransformer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    total = count_operations(sample)
    with FullMemory(total // 2, 1):
        sample()
    (record,) = [record for record in caplog.records if "Memory ran out" in record.message]
    assert "Tried to allocate 20.00 MiB" in record.message
    assert "Memory plan for " in record.message
    report = model.model.last_report
    assert report.out_of_memory == 1
    assert len(report.plan.resident) < transformer.config.num_layers
    assert report.plan.peak_bytes < report.plan.limit_bytes


def test_a_plan_that_cannot_be_smaller_is_an_error_at_once(
    model: Any, sample: Sample, transformer: QwenImageTransformer
) -> None:
    model.model.limit_bytes = least_bytes(transformer.footprint, SamplingRequest(96, 64, 2, 9))
    total = count_operations(sample)
    with FullMemory(total // 2, 1), pytest.raises(torch.OutOfMemoryError, match="memory ran out although"):
        sample()


class ShrinkingCard(TorchDispatchMode):
    """A card that others fill meanwhile: what is free is less at each look, and the first `count` attempts fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: list[int], error: BaseException, at: int) -> None:
        super().__init__()
        from qwenimage_lowvram.nodes.adapters import in_comfyui as surroundings

        self.error, self.at, self.operations = error, at, 0
        self.left = len(free)
        amounts = iter(free)
        stage_bytes, first = surroundings.stage_bytes, iter([True])  # which is the plan that the run begins with

        def look(*args: Any, **options: Any) -> int:
            return stage_bytes(*args, **options) if next(first, False) else next(amounts)

        monkeypatch.setattr(surroundings, "stage_bytes", look)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        if self.left and self.operations >= self.at:
            self.left -= 1
            self.operations = 0
            raise self.error
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(""),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_plan_goes_down_with_what_is_really_free_until_it_fits(
    error: BaseException, model: Any, sample: Sample, transformer: QwenImageTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = sample()
    plan = model.model.last_report.plan
    least = least_bytes(transformer.footprint, SamplingRequest(96, 64, 2, 9))
    free = [plan.peak_bytes - 1, (plan.peak_bytes + least) // 2, least]
    total = count_operations(sample)
    with ShrinkingCard(monkeypatch, free, error, total // 3):
        assert torch.equal(sample(), expected)
    report = model.model.last_report
    assert report.out_of_memory == len(free)
    assert report.plan.limit_bytes == least
    assert report.plan.peak_bytes <= least


def test_the_page_is_told_the_smaller_plan(model: Any, sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwenimage_lowvram.engine.runs import phases
    from qwenimage_lowvram.nodes.adapters import progress

    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(progress, "listens", lambda: True)
    monkeypatch.setattr(progress, "send", lambda event, data: sent.append(data))
    monkeypatch.setattr(phases, "SECONDS_BETWEEN_EVENTS", 0.0)
    total = count_operations(sample)
    sent.clear()
    with FullMemory(total // 2, 1):
        sample()
    plans = list(dict.fromkeys(data["plan"] for data in sent if "plan" in data))
    assert len(plans) == 2
    assert plans[-1] == str(model.model.last_report.plan)
    assert sent[-1]["facts"]["limit_bytes"] == model.model.last_report.plan.limit_bytes


def test_the_least_plan_is_tried_before_giving_up(
    model: Any, sample: Sample, transformer: QwenImageTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwenimage_lowvram.engine.runs import retry as run

    monkeypatch.setattr(run, "SMALLER", 0.3)  # a block of this model is a large part of its plan
    expected = sample()
    least = least_bytes(transformer.footprint, SamplingRequest(96, 64, 2, 9))
    model.model.limit_bytes = least + transformer.footprint.resident_block_bytes
    total = count_operations(sample)
    assert model.model.last_report.plan.peak_bytes * run.SMALLER < least
    with FullMemory(total // 2, 1):
        assert torch.equal(sample(), expected)
    assert model.model.last_report.out_of_memory == 1


def test_the_runs_own_model_is_not_asked_to_leave_when_it_is_planned_anew(
    model: Any, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwenimage_lowvram.nodes.adapters import in_comfyui as run

    total = count_operations(sample)
    asked: list[Any] = []
    stage_bytes = run.stage_bytes
    monkeypatch.setattr(run, "stage_bytes", lambda *a, **k: asked.append(k["reused"]) or stage_bytes(*a, **k))
    with FullMemory(total // 2, 1):
        sample()
    assert len(asked) == 2  # when it is planned, and when it is planned anew
    assert all(patcher.is_clone(model) for patcher in asked)


def test_a_smaller_limit_is_what_is_free_and_a_few_reach_the_least() -> None:
    from qwenimage_lowvram.engine.runs.retry import MOST_TRIES, SMALLER, _below

    assert _below(1000, 700, SMALLER, 100) == 700
    assert _below(1000, 5000, SMALLER, 100) == 850
    assert _below(101, 5000, SMALLER, 100) == 100  # which the last try is
    assert _below(100, 5000, SMALLER, 100) == 99  # and no plan fits
    last, tried = 41_000, 0
    while last > 600:  # all of the model on a card, and the smallest plan of it
        last, tried = _below(last, 10**9, SMALLER ** (tried + 1), 600), tried + 1
    assert tried < MOST_TRIES


def ram_runs_out(streamed: Any, times: int) -> None:
    """Where the run's slots are opened."""
    transformer, errors = streamed.model.transformer, [MemoryError() for _ in range(times)]
    session = transformer.session

    def fails(*args: Any, **kwargs: Any) -> Any:
        if errors:
            raise errors.pop()
        return session(*args, **kwargs)

    transformer.session = fails


@pytest.mark.parametrize("free", [None, 0])
def test_ram_that_runs_out_beside_a_card_costs_held_blocks(
    free: int | None, model: Any, sample: Sample, small_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = sample()
    model.detach()
    streamed = on_card(small_pipeline, blocks_in_ram=3)
    ram_runs_out(streamed, 1)
    if free is not None:
        monkeypatch.setattr("qwenimage_lowvram.nodes.adapters.in_comfyui.free_ram", lambda: free)
    image = ksampler(streamed, cond(), cond(5, 2), empty_latent(), steps=2)
    assert torch.equal(image, expected)
    report = streamed.model.last_report
    assert report.out_of_memory == 1
    assert len(report.plan.held) == (1 if free is None else 0)  # of 3: a block is a large part of so small a plan
    assert report.plan.ram_peak_bytes <= report.plan.limits.ram_bytes


def test_ram_that_stays_full_is_said_to_be_ram(small_pipeline: Path) -> None:
    streamed = on_card(small_pipeline, blocks_in_ram=3)
    ram_runs_out(streamed, 99)
    with pytest.raises(OutOfRam, match=r"RAM ran out although no more than .* leaves .* GiB now\.\n\nWhat to do: "):
        ksampler(streamed, cond(), cond(5, 2), empty_latent(), steps=2)


def test_comfyui_still_knows_a_model_whose_run_was_planned_smaller(
    model: Any, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as management
    from qwenimage_lowvram.nodes.adapters import in_comfyui as run

    total = count_operations(sample)
    counted: list[int] = []
    stage_bytes = run.stage_bytes
    monkeypatch.setattr(run, "stage_bytes", lambda *a, **k: counted.append(model.loaded_size()) or stage_bytes(*a, **k))
    with FullMemory(total // 2, 1):
        sample()
    assert counted[1:] == [model.model.transformer.footprint.outside_bytes]  # what was given back is free, not held
    assert [entry.model for entry in management.current_loaded_models if entry.model is model] == [model]
    assert model.loaded_size() == model.model.transformer.loaded_bytes
