"""What notes, help and docs promise of memory and time is what the planner says at the real size."""

import json

import pytest
import stated_plans
import torch
from qwenimage_lowvram.engine.models.families import QWEN_IMAGE
from qwenimage_lowvram.engine.planning.memory_plan import MemoryPlan
from qwenimage_lowvram.engine.planning.request import GIB, SamplingRequest
from qwenimage_lowvram.engine.texts import size_text
from simulated_cards import models

GUIDED = {card_gb: f"{number:02} - Low VRAM {card_gb} GB - Qwen-Image" for number, card_gb in ((1, 4), (3, 8), (6, 16))}
EDIT_21 = "24 - Low VRAM 4 GB - Edit an image, Qwen-Image-2.1-Turbo"
DOCS = stated_plans.ROOT / "js" / "docs"


def plan(name: str, **loader: object) -> MemoryPlan:
    graph = json.loads((stated_plans.ROOT / "workflows" / f"{name}.json").read_text())
    return stated_plans.plan_of(graph, **loader)


def test_the_docs_show_the_plan_for_8_gb() -> None:
    page = (stated_plans.ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    assert f"    {plan(GUIDED[8])!r}\n" in page


def test_the_docs_say_what_a_process_of_several_takes() -> None:
    page = (stated_plans.ROOT / "docs" / "developers.md").read_text(encoding="utf-8")
    footprint = models("bf16", torch.bfloat16, QWEN_IMAGE).transformer

    def planned(ranks: int, chunk: int | None = None) -> str:
        request = SamplingRequest(1328, 1328, 2, 512, ranks=ranks)
        return f"{footprint.activation_bytes(request, chunk) / GIB:.2f}"

    words = f"{planned(2)} GiB in each of two processes, and with {planned(1)} in one ({planned(1, 512)} with MLPs"
    assert words in " ".join(page.split())


@pytest.mark.parametrize("card_gb", GUIDED)
@pytest.mark.parametrize("page", ["QwenLowVRAMLoader.md", "QwenLowVRAMLoader/zh.md"])
def test_the_loaders_help_says_what_fp8_files_take(page: str, card_gb: int) -> None:
    row = next(line for line in (DOCS / page).read_text().splitlines() if line.startswith(f"| {card_gb} GB |"))
    made = plan(GUIDED[card_gb], transformer="fp8", weight_format="auto")
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == f"{made.limit_bytes / GIB:.1f}"
    assert cells[2] == f"{made.request.width}x{made.request.height}"
    assert str(len(made.resident)) in cells[3]
    if made.streamed:
        assert cells[4] == size_text(made.streamed_bytes_per_step)
    else:
        assert cells[4] in ("nothing", "无")
    assert cells[5] == size_text(made.ram_peak_bytes)
    assert cells[6] == size_text(made.peak_bytes)


@pytest.mark.parametrize(
    ("transformer", "chosen", "block_bytes"),
    [
        ("qwen_image_2.1_bf16.safetensors", "auto", 436_208_128),
        ("qwen_image_2.1_bf16.safetensors", "int8", 218_284_544),
        ("qwen_image_2.1_turbo_int8_convrot.safetensors", "auto", 218_284_544),
    ],
)
def test_a_file_of_2_1_is_planned_at_its_own_size(transformer: str, chosen: str, block_bytes: int) -> None:
    made = plan(EDIT_21, transformer=transformer, weight_format=chosen)
    assert made.blocks == 32
    assert made.streamed_bytes_per_step == made.streamed * block_bytes
    assert (made.request.width, made.request.height) == (1056, 1056)  # 66 tokens a side
    # keys and values of the prompt and of a square reference, of the one prompt that is computed without guidance
    assert made.kept.block_bytes == 2 * (66 * 66 + 512 + 6) * 4096 * 2
