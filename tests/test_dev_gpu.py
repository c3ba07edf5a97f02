"""`python dev.py gpu` tells what it finds, by name what it does not, and ends in time. On the CPU, small."""

import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from devtools.cache import REPOSITORY
from kitchen_w4a8 import has_w4a8
from on_gpu import worker
from on_gpu.cases import (
    COMFYUI,
    COMPILED,
    FIRST_BLOCK,
    GIB,
    GROUP_OFFLOAD,
    HALF,
    OURS,
    PLANNED,
    REAL,
    RESIDENT,
    SMALL,
    STORED,
    STORED_ATTENTION,
    STORED_LORA,
    W4A8,
    Case,
    Sizes,
    cases,
)
from on_gpu.deadline import Deadline
from on_gpu.own_tests import results
from on_gpu.parts import Setting, run_all
from on_gpu.precision import FORMATS, on_card
from on_gpu.report import Report
from on_gpu.wheels import unpack
from on_gpu.worker import CutOff, JobFailed, Worker


def run_command(*options: str, environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, REPOSITORY / "dev.py", "gpu", *options]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment)


@pytest.fixture
def environment(comfyui_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    import os

    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "COMFYUI_PATH": str(comfyui_path), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_stand_in_runs_on_the_cpu(tmp_path: Path, environment: dict[str, str]) -> None:
    """Every way and format, so that nothing but a card is new where there is one."""
    file = tmp_path / "gpu.json"
    done = run_command("--here", "--cpu", "--small", "--seconds", "3000", "--json", str(file), environment=environment)
    assert done.returncode == 0, done.stderr
    assert "No CUDA device: run on the CPU as far as it goes." in done.stdout
    told = json.loads(file.read_text(encoding="utf-8"))
    assert told.keys() >= {"version", "command", "date", "machine", "versions", "absent", "parts", "seconds", "log"}
    assert told["device"] == "cpu"
    assert told["versions"].keys() >= {"python", "torch", "diffusers", "comfyui"}
    *asked_of_cards, steps = told["parts"]
    for part in asked_of_cards:
        assert [(row["status"], row["why"]) for row in part["rows"]] == [("skipped", "no CUDA device")]
    rows = {(row["who"], row["stored"], row["how"]): row for row in steps["rows"]}
    assert rows.keys() == {(case.way, case.stored, case.how) for case in cases(SMALL)}
    not_here = {(OURS, stored, STORED) for stored in ("nvfp4", "mxfp8")}  # whose products a CPU lacks
    not_here.add((OURS, "int8_convrot", STORED_ATTENTION))
    if not has_w4a8():
        not_here |= {(OURS, W4A8, how) for how in ("", STORED)}
    assert {key for key, row in rows.items() if row["status"] != "measured"} == not_here
    for (way, stored, how), row in rows.items():
        if (way, stored, how) in not_here:
            assert row["status"] == "skipped"
            assert stored != W4A8 or row["why"] == "needs comfy-kitchen 0.2.27 or newer, which has asym_w4a8_int8"
            continue
        if how:
            require_faster_as_plain(how, row)
            continue
        assert row["seconds"] > 0
        if way == OURS:
            assert row["equal"], f"{stored}: {row['difference']}"
            assert row["forecast_seconds"] > 0
            assert row["plan"].startswith("Memory plan for ")
        elif way == GROUP_OFFLOAD:
            assert row["equal"]
            assert row["blocks_run"] == SMALL.peer_blocks
        elif way == COMFYUI:
            assert row["difference"] < 0.1  # it rounds at other places, and guidance enlarges that
            assert row["dynamic_vram"] is False
    table = done.stdout.partition("who ")[2]
    assert all(str(Case(**{name: row[name] for name in Case.__annotations__})) in table for row in steps["rows"])


def require_faster_as_plain(how: str, row: dict[str, Any]) -> None:
    """Within what quantizing, fp16 and predicting cost on weights of chance."""
    assert row["seconds"] > 0
    assert row["difference"] < 0.25, (how, row["stored"], row["difference"])
    assert how in row["case"]
    if how in (STORED, STORED_LORA):
        assert " by comfy-kitchen eager (not exact)" in row["plan"]
        assert not row["equal"]
    if how == HALF:
        assert "products in fp16" in row["plan"]
    if how == COMPILED:
        assert not row["why"]
        assert row["compiled_times"] > 0
    if how in (PLANNED, FIRST_BLOCK):
        assert row["computed_steps"] + row["predicted_steps"] == 8
        assert row["predicted_steps"] == 4 or how == FIRST_BLOCK  # whose rule finds too much change in these weights


@pytest.mark.slow
def test_without_a_cuda_device_it_says_so(tmp_path: Path, environment: dict[str, str]) -> None:
    file = tmp_path / "gpu.json"
    done = run_command("--json", str(file), environment=environment)
    assert done.returncode == 2
    assert "There is no CUDA device" in done.stderr
    assert "--cpu" in done.stderr
    assert not file.exists()


def test_a_folder_of_wheels_that_is_none_is_named(tmp_path: Path, environment: dict[str, str]) -> None:
    done = run_command("--cpu", "--wheels", str(tmp_path / "none"), environment=environment)
    assert done.returncode == 1
    assert f"--wheels is {tmp_path / 'none'}, which is not a folder." in done.stderr


def told_by_parts(tmp_path: Path, seconds: float, sizes: Sizes = REAL, **changes: Any) -> list[dict[str, Any]]:
    plain = Setting(tmp_path, tmp_path, {}, None, sizes, "cpu", False, ())
    report = Report(tmp_path / "gpu.json")
    run_all(replace(plain, **changes), report, seconds)
    on_disk = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert sum(len(part["rows"]) for part in on_disk["parts"]) == len(report.rows)
    return report.rows


def test_what_was_not_reached_is_told_by_name(tmp_path: Path) -> None:
    rows = [row for row in told_by_parts(tmp_path, 0) if "who" in row]
    assert [row["case"] for row in rows] == [str(case) for case in cases(REAL)]
    assert {row["status"] for row in rows if row["who"] != COMFYUI} == {"not reached"}
    assert {row["why"] for row in rows if row["who"] == COMFYUI} == {"no ComfyUI: set COMFYUI_PATH to its source"}


def test_absent_peers_are_told_by_name(tmp_path: Path) -> None:
    absent = ["bitsandbytes", "comfy-kitchen", "gguf", "comfy-aimdo", "pytest"]
    rows = told_by_parts(tmp_path, 0, absent=absent, comfyui=tmp_path)
    why = {(row["who"], row["stored"]): row["why"] for row in rows if "who" in row}
    assert why[OURS, "nf4"] == "needs bitsandbytes"
    assert why[OURS, "nvfp4"] == "needs comfy-kitchen"
    assert why[OURS, "GGUF Q4_K"] == "needs gguf"
    assert why[OURS, "bf16"] == why[RESIDENT, "bf16"] == "the time was over"
    nothing = told_by_parts(tmp_path, 0, absent=["diffusers"])
    assert {row["why"] for row in nothing if row.get("who") == OURS} == {"needs diffusers"}


def test_the_table_of_precision_has_steps_of_the_real_size_where_there_is_a_card(tmp_path: Path) -> None:
    measured = {"status": "measured", "seconds": 2.0, "peak_bytes": 7, "difference": 0.1, "plan": ""}
    rows = list(on_card(tmp_path, REAL, "cuda", lambda job: iter([measured])))
    assert [row["who"] for row in rows] == list(FORMATS)
    assert all(row["case"].startswith("60 blocks, ") and "8 GB, 1328x1328, guided" in row["case"] for row in rows)
    assert rows[0].keys() == {"who", "case", "seconds", "peak_bytes", "error_mean"}
    assert {(OURS, *of_file) for of_file in FORMATS.values()} <= {(c.way, c.stored, c.how) for c in cases(REAL)}


def test_all_cards_sizes_and_formats_are_asked_for() -> None:
    asked = list(cases(REAL))
    assert len(set(asked)) == len(asked)
    for card in (4, 8, 16):
        for side in (1024, 1328):
            for guided in (True, False):
                ways = {(c.way, c.stored) for c in asked if (c.card, c.side, c.guided) == (card, side, guided)}
                assert ways >= {(OURS, "bf16"), (OURS, "nf4"), (GROUP_OFFLOAD, "bf16"), (COMFYUI, "fp8")}
                assert Case(RESIDENT, "bf16", side, guided, None) in asked
    assert REAL.cards[8] == 8 * GIB
    assert Sizes.from_json(json.loads(json.dumps(REAL.to_json()))) == REAL


PROCESS = """
import json, os, sys, time
for line in sys.stdin:
    what = json.loads(line)["what"]
    if what == "die":
        print("out of luck", file=sys.stderr)
        sys.exit(3)
    print(json.dumps({"row": {"pid": os.getpid()}}), flush=True)
    if what == "sleep":
        time.sleep(60)
    print(json.dumps({"error": "ValueError: no"} if what == "fail" else {"done": True}), flush=True)
"""


def test_a_worker_ends_in_time_and_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "process.py"
    script.write_text(PROCESS, encoding="utf-8")
    monkeypatch.setattr(worker, "_PROCESS", script)
    with Worker({}, tmp_path / "log.txt") as jobs:

        def pid(what: str = "work") -> int:
            (row,) = jobs.rows({"what": what}, Deadline(30))
            return int(row["pid"])

        first = pid()
        assert pid() == first
        with pytest.raises(JobFailed, match="ValueError: no"):
            pid("fail")
        assert pid() == first
        with pytest.raises(JobFailed, match="ended with 3: out of luck"):
            pid("die")
        second = pid()
        assert second != first
        came = []
        with pytest.raises(CutOff):
            came.extend(jobs.rows({"what": "sleep"}, Deadline(0.5)))
        assert pid() != second


def test_tests_are_told_one_by_one(tmp_path: Path) -> None:
    import os

    folder = tmp_path / "tests" / "gpu"
    folder.mkdir(parents=True)
    (folder / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('n', [1, 2])\n"
        "def test_one(n): assert n == 1\n"
        "@pytest.mark.skip(reason='not here')\n"
        "def test_other(): pass\n",
        encoding="utf-8",
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "tools")}
    names, *rows = results(tmp_path, environment, tmp_path / "log.txt", Deadline(60))
    assert names == {"names": ["test_one[1]", "test_one[2]", "test_other"]}
    assert [(row["case"], row["status"]) for row in rows] == [
        ("test_one[1]", "passed"),
        ("test_one[2]", "failed"),
        ("test_other", "skipped"),
    ]
    with pytest.raises(JobFailed, match="pytest ran no test"):
        list(results(tmp_path / "tests", environment, tmp_path / "log.txt", Deadline(60)))
    with pytest.raises(CutOff):
        list(results(tmp_path, environment, tmp_path / "log.txt", Deadline(0)))


def test_wheels_of_what_is_not_installed_are_unpacked(tmp_path: Path) -> None:
    for name in ("torch-9.9-py3-none-any.whl", "surely_not_here-1.0-py3-none-any.whl"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(f"{name.partition('-')[0]}/__init__.py", "")
    into = tmp_path / "into"
    assert unpack(tmp_path, into) == ["surely_not_here-1.0-py3-none-any.whl"]
    assert [path.name for path in into.iterdir()] == ["surely_not_here"]
