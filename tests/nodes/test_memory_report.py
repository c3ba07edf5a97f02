"""The Memory Report tells what each stage took beside what was planned, in words, numbers and an image."""

import json
import math
import mmap
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.errors import InvalidRequest, Unsupported
from qwenimage_lowvram.engine.planning.draft import least_bytes
from qwenimage_lowvram.engine.planning.request import SamplingRequest
from qwenimage_lowvram.engine.planning.stages import Stage
from qwenimage_lowvram.engine.reports.image_report import Moved
from qwenimage_lowvram.engine.runs.timeline import MOST_SAMPLES, MOST_STAGES, Timeline
from qwenimage_lowvram.engine.texts import size_text

from .conftest import cond, empty_latent
from .test_model import ksampler
from .test_out_of_memory import FullMemory

ALL = ["encode", "load", "modulation", "sampling", "decode"]
CPU = torch.device("cpu")
SIZE = (112, 80)
STEPS = 4


class Graph:
    """Load, encode, sample and decode of one loader; each `run` is a prompt of its own."""

    def __init__(self, folder: Path) -> None:
        from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
        from qwenimage_lowvram.engine.hardware import Hardware
        from qwenimage_lowvram.engine.models.qwen25_vl.text_encoder import TextEncoder
        from qwenimage_lowvram.engine.models.qwen_image.prompts import PromptTokenizer
        from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
        from qwenimage_lowvram.nodes.adapters.clip import LowVRAMCLIP
        from qwenimage_lowvram.nodes.adapters.model import make_model
        from qwenimage_lowvram.nodes.adapters.progress import executing_prompt_id
        from qwenimage_lowvram.nodes.adapters.vae import make_vae

        options = {"dtype": torch.float32, "hardware": Hardware.detect(CPU)}
        timeline = Timeline(executing_prompt_id)
        encoder = TextEncoder(open_checkpoint(folder / "text_encoder"), **options)
        self.transformer = QwenImageTransformer(open_checkpoint(folder / "transformer"), **options)
        self.clip = LowVRAMCLIP(encoder, PromptTokenizer(folder / "tokenizer"), None, timeline)
        self.model = make_model(self.transformer, None, None, timeline)
        self.vae = make_vae(open_checkpoint(folder / "vae"), dtype=torch.float32, limit_bytes=None, timeline=timeline)
        self.conds: Any = None
        self.prompts = 0

    def run(self, *, encode: bool = True, seed: int = 1) -> dict[str, Any]:
        from comfy_execution.utils import CurrentNodeContext
        from qwenimage_lowvram.nodes.decode import QwenLowVRAMDecode
        from qwenimage_lowvram.nodes.encode import QwenLowVRAMEncodePrompts
        from qwenimage_lowvram.nodes.memory_report import QwenLowVRAMMemoryReport
        from qwenimage_lowvram.nodes.sample import QwenLowVRAMSample

        self.prompts += 1
        with CurrentNodeContext(f"prompt {self.prompts}", "1"):
            if encode:
                self.conds = QwenLowVRAMEncodePrompts().encode(self.clip, "a red circle", " ")
            empty = {"samples": torch.zeros(1, 16, SIZE[1] // 8, SIZE[0] // 8)}
            sample = QwenLowVRAMSample().sample
            latents = sample(self.model, *self.conds, empty, seed, STEPS, 4.0, "euler", "qwen_image", 1.0, True)
            image = QwenLowVRAMDecode().decode(latents["result"][0], self.vae, 0)[0]
            return QwenLowVRAMMemoryReport().report(self.model, image)


@pytest.fixture
def graph(small_pipeline: Path) -> Graph:
    return Graph(small_pipeline)


def numbers(answer: dict[str, Any]) -> dict[str, Any]:
    values = json.loads(answer["result"][2])
    assert values["version"] == 1
    return values


def stages(answer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {stage["stage"]: stage for stage in numbers(answer)["stages"]}


def test_every_stage_is_measured_in_its_order(graph: Graph) -> None:
    answer = graph.run()
    found = numbers(answer)["stages"]
    assert [stage["stage"] for stage in found] == ALL
    for stage, following in pairwise(found):
        assert stage["start_seconds"] + stage["seconds"] <= following["start_seconds"] + 1e-6
    for stage in found:
        assert stage["seconds"] > 0
        assert stage["ram_bytes"] >= stage["ram_before_bytes"] > 0
        assert stage["vram_bytes"] is None  # the CPU has no other memory
        assert stage["plan"]["stage"] == stage["stage"]
        assert 0 < stage["plan"]["peak_bytes"] <= numbers(answer)["sampling"]["plan"]["limits"]["vram_bytes"]
    assert "not run" not in answer["result"][0]


def test_the_bytes_are_those_that_the_models_count(graph: Graph) -> None:
    found = stages(graph.run())
    report, table = graph.model.model.last_report, graph.transformer.modulation
    assert found["encode"]["moved"]["file_bytes"] == graph.clip.encoder.fetched_bytes > 0
    assert found["modulation"]["moved"]["file_bytes"] == table.fetched_bytes == report.modulation_bytes > 0
    assert found["load"]["moved"]["file_bytes"] + found["sampling"]["moved"]["file_bytes"] == report.fetched_bytes > 0
    assert found["decode"]["moved"]["file_bytes"] == 0
    assert found["encode"]["moved"]["disk_seconds"] > 0


def test_streamed_blocks_are_counted_at_every_step(graph: Graph) -> None:
    request = SamplingRequest(*SIZE, 2, 9, timesteps=STEPS)
    graph.model.model.limit_bytes = least_bytes(graph.transformer.footprint, request) + 100_000
    graph.model.model.ram_limit_bytes = 3_000_000
    found = stages(graph.run())
    report = graph.model.model.last_report
    assert report.plan.from_file > 0
    streamed = STEPS * report.plan.streamed * graph.transformer.store.fetched_bytes / report.fetched_blocks
    assert found["sampling"]["moved"]["file_bytes"] == pytest.approx(streamed, rel=0.01)
    assert found["sampling"]["moved"]["disk_seconds"] == pytest.approx(report.waited_disk_seconds)
    assert found["sampling"]["plan"]["peak_bytes"] <= report.plan.limit_bytes


def test_the_text_says_the_numbers(graph: Graph) -> None:
    answer = graph.run()
    text, values = answer["result"][0], numbers(answer)
    assert values["text"] == text
    assert answer["ui"]["text"] == [text]
    assert answer["ui"]["parts"][0]["rows"][1][0] == "encode"
    assert [part["code"] for part in answer["ui"]["parts"] if "code" in part][:2] == [
        "memory_report.together",
        "run_report.run",
    ]
    lines = text.splitlines()
    for line, stage in zip(lines[1:], values["stages"], strict=False):
        assert line.split()[0] == stage["stage"]
        assert size_text(stage["plan"]["ram_bytes"]) in line
        assert size_text(stage["ram_grown_bytes"]) in line
        assert size_text(stage["moved"]["file_bytes"]) in line
    total = sum(stage["moved"]["file_bytes"] for stage in values["stages"])
    assert values["moved"]["file_bytes"] == total
    assert f"{size_text(total)} read from files" in text
    waited = sum(stage["moved"]["disk_seconds"] for stage in values["stages"])
    assert f"waited {waited:.1f} s for the disk" in text
    assert values["sampling"]["text"] in text
    assert set(values["machine"]) == {"device", "system", "python", "torch", "comfyui"}


def test_another_seed_reports_only_what_ran(graph: Graph) -> None:
    graph.run()
    answer = graph.run(encode=False, seed=2)
    assert list(stages(answer)) == ["load", "sampling", "decode"]
    assert stages(answer)["load"]["moved"]["file_bytes"] == 0  # resident blocks are still there
    assert "the result was already known or another node did it: encode, modulation" in answer["result"][0]
    assert graph.model.model.timeline.samples[0].seconds < 0.1


def test_visits_of_one_stage_are_put_together(graph: Graph) -> None:
    from comfy_execution.utils import CurrentNodeContext

    with CurrentNodeContext("prompt", "1"):
        graph.clip.encode_prompts(["a red circle"])
        first = graph.model.model.timeline.reports[0]
        graph.clip.encode_prompts(["a red circle and a blue square"])
    (both,) = graph.model.model.timeline.reports
    assert both.moved.file_bytes == 2 * first.moved.file_bytes
    assert both.seconds > first.seconds
    assert both.plan.peak_bytes > first.plan.peak_bytes
    assert both.attempts == 1


def test_what_had_to_be_done_again_is_reported(model: Any) -> None:
    def run() -> None:
        model.detach()
        model.model.transformer.modulation.forget()
        ksampler(model, cond(), cond(5, 2), empty_latent(), steps=2)

    with FullMemory(0, 0) as memory:
        run()
    with FullMemory(memory.operations // 2, 1):
        run()
    assert model.model.last_report.out_of_memory == 1
    (sampling,) = (report for report in model.model.timeline.reports if report.stage is Stage.SAMPLING)
    assert sampling.attempts == 2


def test_a_decode_that_is_tried_again_is_reported_with_its_last_plan(graph: Graph) -> None:
    latents = torch.zeros(1, 16, 1, 64, 64)
    graph.vae.decode(latents)  # loads the weights
    with FullMemory(0, 0) as memory:
        graph.vae.decode(latents)
    with FullMemory(memory.operations // 2, 1):
        graph.vae.decode(latents)
    (report,) = graph.model.model.timeline.reports
    assert report.attempts == 2
    assert report.seconds > 0


def test_the_image_shows_the_stages_and_is_on_the_node(graph: Graph) -> None:
    answer = graph.run()
    image = answer["result"][1]
    assert image.shape[0] == 1
    assert image.shape[2:] == (1200, 3)
    assert len(answer["ui"]["images"]) == 1
    assert image.unique(dim=1).shape[1] > 20


def test_a_report_before_any_run_says_what_to_do(graph: Graph) -> None:
    from qwenimage_lowvram.nodes.memory_report import QwenLowVRAMMemoryReport

    with pytest.raises(InvalidRequest, match="connect the image from Decode"):
        QwenLowVRAMMemoryReport().report(graph.model)
    foreign = type("Patcher", (), {"model": object()})
    with pytest.raises(Unsupported, match="Load Qwen-Image"):
        QwenLowVRAMMemoryReport().report(foreign)
    assert math.isnan(QwenLowVRAMMemoryReport.IS_CHANGED(model=None))


@pytest.fixture
def timeline() -> Iterator[Timeline]:
    yield Timeline()
    assert not [thread for thread in threading.enumerate() if thread.name == "qwen-timeline"]


def test_a_long_run_keeps_few_samples_over_its_whole_length(timeline: Any) -> None:
    with timeline.stage(Stage.SAMPLING, CPU):
        for _ in range(3 * MOST_SAMPLES):
            timeline.sample(kept=True)
    samples = timeline.samples
    assert MOST_SAMPLES / 2 <= len(samples) <= MOST_SAMPLES
    assert samples[0].seconds < samples[-1].seconds / 10
    for _ in range(2 * MOST_STAGES):
        with timeline.stage(Stage.DECODE, CPU):
            pass
    assert len(timeline._reports) == MOST_STAGES


def test_a_stage_that_fails_is_measured_and_leaves_no_thread(timeline: Any) -> None:
    def counters() -> Iterator[Moved]:
        yield Moved(file_bytes=10)
        yield Moved(file_bytes=30, bus_seconds=1.0)

    counted: Callable[[], Moved] = counters().__next__
    with pytest.raises(KeyboardInterrupt), timeline.stage(Stage.ENCODE, CPU, moved=counted):
        raise KeyboardInterrupt
    (report,) = timeline.reports
    assert report.moved == Moved(file_bytes=20, bus_seconds=1.0)
    assert report.plan is None
    timeline.sample()  # outside of a stage there is nothing to look at
    assert {sample.stage for sample in timeline.samples} == {Stage.ENCODE}


def test_the_peak_of_a_stage_is_seen_between_two_reports(timeline: Any) -> None:
    # not from the heap, which may have as much left of earlier tests
    with timeline.stage(Stage.DECODE, CPU), mmap.mmap(-1, 100_000_000) as block:
        for _ in range(100):
            block.write(bytes(1_000_000))
        threading.Event().wait(0.3)
    (report,) = timeline.reports
    assert report.ram_grown_bytes > 90_000_000
