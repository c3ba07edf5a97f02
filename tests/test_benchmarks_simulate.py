"""Tables of cards in README and docs are what `python dev.py bench simulate` wrote, and what it would write today."""

import json
import re
from typing import Any

import pytest
from devtools import bench
from simulated_cards import CARDS
from stated_plans import widgets

RESULT = bench.BENCHMARKS / "results" / "simulate.json"


@pytest.fixture(scope="module")
def simulate() -> Any:
    return bench.load(bench.BENCHMARKS / "simulate.py")


@pytest.fixture(scope="module")
def written() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(RESULT.read_text())["rows"]
    return rows


# what the workflows that README's table names make; of one with other steps, that case's with as many
CASES = {
    "01": "1024 guided, 20 steps",
    "03": "1328 guided, 20 steps",
    "06": "1328 guided, 20 steps",
    "07": "1024 Lightning, 8 steps",
    "08": "1328 Lightning, 8 steps",
    "09": "1328 Lightning, 8 steps",
    "23": "1024 2.1-Turbo, 8 steps",
    "24": "1024 2.1-Turbo edit, 8 steps",
    "25": "1024 2.1, 40 steps",
}


def test_the_measurements_show_what_was_written(simulate: Any, written: list[dict[str, Any]]) -> None:
    page = (bench.REPOSITORY / "docs" / "measurements.md").read_text(encoding="utf-8")
    assert f"\n{simulate.shown_table(written)}\n" in page


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_a_persons_table_shows_what_was_written(page: str, simulate: Any, written: list[dict[str, Any]]) -> None:
    text = (bench.REPOSITORY / page).read_text(encoding="utf-8")
    cells = r"^\| (\d+) GB \| (\d\d)(\D.*?) \| .*\| (\d+) s\D+(\d+) s\W+(RTX [^)）]+)[)）] \|$"
    rows = re.findall(cells, text, re.MULTILINE)
    assert {number for _, number, *_ in rows} == set(CASES)
    for gigabytes, number, what, first, again, card in rows:
        assert card.endswith(f" {gigabytes} GB")
        (file,) = (bench.REPOSITORY / "workflows").glob(f"{number} *.json")
        steps = widgets(json.loads(file.read_text(encoding="utf-8")), "QwenLowVRAMSample")["steps"]
        assert [int(said) for said in re.findall(r"(\d+) (?:steps|步)", what)] in ([steps], [])
        assert f"{first} s, then {again} s" == simulate.times_of(written, card, CASES[number], steps)


def test_every_case_was_written(simulate: Any, written: list[dict[str, Any]]) -> None:
    cases = {(row["who"], row["format"], row["case"], row["from"]) for row in written}
    assert len(cases) == len(written)
    of_one = [row for row in written if "divided" not in row]
    assert len(of_one) == len(CARDS) * sum(len(case.formats) for case in simulate.cases()) * 2


@pytest.mark.parametrize("weight_format", ["fp8", "nf4", "int8_convrot"])
def test_what_was_written_is_what_would_be_simulated_today(
    simulate: Any, written: list[dict[str, Any]], weight_format: str
) -> None:
    for card in (CARDS[0], CARDS[-1]):
        for case in simulate.cases():
            if weight_format not in case.formats:
                continue
            for place in ("RAM", "disk"):
                now = simulate.row(card, weight_format, case, place)
                then = next(row for row in written if _key(row) == _key(now))
                for name in ("first", "seed", "prompt", "twice", "step"):
                    assert now[name] == pytest.approx(then[name], rel=0.01), (then, now)


def test_two_cards_are_as_they_would_be_simulated_today(simulate: Any, written: list[dict[str, Any]]) -> None:
    pairs = [row for row in written if "divided" in row and row["divided"] != "tokens"]
    assert {row["who"] for row in pairs} == {f"2 x {name}" for name in simulate.PAIRS}
    cards = {card.name: card for card in CARDS}
    cases = {case.name: case for case in simulate.cases()}
    for then in (pairs[0], pairs[-1]):
        card = cards[then["who"].removeprefix("2 x ")]
        now = simulate.pair(card, then["format"], cases[then["case"]], then["from"])
        assert now["divided"] == then["divided"]
        for name in ("first", "seed", "prompt", "step", "seed_alone"):
            assert now[name] == pytest.approx(then[name], rel=0.01), (then, now)


def test_four_machines_are_as_they_would_be_simulated_today(simulate: Any, written: list[dict[str, Any]]) -> None:
    fleets = [row for row in written if row.get("divided") == "tokens"]
    assert {row["who"] for row in fleets} == {
        f"{simulate.MACHINES} x {simulate.CARD_OF_MACHINES}, {gbit} Gbit/s" for gbit in simulate.LINKS_GBIT
    }
    cases = {case.name: case for case in simulate.cases()}
    then = next(row for row in fleets if row["who"].endswith(" 1 Gbit/s") and row["format"] == "fp8")
    now = simulate.fleet(1, then["format"], cases[then["case"]], then["from"])
    assert now["bound"] == then["bound"] == "the link"
    for name in ("first", "seed", "prompt", "step", "link", "seed_alone"):
        assert now[name] == pytest.approx(then[name], rel=0.01), (then, now)


def test_forecasts_of_real_cards_are_within_a_tenth_of_the_model(written: list[dict[str, Any]]) -> None:
    fitting = [row for row in written if row["first"] is not None]
    assert len(fitting) > len(written) * 0.9
    for row in fitting:
        assert row["forecast_step"] == pytest.approx(row["step"], rel=0.1), row
        assert row["forecast_first"] == pytest.approx(row["first"], rel=0.1), row


def _key(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("who", "case", "format", "from")}
