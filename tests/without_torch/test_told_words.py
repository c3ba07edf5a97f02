"""What nodes tell is told by the page in Chinese, tables too, and nothing of it is left in English."""

import ast
import json
import re
from dataclasses import replace

import error_texts
import page_words
import pytest
from page_words import english_words, in_chinese
from qwenimage_lowvram.engine.caches.requantized_files import State
from qwenimage_lowvram.engine.compute.step_schedules import FIRST_BLOCK, STEP_SCHEDULES
from qwenimage_lowvram.engine.errors import DoesNotFit
from qwenimage_lowvram.engine.planning.cards import CARDS_GB
from qwenimage_lowvram.engine.planning.kept import KeptTiers
from qwenimage_lowvram.engine.planning.memory import plan_memory
from qwenimage_lowvram.engine.planning.memory_plan import BranchDevice
from qwenimage_lowvram.engine.planning.request import GIB, Controls, Limits, SamplingRequest
from qwenimage_lowvram.engine.planning.stages import Stage
from qwenimage_lowvram.engine.reports.charts import Card
from qwenimage_lowvram.engine.reports.image_report import COLUMNS, ImageReport, StageReport
from qwenimage_lowvram.engine.reports.memory_report import MemoryReport
from qwenimage_lowvram.engine.reports.plan_table import plan_table, several_cards_table
from qwenimage_lowvram.engine.told import Table, Told, json_of, text_of

from .test_plan import REAL

GIVEN = json.loads((page_words.SHARED / "error_words_zh.json").read_text(encoding="utf-8"))
PLAN = plan_memory(REAL, SamplingRequest(1328, 1328, 2, 512), Limits(2 * GIB, 12 * GIB))
REPORT = MemoryReport(
    plan=PLAN,
    device="cuda:0",
    weight_format="bf16",
    steps=20,
    passes=20,
    seconds=60.0,
    pass_seconds=50.0,
    fetched_blocks=1200,
    fetched_bytes=1200 * REAL.stored_bytes,
    modulation_bytes=60 * REAL.modulation_slot_bytes,
    copied_bytes=1180 * REAL.stored_bytes,
    pinned_bytes=0,
    waited_disk_seconds=1.25,
    waited_bus_seconds=0.75,
    peak_vram_bytes=None,
    peak_ram_bytes=3 * GIB,
)
node_runs_scripts = pytest.mark.skipif(not page_words.HAS_NODE, reason="the page's scripts are run by node")


def everything() -> MemoryReport:
    """A report of a run of which there is all to say that can be said."""
    schedule = STEP_SCHEDULES["planned_20"]
    request = replace(PLAN.request, controls=Controls(GIB, GIB), step_cache=schedule, timesteps=40)
    return replace(
        REPORT,
        plan=replace(PLAN, request=request, kept=KeptTiers(60, 1, 20, 1 << 20), beside=(BranchDevice("cuda:1", PLAN),)),
        further_peaks_bytes=(GIB,),
        one_by_one="the wrapper EasyCache (diffusion_model) sees each call",
        out_of_memory=2,
        attention_notes="sage",
        compiled="exact",
        compiled_times=2,
        compiling_seconds=31.2,
        compiled_error=0.003,
        not_compiled="CUDA",
        not_measured=schedule.not_measured("Qwen-Image", request),
        done_steps=6,
    )


def stage(which: Stage, **changed: int) -> StageReport:
    return StageReport(which, None, 0.0, 1.5, GIB, changed.get("beside", 0), GIB, 0, attempts=changed.get("tries", 1))


@node_runs_scripts
def test_a_report_is_told_in_chinese() -> None:
    stages = (stage(Stage.ENCODE, tries=2), stage(Stage.SAMPLING, beside=GIB))
    parts = ImageReport(stages, everything()).parts()
    told = in_chinese(parts)
    assert english_words(told) <= {"sage", "cuda"}
    assert "内存不足 2 次" in told
    assert "完成 20 步中的 6 步后停止" in told
    assert len(told.splitlines()) == len(text_of(parts).splitlines())


@node_runs_scripts
def test_a_card_that_is_too_small_is_told_with_the_reason() -> None:
    with pytest.raises(DoesNotFit) as caught:
        plan_memory(REAL, PLAN.request, Limits(GIB // 2))
    told = in_chinese(plan_table([Card("limit 0.5 GB", GIB, GIB, None, "as stored", caught.value)]))
    assert told.splitlines()[0].split()[:2] == ["格式", "每步秒数"]
    assert "上限 0.5 GB：采样至少需要 " in told


@node_runs_scripts
def test_columns_stand_below_each_other_whatever_the_width_of_their_letters() -> None:
    rows = (("stage", "forecast", "bf16"), ("sampling", "1.5 s, then 1.0 s", "x"), ("load", "-", "y"))
    lines = in_chinese([Table(rows)]).splitlines()

    def place(line: str, letter: str) -> tuple[int, int]:
        before = line[: line.index(letter)]
        wide = sum(ord(each) > 0x2E80 or each == "\u3000" for each in before)
        return wide, len(before) - wide

    assert lines[0].startswith("阶段")
    assert place(lines[0], "bf16") == place(lines[1], "x") == place(lines[2], "y")


@pytest.mark.parametrize("cache", [*STEP_SCHEDULES.values(), FIRST_BLOCK], ids=lambda cache: cache.name)
@node_runs_scripts
def test_left_out_steps_are_told_in_chinese(cache: object) -> None:
    told = in_chinese([Told("not exact: {steps}.{advice}", code="memory_plan.step_cache", steps=str(cache), advice="")])
    assert english_words(told) == set()


@node_runs_scripts
def test_what_the_loader_tells_beside_a_plan_is_told_in_chinese() -> None:
    advice = (
        "It is not certain which Qwen-Image model 'a.gguf' is: it is used as Qwen-Image-Edit-2509. "
        "If it is Qwen-Image-Edit-2511, set variant to that in 'Load Qwen-Image (low VRAM)' (advanced inputs). "
        "The file asks for the attention kernel 'sage', which quantizes and would change the image: PyTorch's "
        "is used. To follow the file, choose it in 'Load Qwen-Image (low VRAM)' (attention). "
        "Linear layers compute exactly, on decoded weights: weights in Q4_K cannot be multiplied as stored."
    )
    told = in_chinese([Told("On {card}: {advice}", code="memory_plan.advice", card="8 GB", advice=advice)])
    assert english_words(told) == {"sage"}


def test_every_cell_that_is_a_word_has_a_chinese_one() -> None:
    tables = (plan_table([])[0], several_cards_table([], [])[0])
    titles = [title for table in tables if isinstance(table, Table) for title in table.rows[0]]
    stages = [stage.value for stage in Stage]
    assert {cell for cell in (*titles, *COLUMNS, *stages) if cell} <= GIVEN["cells"].keys()


def test_every_state_of_a_kept_file_has_a_chinese_word() -> None:
    assert {state.value for state in State} <= GIVEN["words"].keys()


def test_chinese_cells_and_choices_are_those_of_the_source() -> None:
    script = (page_words.SHARED / "choice_words.js").read_text(encoding="utf-8")
    choices = set(re.findall(r'^  "(.+?)": "', script, re.MULTILINE))
    assert choices >= {"auto", "as set", "planned_20"}
    files = [file for folder in ("engine", "nodes") for file in (error_texts.PACK / folder).rglob("*.py")]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    said = {node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert sorted((GIVEN["cells"].keys() | choices) - {value for value in said if isinstance(value, str)}) == []


@pytest.mark.parametrize("page", ["QwenLowVRAMMemoryPlan.md", "QwenLowVRAMMemoryPlan/zh.md"])
def test_help_names_the_cards_that_are_planned_for(page: str) -> None:
    text = (error_texts.PACK / "js" / "docs" / page).read_text(encoding="utf-8")
    (named,) = re.findall(r"(?:\d+(?:, |、))+\d+ (?:and|和) \d+(?= GB)", text)
    assert [int(size) for size in re.findall(r"\d+", named)] == list(CARDS_GB)


def test_chinese_help_quotes_the_chinese_words_of_the_page() -> None:
    english = json.loads(error_texts.LIST.read_text(encoding="utf-8")).values()
    patterns = [pattern for entries in GIVEN["patterns"].values() for pattern, _ in entries]
    names = {name for name in GIVEN["cells"] if " " in name} - {"as stored"} | {"not exact"}  # a choice
    names |= {name for name in GIVEN["words"] if name.count(" ") > 1}
    for page in (error_texts.PACK / "README.zh.md", *(error_texts.PACK / "js" / "docs").glob("*/zh.md")):
        text = page.read_text(encoding="utf-8")
        runs = re.findall(r"(?:[a-z]+,? ){3,}[a-z]+", text)
        assert [run for run in runs if any(run in each for each in (*english, *patterns))] == [], page
        assert [name for name in names if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)] == [], page


def test_parts_are_told_in_english_as_ever() -> None:
    parts = [
        "a",
        Told("{x_bytes} of {y}", code="test.of", x_bytes=GIB, y="b\ud800"),
        Table((("c", "dd"), ("eee", "f"))),
    ]
    assert text_of(parts) == "a\n1.00 GiB of b\\ud800\nc    dd\neee  f"
    assert json_of(parts)[1:] == [
        {"code": "test.of", "values": {"x_bytes": GIB, "y": "b\\ud800"}, "text": "1.00 GiB of b\\ud800"},
        {"rows": [["c", "dd"], ["eee", "f"]]},
    ]
