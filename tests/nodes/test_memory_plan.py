"""The Memory Plan node plans the real model for every card from headers alone, and says what does not fit."""

import asyncio
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import full_size
import full_size_21
import full_size_qwen3_vl
import numpy as np
import page_words
import pytest
import torch
from full_size_formats import in_format
from live_bytes import LiveBytes
from PIL import Image
from qwenimage_lowvram.engine.planning.forecast import TYPICAL

CARDS = ("4 GB", "6 GB", "8 GB", "10 GB", "12 GB", "16 GB", "24 GB")
FILES = {"transformer": "plan_bf16.safetensors", "text_encoder": "plan_te.safetensors", "vae": "plan_vae.safetensors"}
IMAGE = {"width": 1328, "height": 1328, "batch_size": 1, "steps": 20, "cfg": 4.0, "prompt_tokens": 60}
LIMITS = {"vram_limit_gb": 0.0, "ram_limit_gb": 24.0}


@pytest.fixture(autouse=True)
def files(comfy: Any) -> Iterator[None]:
    """The whole model among ComfyUI's own, as headers of files without data."""
    import folder_paths

    models = Path(folder_paths.models_dir)
    made = [
        full_size.write_header(checkpoint, models / folder / name)
        for folder, name, checkpoint in (
            ("diffusion_models", FILES["transformer"], full_size.transformer_checkpoint()),
            ("diffusion_models", "plan_fp8.safetensors", full_size.transformer_checkpoint(torch.float8_e4m3fn)),
            ("text_encoders", FILES["text_encoder"], full_size.text_encoder_checkpoint(torch.float8_e4m3fn)),
            ("vae", FILES["vae"], full_size.vae_checkpoint()),
        )
    ]
    yield
    for file in made:
        file.unlink()


def plan(**changed: Any) -> dict[str, Any]:
    from qwenimage_lowvram.nodes.memory_plan import QwenLowVRAMMemoryPlan

    inputs = {**FILES, "weight_format": "as stored", **IMAGE, **LIMITS, **changed}
    return QwenLowVRAMMemoryPlan().plan(**inputs)


def tables(text: str) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]]]:
    """The rows of the two tables by the size of the card: of a step, and of the peaks."""
    found = []
    for part in text.split("\n\n")[1:3]:
        head, *lines = (re.split(r" {2,}", f"-{line}" if line.startswith(" ") else line) for line in part.splitlines())
        found.append({cells[0].split(",")[0]: dict(zip(head[1:], cells[1:], strict=True)) for cells in lines})
    return found[0], found[1]


LARGEST_BLOCK_BYTES = 2 * 233_057_792  # a layer of the text encoder in bf16


def test_every_stage_stays_within_each_cards_limit() -> None:
    from qwenimage_lowvram.engine.planning.cards import CONTEXT_BYTES
    from qwenimage_lowvram.nodes.adapters.limits import headroom_bytes

    text = plan()["result"][0]
    assert "; seconds are forecasts: for named cards from their data sheets, otherwise at " in text.splitlines()[1]
    steps, peaks = tables(text)
    assert tuple(steps) == tuple(peaks) == CARDS
    for card, row in peaks.items():
        limit = float(row.pop("limit"))
        left = int(card.split()[0]) - (CONTEXT_BYTES + headroom_bytes(LARGEST_BLOCK_BYTES)) / 1024**3
        assert limit == pytest.approx(left, abs=0.01)
        assert list(row) == ["encode", "load", "modulation", "sampling", "decode"]
        for cell in row.values():
            vram, ram = map(float, cell.split("/"))
            assert 0 < vram <= limit + 0.005
            assert 0 < ram <= 24.1


def test_images_to_change_make_a_step_longer_and_leave_less_room_for_blocks() -> None:
    steps, three = (tables(plan(reference_pictures=count)["result"][0])[0]["8 GB"] for count in (0, 3))
    assert float(three["s per step"]) > 2 * float(steps["s per step"])
    assert int(three["stay"]) < int(steps["stay"])


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwenimage_lowvram.nodes import planned_models

    slow = replace(TYPICAL, disk_bytes=0.5e9)
    monkeypatch.setattr(planned_models, "remembered_speeds", lambda *of_machine: slow)


def test_a_larger_card_is_never_slower_and_keeps_more_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwenimage_lowvram.nodes import memory_plan

    alike = [replace(card, tflops=25.0, memory_gb=290, bus_gb=12) for card in memory_plan.CARDS]
    monkeypatch.setattr(memory_plan, "CARDS", alike)
    steps, _ = tables(plan()["result"][0])
    seconds = [float(steps[card]["s per step"]) for card in CARDS]
    stay = [int(steps[card]["stay"]) for card in CARDS]
    assert seconds == sorted(seconds, reverse=True)
    assert stay == sorted(stay)
    assert 0 < stay[0] < stay[-1]
    for row in steps.values():
        assert int(row["stay"]) + int(row["in RAM"]) + int(row["from file"]) == 60


def test_little_ram_means_a_step_that_waits_for_the_disk() -> None:
    row = tables(plan(cfg=1.0, ram_limit_gb=2.0)["result"][0])[0]["10 GB"]
    assert int(row["from file"]) > 35
    assert row["bound by"] == "the disk"
    assert tables(plan(cfg=1.0)["result"][0])[0]["10 GB"]["bound by"] != "the disk"


def test_a_named_card_has_its_own_speeds_and_this_machines_disk(slow_disk: None) -> None:
    """An RTX 3080 computes twice as fast as an RTX 4060, as long as neither waits for blocks."""
    small = {"width": 512, "height": 512, "weight_format": "nf4"}
    seconds = {card: float(row["s per step"]) for card, row in tables(plan(**small)["result"][0])[0].items()}
    assert 1.5 < seconds["8 GB"] / seconds["10 GB"] < 2.3
    assert seconds["24 GB"] < seconds["16 GB"]
    text = plan(cfg=1.0, ram_limit_gb=2.0)["result"][0]
    assert tables(text)[0]["10 GB"]["bound by"] == "the disk"
    assert "8 GB, RTX 4060 " in text


def test_this_machines_card_stands_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwenimage_lowvram.nodes import memory_plan

    monkeypatch.setattr(memory_plan, "only_card", lambda headroom: (9 * 2**30, 8 * 2**30))
    _, peaks = tables(plan()["result"][0])
    assert list(peaks) == [*CARDS, "this machine"]
    assert peaks["this machine"]["limit"] == "8.00"


def test_formats_are_planned_without_being_made(comfy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_LOWVRAM_CACHE", str(tmp_path / "cache"))
    stored = tables(plan()["result"][0])[0]["8 GB"]
    small = tables(plan(weight_format="nf4")["result"][0])[0]["8 GB"]
    assert (stored["format"], small["format"]) == ("as stored", "nf4")
    assert int(small["stay"]) > 3 * int(stored["stay"])
    assert not (tmp_path / "cache").exists()
    fp8 = tables(plan(transformer="plan_fp8.safetensors")["result"][0])[0]["8 GB"]
    assert int(small["stay"]) > int(fp8["stay"]) > int(stored["stay"])


def formats_of(text: str) -> dict[str, str]:
    return {card: row["format"] for card, row in tables(text)[0].items()}


def test_auto_is_as_stored_and_says_where_fastest_would_be_much_faster(slow_disk: None) -> None:
    text, fastest = (plan(weight_format=name, ram_limit_gb=2.0)["result"][0] for name in ("auto", "fastest"))
    assert set(formats_of(text).values()) == {"as stored"}
    chosen = formats_of(fastest)
    assert set(chosen.values()) <= {"as stored", "int8", "nf4"}
    assert "nf4" in chosen.values() or "int8" in chosen.values()
    advised = dict(re.findall(r"On (\d+ GB), [\w ]+: (\w+) weights would take [\d.]+ s per step", text))
    assert advised
    assert advised.items() <= chosen.items()
    assert "set weight_format to fastest" in text
    assert "On " not in fastest


def test_the_loaders_line_says_where_fastest_would_be_much_faster(slow_disk: None) -> None:
    from qwenimage_lowvram.nodes.live_plan import lines_of

    latent = {"width": 1328, "height": 1328, "batch_size": 1}
    sample = {"model": ["1", 0], "latent_image": ["2", 0], "steps": 20, "cfg": 4.0}
    for chosen, said in (("auto", True), ("fastest", False)):
        loader = {**FILES, "vram_limit_gb": 7.0, "ram_limit_gb": 2.0, "weight_format": chosen}
        nodes = {"1": ("QwenLowVRAMLoader", loader), "2": ("EmptySD3LatentImage", latent)}
        nodes["3"] = ("QwenLowVRAMSample", sample)
        (line,) = lines_of({node: {"class_type": kind, "inputs": inputs} for node, (kind, inputs) in nodes.items()})
        assert line.fits
        assert [doubt["code"] for doubt in line.values["doubts"]] == ["told.faster_format"] * said
        assert ("weights would take" in line.text) is said


@pytest.mark.parametrize("weight_format", ["as stored", "nf4"])
def test_advice_is_given_where_nothing_was_chosen_yet(weight_format: str, slow_disk: None) -> None:
    text = plan(weight_format=weight_format, ram_limit_gb=2.0)["result"][0]
    assert ("set weight_format to fastest" in text) == (weight_format != "nf4")


def test_what_does_not_fit_is_said_and_the_others_are_planned() -> None:
    text = plan(width=4096, height=4096, batch_size=4)["result"][0]
    steps, _ = tables(text)
    refused = [line for line in text.splitlines() if re.match(r"\d+ GB, [\w ]+: ", line)]
    assert refused
    assert refused[0].startswith("4 GB, RTX 3050 laptop: Sampling needs ")
    assert "Use " in text
    assert "24 GB" in steps
    assert not {line.split(",")[0] for line in refused} & set(steps)


def test_ones_own_limit_stands_beside_the_cards() -> None:
    _, peaks = tables(plan(vram_limit_gb=3.0)["result"][0])
    assert list(peaks) == [*CARDS, "limit 3 GB"]
    assert peaks["limit 3 GB"]["limit"] == "3.00"


@pytest.fixture
def two_cards(comfy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 10 and of 8 GiB, as far as plans are concerned."""
    import comfy.model_management as management
    from qwenimage_lowvram.nodes import devices, memory_plan, planned_models

    monkeypatch.setattr(memory_plan, "CARDS", [card for card in memory_plan.CARDS if card.gb == 8])
    monkeypatch.setattr(devices, "_accelerators", lambda: ["cuda:0", "cuda:1"])
    monkeypatch.setattr(devices, "hardware_of", lambda device: planned_models.CARD)
    monkeypatch.setattr(management, "get_torch_device", lambda: torch.device("cuda:0"))
    monkeypatch.setattr(management, "get_total_memory", lambda device: (10, 8)[device.index] * 2**30)


def several_of(text: str) -> dict[str, dict[str, str]]:
    """The rows of the table of this machine's cards."""
    (table,) = (part for part in text.split("\n\n") if part.startswith("this machine"))
    head, *lines = (re.split(r" {2,}", line) for line in table.splitlines())
    return {cells[0]: dict(zip(head[1:], cells[1:], strict=True)) for cells in lines}


def test_several_cards_are_planned_beside_one(two_cards: None) -> None:
    answer = plan(transformer="plan_fp8.safetensors", vram_limit_gb=8.0)
    text, chart = answer["result"]
    rows = several_of(text)
    assert list(rows) == ["one card", "all 2 cards"]
    one, both = rows.values()
    assert float(both["s per step"]) == pytest.approx(float(one["s per step"]) / 2, rel=0.05)
    assert (one["divided"], both["divided"]) == ("-", "prompts/images")
    assert one["cuda:1 GiB/limit"] == "-"
    peaks = {device: list(map(float, both[f"{device} GiB/limit"].split("/"))) for device in ("cuda:0", "cuda:1")}
    assert all(1 < peak <= limit + 0.005 for peak, limit in peaks.values())
    assert peaks["cuda:0"][1] == 8  # the limit that was set
    assert 6.8 < peaks["cuda:1"][1] < 7.2  # what the card has
    assert chart.shape[1] == 112 + 2 * 330 + 24  # four panels
    if page_words.HAS_NODE:
        told = page_words.in_chinese(answer["ui"]["parts"])
        assert page_words.english_words(told) <= {"cuda", "plan_fp8", "safetensors"}
        assert "全部 2 张显卡" in told
        assert "cuda:1 GiB/上限" in told


def test_no_weight_is_read_and_no_tensor_made_but_the_image() -> None:
    counters = Path("/proc/self/io")
    if not counters.exists():
        pytest.skip("this system does not say how much a process reads")

    def read_bytes() -> int:
        return int(re.findall(r"rchar: (\d+)", counters.read_text())[0])

    plan()  # imports what is imported late
    before = read_bytes()
    with LiveBytes("cpu") as live:
        result = plan()["result"]
    # each file's header is read twice at most: by the folder's check of the choice, and by the node
    assert read_bytes() - before < 5_000_000
    image_bytes = result[1].nbytes
    assert image_bytes < 20_000_000
    assert live.peak <= 2 * image_bytes  # fp32, divided by 255


def test_the_image_is_on_the_node_as_in_the_output() -> None:
    import folder_paths

    answer = plan(vram_limit_gb=2.0)
    text, image = answer["result"]
    assert answer["ui"]["text"] == [text]
    (shown,) = answer["ui"]["images"]
    assert shown["type"] == "temp"
    saved = Image.open(Path(folder_paths.get_temp_directory()) / shown["subfolder"] / shown["filename"])
    assert image.shape == (1, saved.height, saved.width, 3)
    assert saved.width == 1200
    assert np.array_equal(np.asarray(saved.convert("RGB")), (255 * image[0]).round().byte().numpy())
    assert 0 <= image.min() < 0.2
    assert image.max() == 1


@pytest.mark.skipif(not page_words.HAS_NODE, reason="the page's scripts are run by node")
def test_the_page_tells_it_in_chinese() -> None:
    answer = plan(vram_limit_gb=2.0, attention="sage", compile=True, weight_format="fastest", step_cache="first_block")
    told = page_words.in_chinese(answer["ui"]["parts"])
    assert len(told.splitlines()) == len(answer["ui"]["text"][0].splitlines())
    assert page_words.english_words(told) <= {"sage", "fastest"}
    title, subtitle, *_ = told.splitlines()
    assert title == "内存计划：1328x1328，批次 1，有引导，20 步"
    assert subtitle.startswith("plan_bf16.safetensors，提示词 60 个词元；秒数为预测值，标明型号的显卡按其规格，其余")
    assert "每步秒数" in told
    assert "上限 2 GB" in told


def test_a_file_that_is_missing_or_misplaced_is_named_before_anything_is_planned() -> None:
    from qwenimage_lowvram.engine.errors import InvalidRequest, MissingFile
    from qwenimage_lowvram.nodes.memory_plan import QwenLowVRAMMemoryPlan

    def check(transformer: str | None) -> Any:
        return asyncio.run(QwenLowVRAMMemoryPlan.VALIDATE_INPUTS(transformer))

    assert check(FILES["transformer"]) is True
    assert check(None) is True
    assert "gone.safetensors" in check("gone.safetensors")
    with pytest.raises(MissingFile, match=r"^vae: There is no 'gone.safetensors'"):
        plan(vae="gone.safetensors")
    assert "gone.safetensors" in QwenLowVRAMMemoryPlan.IS_CHANGED(**FILES | {"vae": "gone.safetensors"})
    with pytest.raises(InvalidRequest, match=r"^weight_format: .*quantized already"):
        plan(transformer="plan_fp8.safetensors", weight_format="nf4")


def test_the_plan_changes_with_its_files_and_not_from_run_to_run() -> None:
    from qwenimage_lowvram.nodes.memory_plan import QwenLowVRAMMemoryPlan

    def fingerprint(**changed: str) -> str:
        return QwenLowVRAMMemoryPlan.IS_CHANGED(**FILES | changed, weight_format="auto").rpartition("/")[0]

    assert fingerprint() == fingerprint()
    assert fingerprint() != fingerprint(transformer="plan_fp8.safetensors")


def test_layers_are_counted_and_asked_for_of_the_right_model() -> None:
    import folder_paths
    from qwenimage_lowvram.engine.errors import QwenLowVRAMError

    models = Path(folder_paths.models_dir)
    fp8 = torch.float8_e4m3fn
    made = [
        full_size.write_header(
            full_size.transformer_checkpoint(fp8, layered=True),
            models / "diffusion_models" / "plan_layered.safetensors",
        ),
        full_size.write_header(full_size.vae_checkpoint(channels=4), models / "vae" / "plan_layered_vae.safetensors"),
    ]
    files = FILES | {"transformer": made[0].name, "vae": made[1].name}
    size = {"width": 640, "height": 640, "steps": 50}
    try:
        four, two = (plan(**files, **size, layers=n)["result"][0] for n in (4, 2))
        assert four.startswith("Memory plan: 640x640, 4 layers, batch 1, guided, 50 steps")
        seconds = [float(tables(text)[0]["24 GB"]["s per step"]) for text in (two, four)]
        assert set(tables(four)[0]) == set(CARDS)
        assert 1.4 < seconds[1] / seconds[0] < 2.0  # 6 images' tokens instead of 4, whose attention is quadratic
        for wrong, words in (
            (files, "^layers: .*makes layers, but 0 layers are asked for"),
            ({"layers": 1}, "^layers: .*(.|\n)*set layers to 0"),
            (files | {"vae": FILES["vae"], "layers": 4}, "^vae: .*Use qwen_image_layered_vae"),
        ):
            with pytest.raises(QwenLowVRAMError, match=words):
                plan(**wrong)
    finally:
        for file in made:
            file.unlink()


@pytest.fixture(scope="module")
def files_21(comfy: Any) -> Iterator[dict[str, str]]:
    """Qwen-Image-2.1 at its real size, headers alone."""
    import folder_paths

    models = Path(folder_paths.models_dir)
    made = {
        "transformer": ("diffusion_models", in_format(full_size_21.transformer_21_checkpoint(), "int8_convrot")),
        "text_encoder": ("text_encoders", full_size_qwen3_vl.text_encoder_checkpoint(torch.float8_e4m3fn)),
        "vae": ("vae", full_size_21.vae_21_checkpoint()),
    }
    files = {
        part: full_size.write_header(checkpoint, models / folder / f"plan_21_{part}.safetensors")
        for part, (folder, checkpoint) in made.items()
    }
    yield {part: file.name for part, file in files.items()}
    for file in files.values():
        file.unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "height", "images"), [(1024, 1024, 0), (2752, 1536, 0), (2048, 2048, 3), (2752, 1536, 10)]
)
def test_2_1_is_planned_at_every_size_with_what_it_keeps(
    files_21: dict[str, str], width: int, height: int, images: int
) -> None:
    size = {"width": width, "height": height, "steps": 40, "cfg": 1.0, "reference_pictures": images}
    steps, peaks = tables(plan(**files_21, **size)["result"][0])
    assert tuple(steps) == tuple(peaks) == CARDS
    tokens = 60 + 8 + images * (4096 + 6)
    for card, row in steps.items():
        assert int(row["stay"]) + int(row["in RAM"]) + int(row["from file"]) == 32
        on_card, in_ram, anew = (int(row[name]) for name in ("of it on card", "of it in RAM", "made anew"))
        assert on_card + in_ram + anew == 32
        kept_gib = (on_card + in_ram) * 2 * tokens * 4096 * 2 / 1024**3
        assert row["prompt kept"] == f"{kept_gib:.2f} GiB"
        assert float(row["s per step"]) > 0
        vram, ram = map(float, peaks[card]["sampling"].split("/"))
        assert 0 < vram <= float(peaks[card]["limit"]) + 0.005
        assert in_ram * kept_gib / max(1, on_card + in_ram) <= ram <= 24.1


def test_each_model_is_planned_for_as_many_images_as_it_is_shown(files_21: dict[str, str]) -> None:
    from qwenimage_lowvram.engine.errors import InvalidRequest

    seconds = [
        float(tables(plan(**files_21, cfg=1.0, reference_pictures=count)["result"][0])[0]["8 GB"]["s per step"])
        for count in (0, 12)
    ]
    assert seconds[1] > 2 * seconds[0]
    with pytest.raises(InvalidRequest, match=r"^reference_pictures: .*can be shown at most 3 images(.|\n)*set "):
        plan(reference_pictures=4)
    with pytest.raises(InvalidRequest, match="reference_pictures"):
        plan(**files_21, reference_pictures=13)
