"""The benchmark's node in ComfyUI: what it shows, its interruption, and what is left of a MODEL afterwards."""

import json
import math
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.errors import InvalidRequest, Unsupported
from qwenimage_lowvram.engine.runs import card_benchmark, machine_speeds
from qwenimage_lowvram.engine.runs.random_block import BlockSize

from .conftest import sample

SIDES = {"width": 64, "height": 32}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"SECONDS_EACH": 0.001, "PIECE_BYTES": 1 << 16, "MLP_SHAPE_ON_HOST": (16, 64, 256)}
    for name, value in small.items():
        monkeypatch.setattr(machine_speeds, name, value)
    block = {"BLOCK_SECONDS": 0.001, "HOST_BLOCK": BlockSize(heads=1, prompt_dim=64), "HOST_SIDES": (64, 32)}
    for name, value in block.items():
        monkeypatch.setattr(card_benchmark, name, value)


def measure(**inputs: Any) -> dict[str, Any]:
    from qwenimage_lowvram.nodes.card_benchmark import QwenLowVRAMBenchmark

    return QwenLowVRAMBenchmark().measure(**{**SIDES, **inputs})


def shown(answer: dict[str, Any]) -> dict[str, Any]:
    line, numbers = answer["result"]
    assert answer["ui"]["text"] == [line, "", numbers]
    values: dict[str, Any] = json.loads(numbers)
    assert values["line"] == line
    return values


def test_it_shows_a_line_and_the_numbers(model: Any, transformer: Any) -> None:
    import comfyui_version

    values = shown(measure(model=model))
    assert values["machine"]["comfyui"] == comfyui_version.__version__
    assert values["run"]["done_steps"] == card_benchmark.STEPS
    assert transformer.file.name not in json.dumps(values)
    assert shown(measure())["run"] is None


def test_the_limits_of_the_loader_are_kept(model: Any) -> None:
    model.model.limit_bytes, model.model.ram_limit_bytes = 3_000_000, 40_000_000
    plan = shown(measure(model=model))["run"]["plan"]
    assert plan["limits"] == {"vram_bytes": 3_000_000, "ram_bytes": 40_000_000}


def test_loras_of_the_model_are_measured_with_it(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwenimage_lowvram.nodes.adapters import around_runs

    seen: list[Any] = []
    monkeypatch.setattr(around_runs, "lora_patches", lambda loras: seen.append(loras) or {})
    changed = model.clone()
    changed.loras = (("a LoRA", 1.0),)
    measure(model=changed)
    assert seen == [changed.loras]


def test_a_model_samples_the_same_after_it_and_comfyui_counts_right(model: Any) -> None:
    import comfy.model_management as management

    before = sample(model, steps=2)["result"][0]["samples"]
    assert management.current_loaded_models
    measure(model=model)
    assert model.loaded_size() == model.model.transformer.loaded_bytes == 0
    assert torch.equal(sample(model, steps=2)["result"][0]["samples"], before)
    assert model.loaded_size() == model.model.transformer.loaded_bytes > 0


def test_an_interruption_ends_it(model: Any) -> None:
    import comfy.model_management as management

    for inputs in ({"model": model}, {}):
        management.interrupt_current_processing()
        with pytest.raises(management.InterruptProcessingException):
            measure(**inputs)
        assert model.loaded_size() == model.model.transformer.loaded_bytes == 0


def test_comfyuis_bar_moves(model: Any, comfy: Any) -> None:
    import comfy.utils
    from comfy_execution.utils import CurrentNodeContext

    bars: list[tuple[int, int]] = []
    comfy.utils.set_progress_bar_global_hook(lambda done, total, preview, **_: bars.append((done, total)))
    try:
        with CurrentNodeContext("p", "1"):
            measure(model=model)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert bars[0] == (0, 5)
    assert bars[-1] == (5, 5)
    assert len({total for _, total in bars}) > 1  # the short run has its own


def test_what_it_cannot_measure_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from comfy.model_patcher import ModelPatcher

    other = ModelPatcher(torch.nn.Linear(1, 1), torch.device("cpu"), torch.device("cpu"))
    with pytest.raises(Unsupported, match="works only with models from 'Load Qwen-Image") as refused:
        measure(model=other)
    assert refused.value.code == "benchmark.other_loader"
    with pytest.raises(InvalidRequest, match="model is"):
        measure(model="a text")
    with pytest.raises(InvalidRequest, match="width is 20000"):
        measure(width=20000)
    with pytest.raises(InvalidRequest, match="100x32 px cannot be made"):
        measure(model=model, width=100)


def test_every_queue_measures_again() -> None:
    from qwenimage_lowvram.nodes.card_benchmark import QwenLowVRAMBenchmark

    assert math.isnan(QwenLowVRAMBenchmark.IS_CHANGED(width=64, height=64))
