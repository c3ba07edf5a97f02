"""Every phase of a run moves: events and ComfyUI's bar, block by block, on a clock of the test's own; and the log where
no page listens."""

import itertools
import logging
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer

from .conftest import sample

BLOCKS, STEPS = 60, 3
NODE = "12:5"  # inside a subgraph
MODULES = ("engine.runs.phases", "engine.runs.run_progress", "nodes.adapters.progress")


class Recorded:
    """What the page would be sent, and where ComfyUI's bar stood."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.bars: list[tuple[int, int]] = []

    def of(self, stage: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event.get("stage") == stage]  # what is told has none


class Clock:
    """Every look at it takes so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._now = itertools.count(1)

    def perf_counter(self) -> float:
        return self.seconds * next(self._now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    import importlib

    clock = Clock(1.0)
    for name in MODULES:
        monkeypatch.setattr(importlib.import_module(f"qwenimage_lowvram.{name}"), "time", clock)
    return clock


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As ComfyUI's: a page has queued the prompt "p" of the graph "g", and listens."""
    from qwenimage_lowvram.nodes.adapters import progress

    item = (0, "p", {}, {"extra_pnginfo": {"workflow": {"id": "g"}}}, [])
    others = [(0, "other", {}, {"extra_pnginfo": {"workflow": {"id": "h"}}}, []), (0, "api", {}, {}, [])]
    queue = SimpleNamespace(get_current_queue_volatile=lambda: ([*others, item], []))
    server = SimpleNamespace(client_id="page", sockets={"page": None}, prompt_queue=queue, sent=[])
    server.send_sync = lambda event, data, sid: server.sent.append((event, data, sid))
    server.send_progress_text = lambda *_: None
    monkeypatch.setattr(progress.PromptServer, "instance", server, raising=False)
    return server


@pytest.fixture
def recorded(server: Any, clock: Clock) -> Iterator[Recorded]:
    import comfy.utils
    from comfy_execution.utils import CurrentNodeContext

    seen = Recorded()
    server.send_sync = lambda event, data, sid: seen.events.append({"event": event, "sid": sid, **data})
    comfy.utils.set_progress_bar_global_hook(lambda done, total, preview, **_: seen.bars.append((done, total)))
    with CurrentNodeContext("p", NODE):
        yield seen
    comfy.utils.set_progress_bar_global_hook(None)


@pytest.fixture(scope="module")
def tall(tmp_path_factory: pytest.TempPathFactory, comfyui_path: Path) -> Path:
    """A pipeline with as many blocks as Qwen-Image has, and as many layers as its text encoder."""
    from small_checkpoint import TextSize, make_pipeline

    folder = tmp_path_factory.mktemp("tall")
    size = TextSize(layers=28)
    return make_pipeline(folder, layers=BLOCKS, heads=1, text=size, comfyui=comfyui_path)


@pytest.fixture
def tall_model(tall: Path) -> Any:
    from qwenimage_lowvram.nodes.adapters.model import make_model

    hardware = Hardware.detect(torch.device("cpu"))
    return make_model(
        QwenImageTransformer(open_checkpoint(tall / "transformer"), dtype=torch.float32, hardware=hardware), None
    )


def require_moving(bars: list[tuple[int, int]], stays: int = 1) -> None:
    """It never falls, and stands still for no more than `stays` moves."""
    shares = [done / total for done, total in bars]
    assert shares == sorted(shares)
    for begin in range(len(shares) - stays - 1):
        assert shares[begin + stays + 1] > shares[begin], f"at {begin} of {bars}"


def test_sampling_tells_of_every_block_of_every_stage(tall_model: Any, recorded: Recorded) -> None:
    sample(tall_model, steps=STEPS, cfg=4.0)
    events = recorded.events
    assert {event["event"] for event in events} == {"qwen_lowvram.progress"}
    assert {(event["node"], event["prompt_id"], event["workflow_id"]) for event in events} == {(NODE, "p", "g")}
    assert {event["sid"] for event in events} == {"page"}
    loading, reading = recorded.of("loading"), recorded.of("modulation")
    resident = len(tall_model.model.last_report.plan.resident)
    assert [event["done"] for event in loading] == list(range(resident + 1))
    assert [event["done"] for event in reading] == list(range(BLOCKS))
    visited = [(event["step"], event["block"]) for event in recorded.of("sampling")]
    assert visited == [(step, block) for step in range(1, STEPS + 1) for block in range(1, BLOCKS + 1)]
    stages = list(dict.fromkeys(event["stage"] for event in events))
    assert stages == ["preparing", "loading", "modulation", "sampling", "done"]


def test_the_bar_stands_still_for_no_two_blocks(tall_model: Any, recorded: Recorded) -> None:
    sample(tall_model, steps=STEPS, cfg=4.0)
    bars = [bar for bar in recorded.bars if bar[1] != STEPS]  # that of the sampler moves by steps, beside it
    moved = [list(group) for _, group in itertools.groupby(bars, key=lambda bar: bar[1])]
    parts = [moves[0][1] for moves in moved]
    assert parts == [BLOCKS, STEPS * BLOCKS] or parts == [BLOCKS, BLOCKS, STEPS * BLOCKS]
    assert len(moved[-1]) == STEPS * BLOCKS
    split = moved if len(moved) == 3 else [*_restarts(moved[0]), moved[-1]]
    for moves in split:
        require_moving(moves)


def _restarts(moves: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Of two bars with as many parts, one after the other."""
    second = next(i for i, (before, after) in enumerate(pairwise(moves)) if after[0] < before[0]) + 1
    return [moves[:second], moves[second:]]


def test_prompts_that_run_one_after_another_move_it_too(tall_model: Any, recorded: Recorded) -> None:
    tall_model.set_model_unet_function_wrapper(
        lambda apply, arguments: apply(arguments["input"], arguments["timestep"], **arguments["c"])
    )
    sample(tall_model, steps=STEPS, cfg=4.0)
    sampling = recorded.of("sampling")
    assert len(sampling) == 2 * STEPS * BLOCKS
    require_moving([(event["share"], 1) for event in sampling])
    assert sampling[-1]["share"] == pytest.approx(1, abs=0.01)
    assert sampling[-1]["facts"]["one_by_one"]


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_sde", "uni_pc"])
def test_a_sampler_that_asks_twice_in_a_step_never_moves_it_back(
    sampler: str, tall_model: Any, recorded: Recorded
) -> None:
    sample(tall_model, steps=STEPS, sampler=sampler, scheduler="simple")
    sampling = recorded.of("sampling")
    shares = [event["share"] for event in sampling]
    assert shares == sorted(shares)
    assert {event["step"] for event in sampling} == set(range(1, STEPS + 1))


def test_encoding_tells_of_every_layer(tall: Path, recorded: Recorded, comfy: Any) -> None:
    from qwenimage_lowvram.engine.models.qwen25_vl.text_encoder import TextEncoder
    from qwenimage_lowvram.engine.models.qwen_image.prompts import PromptTokenizer
    from qwenimage_lowvram.nodes.adapters.clip import LowVRAMCLIP

    hardware = Hardware.detect(torch.device("cpu"))
    encoder = TextEncoder(open_checkpoint(tall / "text_encoder"), dtype=torch.float32, hardware=hardware)
    LowVRAMCLIP(encoder, PromptTokenizer(tall / "tokenizer"), None).encode_prompts(["a cat", " "])
    counted = [(event["done"], event["total"]) for event in recorded.of("encoding")]
    assert counted == [(0, 0), *((done, 28) for done in range(29))]
    assert [event for event in recorded.events if event["stage"] != "encoding"] == []
    require_moving(recorded.bars)
    assert recorded.bars[-1] == (28, 28)


def test_quantizing_tells_of_every_block(
    tall: Path, recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwenimage_lowvram.nodes.weight_cache import in_weight_format

    monkeypatch.setenv("QWEN_LOWVRAM_CACHE", str(tmp_path))
    hardware = Hardware.detect(torch.device("cpu"))
    in_weight_format(open_checkpoint(tall / "transformer"), "int8", hardware, None)
    told = recorded.of("quantizing")
    counted = [(event["done"], event["total"]) for event in told]
    assert counted == [(0, 0), *((done, BLOCKS) for done in range(BLOCKS + 1))]
    assert {(event["node"], event["prompt_id"]) for event in told} == {(NODE, "p")}
    require_moving(recorded.bars)


def test_decoding_tells_of_every_tile(vae: Any, recorded: Recorded) -> None:
    vae.decode_tiled(torch.zeros(2, 16, 1, 8, 30), tile_x=1, tile_y=1)
    counted = [(event["done"], event["total"]) for event in recorded.of("decoding")]
    total = counted[-1][1]
    assert total > 2
    assert counted == [(0, 0), *((done, total) for done in range(total + 1))]
    require_moving(recorded.bars)


def test_encoding_an_image_tells_of_every_tile(vae: Any, recorded: Recorded) -> None:
    vae.encode_tiled(torch.zeros(1, 256, 256, 3), tile_x=64, tile_y=64)
    counted = [event["done"] for event in recorded.of("encoding_image")]
    assert counted == list(range(len(counted)))
    assert len(counted) > 4
    require_moving(recorded.bars)


def test_no_more_than_four_events_a_second_and_the_first_of_each_stage(
    tall_model: Any, recorded: Recorded, clock: Clock
) -> None:
    clock.seconds = 0.01
    sample(tall_model, steps=STEPS, cfg=4.0)
    for stage in ("loading", "modulation", "sampling"):
        events = recorded.of(stage)
        assert 1 < len(events) < BLOCKS
        moments = [event["seconds"] for event in events]
        assert all(after - before > 0.24 for before, after in pairwise(moments))


def test_the_forecast_is_what_is_left_until_a_step_is_measured(tall_model: Any, recorded: Recorded) -> None:
    sample(tall_model, steps=STEPS, cfg=4.0)
    sampling = recorded.of("sampling")
    first, others = sampling[:BLOCKS], sampling[BLOCKS:]
    forecast = first[0]["facts"]["seconds_per_step"]
    assert all(event["seconds_per_step"] is None and event["seconds_left"] > 0 for event in first)
    assert first[0]["seconds_left"] < 10 * STEPS * forecast  # by the forecast, not by this clock
    assert all(event["seconds_per_step"] > 0 for event in others)
    last = others[-1]
    assert last["seconds_left"] < last["seconds_per_step"] / 10
    falling = [event["seconds_left"] for event in sampling[2 * BLOCKS :]]
    assert falling == sorted(falling, reverse=True)


def test_what_was_done_is_told_after_an_interruption(
    tall_model: Any, recorded: Recorded, server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    import comfy.model_management as management

    send = server.send_sync

    def interrupt(event: str, data: dict[str, Any], sid: str) -> None:
        send(event, data, sid)
        if data.get("step") == 3 and data.get("block") == 10:
            management.interrupt_current_processing()

    server.send_sync = interrupt
    with caplog.at_level(logging.INFO), pytest.raises(management.InterruptProcessingException):
        sample(tall_model, steps=20, cfg=4.0)
    end = recorded.events[-1]
    assert (end["stage"], end["step"], end["steps"]) == ("stopped", 2, 20)
    report = tall_model.model.last_report
    assert (report.done_steps, report.steps) == (2, 20)
    assert "MemoryReport: stopped after 2 of 20 steps, " in caplog.text
    assert "20 steps in" not in str(report)


def test_the_plan_comes_once_a_stage_and_its_numbers_always(tall_model: Any, recorded: Recorded) -> None:
    sample(tall_model, steps=STEPS, cfg=4.0)
    run = [event for event in recorded.events if event["stage"] != "preparing"]
    with_plan = [event["stage"] for event in run if "plan" in event]
    assert with_plan == ["loading", "modulation", "sampling", "done"]
    facts = run[-1]["facts"]
    plan = tall_model.model.last_report.plan
    assert all(event["facts"] == facts for event in run)
    assert (facts["resident"], facts["blocks"]) == (len(plan.resident), BLOCKS)
    assert facts["bound"] in ("compute", "bus", "disk", "decoding")
    assert facts["ram_limit_bytes"] is None


def test_ram_is_told_against_the_limit_that_was_set(tall_model: Any, recorded: Recorded) -> None:
    tall_model.model.ram_limit_bytes = 2**30
    sample(tall_model)
    end = recorded.events[-1]
    assert end["facts"]["ram_limit_bytes"] == 2**30
    assert 0 <= end["held_bytes"] < 2**30


@pytest.mark.parametrize("client", [None, "gone"])
def test_without_a_page_that_listens_nothing_is_sent_and_the_log_has_it(
    client: str | None, tall_model: Any, recorded: Recorded, server: Any, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    server.client_id, clock.seconds = client, 0.1
    with caplog.at_level(logging.INFO):
        sample(tall_model, steps=STEPS, cfg=4.0)
    assert recorded.events == []
    lines = [record.message for record in caplog.records]
    assert any(line.startswith("Loading what stays on the device: block 1/60") for line in lines)
    assert any(line.startswith("Reading weights once (not for the next seed): block 1/60") for line in lines)
    assert any(line.startswith("Sampling: step 2/3, ") and line.endswith(" left") for line in lines)
    assert sum(line.startswith("Sampled 3 steps in ") for line in lines) == 1
    assert len([line for line in lines if line.startswith("Sampling: ")]) < STEPS * BLOCKS / 4


@pytest.mark.parametrize(
    ("progress", "line"),
    [
        ({"stage": "preparing"}, "Preparing to sample"),
        ({"stage": "encoding", "done": 0, "total": 0, "seconds": 0.0}, "Encoding prompts"),
        ({"stage": "encoding", "done": 4, "total": 28, "seconds": 12.4}, "Encoding prompts: layer 5/28, 0:12"),
        ({"stage": "encoding", "done": 28, "total": 28, "seconds": 72.0}, "Encoding prompts: layer 28/28: 1:12"),
        ({"stage": "decoding", "done": 1, "total": 9, "seconds": 7384.0}, "Decoding: tile 2/9, 2:03:04"),
        (
            {"stage": "sampling", "step": 7, "steps": 20, "seconds": 72.0, "seconds_left": 130.0},
            "Sampling: step 7/20, 1:12, about 2:10 left",
        ),
        (
            {"stage": "stopped", "step": 6, "steps": 200, "seconds": 72.0},
            "Sampling was stopped after 6 of 200 steps, 1:12",
        ),
    ],
)
def test_a_line_of_the_log_says_what_an_event_says(progress: dict[str, Any], line: str) -> None:
    from qwenimage_lowvram.engine.runs.progress_lines import progress_line

    assert progress_line(progress) == line
