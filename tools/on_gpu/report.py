"""What was measured, written anew after every row: a run that is ended in the middle has told what it knows."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

VERSION = 1
NOT_REACHED = "not reached"
# of a row, what the table shows; the file has all
_SHOWN = ("seconds", "forecast_seconds", "of_forecast", "first_seconds", "peak_bytes", "difference", "equal")


class Report:
    """The file and the table. A part is a list of rows, each with `case` and `status`, and `who` where several ways
    are measured. Statuses: holds, does not hold, measured, passed; failed, does not fit, out of memory; skipped and
    not reached, which say `why`."""

    def __init__(self, file: Path, **about: Any) -> None:
        self._file = file
        self._told: dict[str, Any] = {"version": VERSION, **about, "parts": []}

    def add(self, name: str) -> list[dict[str, Any]]:
        """A part, to whose rows `say` adds."""
        rows: list[dict[str, Any]] = []
        self._told["parts"].append({"name": name, "rows": rows})
        return rows

    def say(self, rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
        rows.append(row)
        print(line_of(row), flush=True)
        self.write()

    def write(self, **about: Any) -> None:
        self._told |= about
        unfinished = self._file.with_name(f"{self._file.name}.unfinished")
        unfinished.write_text(json.dumps(self._told, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(self._file)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [{"part": part["name"], **row} for part in self._told["parts"] for row in part["rows"]]


def line_of(row: dict[str, Any]) -> str:
    who = f"{row['who']}: " if "who" in row else ""
    why = f" ({row['why']})" if row.get("why") else ""
    seconds = f", {row['seconds']:.3f} s" if "seconds" in row else ""
    return f"  {who}{row['case']}: {row['status']}{seconds}{why}"


def shown(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One table's rows of all parts: what was reached, and what it says of itself."""
    made = []
    for row in rows:
        if row["status"] == NOT_REACHED:
            continue
        numbers = {name: row.get(name) for name in _SHOWN}
        made.append({"who": row.get("who", row["part"]), "case": row["case"], "status": row["status"], **numbers})
    return made
