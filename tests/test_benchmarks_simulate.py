"""README's table of cards is what `python dev.py bench simulate` wrote, and what it would write today."""

import json
from typing import Any

import pytest
from devtools import bench
from simulated_cards import CARDS

RESULT = bench.BENCHMARKS / "results" / "simulate.json"


@pytest.fixture(scope="module")
def simulate() -> Any:
    return bench.load(bench.BENCHMARKS / "simulate.py")


@pytest.fixture(scope="module")
def written() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(RESULT.read_text())["rows"]
    return rows


def test_the_readme_shows_what_was_written(simulate: Any, written: list[dict[str, Any]]) -> None:
    readme = (bench.REPOSITORY / "README.md").read_text()
    assert f"\n{simulate.readme_table(written)}\n" in readme


def test_every_case_was_written(simulate: Any, written: list[dict[str, Any]]) -> None:
    cases = {(row["who"], row["format"], row["case"], row["from"]) for row in written}
    assert len(cases) == len(written) == len(CARDS) * sum(len(case.formats) for case in simulate.cases()) * 2


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


def test_forecasts_of_real_cards_are_within_a_tenth_of_the_model(written: list[dict[str, Any]]) -> None:
    fitting = [row for row in written if row["first"] is not None]
    assert len(fitting) > len(written) * 0.9
    for row in fitting:
        assert row["forecast_step"] == pytest.approx(row["step"], rel=0.1), row
        assert row["forecast_first"] == pytest.approx(row["first"], rel=0.1), row


def _key(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("who", "case", "format", "from")}
