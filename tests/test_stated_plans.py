"""What notes, help and docs promise of memory and time is what the planner says at the real size."""

import json
from pathlib import Path

import pytest
import stated_plans
from qwenimage_lowvram.engine.planning.memory_plan import MemoryPlan
from qwenimage_lowvram.engine.planning.request import GIB
from qwenimage_lowvram.engine.texts import size_text

GUIDED = {4: "01 - Qwen-Image on 4 GB", 8: "02 - Qwen-Image on 8 GB", 16: "03 - Qwen-Image on 16 GB"}
DOCS = stated_plans.ROOT / "js" / "docs"


def plan(name: str, **loader: object) -> MemoryPlan:
    graph = json.loads((stated_plans.ROOT / "workflows" / f"{name}.json").read_text())
    return stated_plans.plan_of(graph, **loader)


@pytest.mark.parametrize("file", stated_plans.WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflows_note_says_what_its_settings_plan(file: Path) -> None:
    graph = json.loads(file.read_text())
    note = stated_plans.note_of(graph)["widgets_values"][0]
    expected = stated_plans.HEADING + "\n".join(stated_plans.lines(stated_plans.plan_of(graph)))
    assert expected in note


def test_the_docs_show_the_plan_for_8_gb() -> None:
    page = (stated_plans.ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    assert f"    {plan(GUIDED[8])!r}\n" in page


@pytest.mark.parametrize("card_gb", GUIDED)
@pytest.mark.parametrize("page", ["QwenLowVRAMLoader.md", "QwenLowVRAMLoader/zh.md"])
def test_the_loaders_help_says_what_fp8_files_take(page: str, card_gb: int) -> None:
    row = next(line for line in (DOCS / page).read_text().splitlines() if line.startswith(f"| {card_gb} GB |"))
    made = plan(GUIDED[card_gb], transformer="fp8", weight_format="auto")
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert [cells[1], cells[2]] == [f"{made.limit_bytes / GIB:.1f}", f"{(made.limits.ram_bytes or 0) / GIB:g}"]
    assert cells[3] == f"{made.request.width}x{made.request.height}"
    assert str(len(made.resident)) in cells[4]
    assert cells[5] == str(len(made.held))
    if made.from_file:
        assert cells[6] == f"{made.from_file / made.streamed * made.streamed_bytes_per_step / GIB:.1f} GiB"
    else:
        assert cells[6] in ("nothing", "无")
    assert cells[7] == size_text(made.peak_bytes)


@pytest.mark.parametrize(
    ("transformer", "chosen", "block_bytes"),
    [
        ("qwen_image_2.1_bf16.safetensors", "auto", 436_208_128),
        ("qwen_image_2.1_bf16.safetensors", "int8", 218_284_544),
        ("qwen_image_2.1_turbo_int8_convrot.safetensors", "auto", 218_284_544),
    ],
)
def test_a_file_of_2_1_is_planned_at_its_own_size(transformer: str, chosen: str, block_bytes: int) -> None:
    made = plan("07 - Edit an image on 8 GB", transformer=transformer, weight_format=chosen)
    assert made.blocks == 32
    assert made.streamed_bytes_per_step == made.streamed * block_bytes
    assert (made.request.width, made.request.height) == (1056, 1056)  # 66 tokens a side
    # keys and values of the prompt and of a square reference, of both prompts as if each had its own text
    assert made.kept.block_bytes == 2 * (66 * 66 + 2 * (512 + 6)) * 4096 * 2
    assert f"- Computed once: {made.kept}." in stated_plans.lines(made)
