"""Write the bundled workflows, as `workflow_maker` makes them.

    PYTHONPATH=tools/alias:tools python tools/make_workflows.py [PART ...]

all of them, or those with one of the parts in their names. A file that the catalogue has no more is removed.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from workflow_maker.catalogue import workflows

FOLDER = Path(__file__).resolve().parents[1] / "workflows"


def as_text(graph: dict[str, Any]) -> str:
    return json.dumps(graph, ensure_ascii=False, indent=2) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="of the names to write")
    parts = parser.parse_args().parts
    known = dict(workflows())
    for stem, workflow in known.items():
        if not parts or any(part in stem for part in parts):
            (FOLDER / f"{stem}.json").write_text(as_text(workflow.graph()), encoding="utf-8")
            print(stem)
    for file in FOLDER.glob("*.json"):
        if file.stem not in known:
            file.unlink()


if __name__ == "__main__":
    main()
