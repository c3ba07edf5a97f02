"""A machine is measured with a model or without one: rates, a block, a short run; and nothing is told of its owner."""

import ctypes
import getpass
import json
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.compute.linear_choice import Computing
from qwenimage_lowvram.engine.drivers import nvidia_driver
from qwenimage_lowvram.engine.errors import DoesNotFit, InvalidRequest
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen_image.family import QWEN_IMAGE
from qwenimage_lowvram.engine.models.qwen_image_21.family import QWEN_IMAGE_21
from qwenimage_lowvram.engine.reports.card_report import CardReport
from qwenimage_lowvram.engine.runs import card_benchmark, machine_speeds
from qwenimage_lowvram.engine.runs.card_benchmark import STEPS, Bench, benchmark_card, benchmark_model
from qwenimage_lowvram.engine.runs.limit import Limit
from qwenimage_lowvram.engine.runs.machine_facts import machine_facts
from qwenimage_lowvram.engine.runs.random_block import REAL, BlockSize, Stored, random_block, random_block_bytes
from qwenimage_lowvram.engine.runs.sampling_plan import Transformer
from qwenimage_lowvram.engine.runs.surroundings import Alone
from small_transformer_21 import random_weights, write_folder

SIDES = {"width": 64, "height": 32}
CPU = torch.device("cpu")
A_PATH = re.compile(r"[A-Za-z]:\\|(?<![\w.])/\w|\w/\w+/\w")
Made = Callable[..., Transformer]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on smaller shapes, each a few times."""
    tiny = BlockSize(heads=1, prompt_dim=64)
    for name, value in {"BLOCK_SECONDS": 0.001, "HOST_BLOCK": tiny, "REAL": tiny, "HOST_SIDES": (64, 32)}.items():
        monkeypatch.setattr(card_benchmark, name, value)
    shape = (16, 64, 256)
    small = {"SECONDS_EACH": 0.001, "PIECE_BYTES": 1 << 16, "MLP_SHAPE": shape, "MLP_SHAPE_ON_HOST": shape}
    for name, value in small.items():
        monkeypatch.setattr(machine_speeds, name, value)


@pytest.fixture
def make(small_pipeline: Path) -> Made:
    def opened(hardware: Hardware, **settings: Any) -> Transformer:
        file = open_checkpoint(small_pipeline / "transformer")
        return QWEN_IMAGE.open(file, dtype=torch.float32, hardware=hardware, **settings)

    return opened


def bench(around: Alone | None = None, **settings: Any) -> Bench:
    return Bench(around or Alone(), machine=machine_facts(CPU), **settings)


def of_model(transformer: Transformer, **settings: Any) -> CardReport:
    return benchmark_model(transformer, QWEN_IMAGE.from_prompts, bench(**settings), **SIDES)


def require_no_owner(report: CardReport, *names: str) -> Mapping[str, Any]:
    """Neither paths nor names in what a person shows to others; the JSON's values."""
    text = json.dumps(report.as_dict())
    owner = [platform.node(), str(Path.home()), *names, *([] if len(getpass.getuser()) < 5 else [getpass.getuser()])]
    for said in (report.line, text):
        assert not A_PATH.search(said.replace("\\n", " ")), A_PATH.search(said)
        assert not [name for name in owner if name in said]
    assert "\n" not in report.line
    values: Mapping[str, Any] = json.loads(text)
    assert set(values) == {
        "version", "line", "machine", "rates", "blocks", "model", "run", "notes", "numerics_version",
    }  # fmt: skip
    assert values["version"] == 1
    assert values["line"] == report.line
    return values


@pytest.mark.parametrize("host", [True, False], ids=["CPU", "as a card"])
def test_with_a_model_its_disk_its_block_and_two_steps_are_measured(host: bool, make: Made, cpu: Hardware) -> None:
    transformer = make(replace(cpu, host_device=host))
    report = of_model(transformer)
    values = require_no_owner(report, transformer.file.name, transformer.file.parent.parent.name)
    run, (block,) = values["run"], values["blocks"]
    assert (run["steps"], run["done_steps"], run["passes"]) == (STEPS, STEPS, STEPS)
    assert 0 < run["later_seconds"] < run["pass_seconds"]
    assert (run["plan"]["request"]["width"], run["plan"]["request"]["branches"]) == (SIDES["width"], 1)
    assert all(values["rates"][name] > 0 for name in ("flops", "bus_bytes", "memory_bytes", "disk_bytes"))
    assert block["stored_bytes"] == transformer.store.raw_bytes
    assert block["brought_seconds"] > 0
    assert block["computed_seconds"] > 0
    assert (block["width"], block["height"]) == (SIDES["width"], SIDES["height"])
    assert report.run is not None
    forecast = report.run.plan.forecast.seconds
    assert f"{report.run.later_seconds:.3g} s/step (forecast {forecast:.3g})" in report.line
    assert "Qwen-Image fp32" in report.line
    assert ("as this is a CPU" in report.line) == host
    assert transformer.loaded_bytes == 0


def test_the_forecast_is_by_what_was_measured_now(make: Made, cpu: Hardware, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_benchmark, "measure_flops", lambda *_: 1e6)
    report = of_model(make(cpu))
    assert report.run is not None
    flops = 2.0 * report.run.plan.blocks  # far less than there are
    assert report.run.plan.forecast.compute_seconds > flops / 1e6
    assert report.run.plan.forecast.seconds > 10 * report.run.later_seconds


def test_qwen_image_21_is_measured_too(tmp_path: Path, cpu: Hardware) -> None:
    file = open_checkpoint(write_folder(tmp_path / "transformer", random_weights()))
    transformer = QWEN_IMAGE_21.open(file, dtype=torch.float32, hardware=cpu)
    report = benchmark_model(transformer, QWEN_IMAGE_21.from_prompts, bench(), **SIDES)
    values = require_no_owner(report, tmp_path.name)
    assert values["model"].startswith("Qwen-Image-2.1")
    assert values["run"]["later_seconds"] > 0
    assert values["blocks"][0]["computed_seconds"] > 0


@pytest.mark.parametrize("host", [True, False], ids=["CPU", "as a card"])
def test_without_a_model_a_block_of_random_weights_is_measured_and_no_disk(host: bool, cpu: Hardware) -> None:
    report = benchmark_card(replace(cpu, host_device=host), lambda file: torch.float32, bench(), **SIDES)
    values = require_no_owner(report)
    assert values["run"] is values["model"] is values["rates"]["disk_bytes"] is None
    formats = [block["weight_format"] for block in values["blocks"]]
    assert formats == (["bf16"] if host else ["bf16", "int8"])
    assert all(block["computed_seconds"] > 0 for block in values["blocks"])
    assert "disk not measured" in report.line
    assert "no model file" in report.line
    assert ("as this is a CPU" in report.line) == host
    assert ("int8 not computed as stored here" in report.line) == host  # where decoded weights are faster


def test_int8_is_computed_as_stored_where_that_works(cpu: Hardware) -> None:
    report = benchmark_card(cpu, lambda file: torch.float32, bench(), **SIDES, computing=Computing.FAST)
    plain, stored = require_no_owner(report)["blocks"]
    assert (plain["products"], stored["products"]) == ("fp32", "int8 by comfy-kitchen eager")
    assert stored["stored_bytes"] < 0.6 * plain["stored_bytes"]
    assert "int8 not computed" not in report.line


def test_the_random_block_is_as_large_as_qwen_images() -> None:
    shapes = {stored: random_block(stored, REAL).tensors for stored in Stored}
    block = sum(
        entry.nbytes
        for name, entry in shapes[Stored.BF16].items()
        if name.startswith("transformer_blocks.0.") and len(entry.shape) == 2
    )
    assert 0.67e9 < block < 0.69e9
    assert shapes[Stored.INT8]["transformer_blocks.0.attn.to_q.weight"].dtype == "I8"
    held = {id(entry.data.obj) for entry in shapes[Stored.BF16].values() if isinstance(entry.data, memoryview)}
    assert len(held) == 1  # all of them are the same bytes
    assert random_block_bytes() < 1.7e9


class Interrupted(Exception):
    pass


def stopping(at: int) -> Iterator[None]:
    for _ in range(at):
        yield
    raise Interrupted


@pytest.mark.parametrize("at", [0, 2, 4, 9, 14, 19])
def test_it_can_be_ended_anywhere_and_leaves_nothing_on_the_device(at: int, make: Made, cpu: Hardware) -> None:
    calls = stopping(at)
    transformer = make(cpu)
    with pytest.raises(Interrupted):
        of_model(transformer, around=Alone(check=lambda: next(calls)))
    assert transformer.loaded_bytes == 0
    assert of_model(transformer).run is not None


@pytest.mark.parametrize("at", [0, 1, 2, 3, 4])
def test_without_a_model_too(at: int, cpu: Hardware) -> None:
    calls = stopping(at)
    with pytest.raises(Interrupted):
        benchmark_card(cpu, lambda file: torch.float32, bench(Alone(check=lambda: next(calls))), **SIDES)


def test_progress_names_every_part_and_ends(make: Made, cpu: Hardware) -> None:
    told: list[Mapping[str, Any]] = []
    of_model(make(cpu), around=Alone(on_progress=told.append))
    parts = [(event["done"], event["total"]) for event in told if event["stage"] == "measuring"]
    assert parts[0] == (0, 0)
    assert parts[-1] == (5, 5)
    assert {event["stage"] for event in told} >= {"measuring", "sampling", "done"}
    told.clear()
    around = Alone(on_progress=told.append)
    benchmark_card(cpu, lambda file: torch.float32, bench(around), **SIDES)
    assert (told[-1]["done"], told[-1]["total"]) == (5, 5)


def test_what_does_not_fit_is_refused_with_numbers_before_anything_is_measured(
    make: Made, cpu: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card_benchmark, "measure_disk", lambda file: pytest.fail("it was measured"))
    transformer = make(cpu)
    with pytest.raises(DoesNotFit, match=r"(?s)Sampling needs .*The limit is vram_limit_gb in 'Loader'"):
        of_model(transformer, limit=Limit(100_000, "vram_limit_gb", "'Loader'"))
    assert transformer.store.fetched_blocks == 0
    monkeypatch.setattr(card_benchmark, "measure_flops", lambda *_: pytest.fail("it was measured"))
    with pytest.raises(
        DoesNotFit,
        match=r"Measuring the card needs 0\.50 GiB .*but 0\.39 GiB may be used\.(?s:.*)The limit is limit_bytes\.",
    ):
        of_model(make(replace(cpu, host_device=False)), limit=Limit(400 * 1024**2))
    with pytest.raises(DoesNotFit, match="Sampling needs"):
        benchmark_card(cpu, lambda file: torch.float32, bench(limit=Limit(1000)), **SIDES)
    monkeypatch.setattr(card_benchmark, "random_block_bytes", lambda size: 1 << 60)
    with pytest.raises(DoesNotFit, match=r"A block of the model's size needs .* of RAM"):
        benchmark_card(cpu, lambda file: torch.float32, bench(), **SIDES)


def test_a_size_that_cannot_be_made_is_refused(make: Made, cpu: Hardware) -> None:
    for measure in (
        lambda: benchmark_model(make(cpu), QWEN_IMAGE.from_prompts, bench(), width=100, height=64),
        lambda: benchmark_card(cpu, lambda file: torch.float32, bench(), width=100, height=64),
    ):
        with pytest.raises(InvalidRequest, match="An image of 100x64 px cannot be made") as refused:
            measure()
        assert refused.value.code == "plan.wrong_size"


class Library:
    """As NVIDIA's."""

    def __init__(self, failing: str = "") -> None:
        self.open = 0
        for name in ("nvmlInit_v2", "nvmlSystemGetDriverVersion", "nvmlShutdown"):
            setattr(self, name, lambda *given, name=name: self._call(name, *given) if name != failing else 9)

    def _call(self, name: str, *given: Any) -> int:
        self.open += {"nvmlInit_v2": 1, "nvmlShutdown": -1}.get(name, 0)
        if given:
            given[0].value = b"566.36"
        return 0


def test_the_driver_is_what_its_own_library_says() -> None:
    library = Library()
    assert nvidia_driver(lambda name: library) == "566.36"
    assert library.open == 0
    for failing in ("nvmlInit_v2", "nvmlSystemGetDriverVersion"):
        library = Library(failing)
        assert nvidia_driver(lambda name, library=library: library) is None  # type: ignore[misc]
        assert library.open == 0
    assert nvidia_driver(lambda name: ctypes.CDLL("no such library")) is None


def test_the_facts_of_a_card_stand_in_the_line(make: Made, cpu: Hardware, monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(get_device_name=lambda device: "Card X", mem_get_info=lambda device: (1, 8 * 1024**3))
    monkeypatch.setattr(torch.cuda, "mem_get_info", card.mem_get_info)
    monkeypatch.setattr(torch.cuda, "get_device_name", card.get_device_name)
    facts = machine_facts(torch.device("cuda", 0))
    report = replace(of_model(make(cpu)), machine={**facts, "driver": "566.36", "comfyui": "0.33.0"})
    assert report.run is not None
    report = replace(report, run=replace(report.run, peak_vram_bytes=5 * 1024**3))
    assert report.line.startswith("Card X 8.00 GiB, RAM ")
    for said in ("driver 566.36", f"torch {torch.__version__}", "ComfyUI 0.33.0", "VRAM peak 5.00 GiB"):
        assert said in report.line


def test_what_other_libraries_said_of_an_error_is_left_out(make: Made, cpu: Hardware) -> None:
    report = of_model(make(cpu))
    assert report.run is not None
    said = {"not_compiled": "no C:\\Users\\somebody\\cl.exe", "attention_notes": "/home/somebody/kernel.so: no"}
    values = require_no_owner(replace(report, run=replace(report.run, **said)), "somebody")
    assert values["run"]["passes"] == STEPS


@pytest.mark.parametrize("room", [True, False])
def test_a_block_is_held_in_ram_only_within_the_limit(room: bool, make: Made, cpu: Hardware) -> None:
    transformer = make(replace(cpu, host_device=False))
    probe = of_model(transformer).run
    assert probe is not None
    assert probe.plan.limits.ram_bytes is not None
    block = transformer.store.raw_bytes
    least = probe.plan.ram_peak_bytes - len(probe.plan.held) * block
    limit = least + block // 2 + room * block
    report = of_model(transformer, ram_limit_bytes=limit)
    assert report.run is not None
    assert report.run.plan.ram_peak_bytes <= limit
    assert report.blocks[0].source == ("RAM" if room else "file")
    assert transformer.store.held_bytes <= limit
