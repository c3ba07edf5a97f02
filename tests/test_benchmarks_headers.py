"""What `python dev.py bench headers` measures: each kind of file the first time and again."""

from pathlib import Path

import pytest
from devtools import bench


def test_every_kind_of_file_is_measured_the_first_time_and_again(
    comfyui_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = bench.load(bench.BENCHMARKS / "headers.py")
    for name, few in {"MAX_TEXTS": 9, "MAX_TENSORS": 9, "TOKENS": 9, "MERGES": 9}.items():
        monkeypatch.setattr(headers, name, few)
    rows = headers.rows(True)
    by_case = {case: [row["who"] for row in rows if row["case"] == case] for case in ("first", "again")}
    assert len(by_case["again"]) == 6
    assert by_case["first"] == [*by_case["again"], "ComfyUI's tokenizer folder"]
    assert all(row["seconds"] > 0 for row in rows)
