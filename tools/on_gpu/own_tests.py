"""tests/gpu in a process of its own: what pytest says of each test, as it says it."""

import json
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .deadline import Deadline
from .worker import CutOff, JobFailed

_NAMES = "collected by name: "
_RESULT = re.compile(r"\S*?::(.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)")
_STATUS = {"PASSED": "passed", "XFAIL": "passed", "SKIPPED": "skipped"}


def results(
    repository: Path, environment: Mapping[str, str], log: Path, deadline: Deadline
) -> Iterator[dict[str, Any]]:
    """The tests' names, then a row for each. Raises CutOff at the deadline, JobFailed where pytest could run none."""
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "on_gpu.own_tests", "tests/gpu"]
    with log.open("ab") as errors:
        process = subprocess.Popen(
            command, cwd=repository, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8"
        )
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(process, lines), daemon=True).start()
    said, found = "", 0
    try:
        while True:
            try:
                line = lines.get(timeout=deadline.left)
            except queue.Empty:
                raise CutOff from None
            if line is None:
                break
            said = line.strip() or said
            if line.startswith(_NAMES):
                yield {"names": json.loads(line.removeprefix(_NAMES))}
            if result := _RESULT.match(line):
                found += 1
                status = _STATUS.get(result[2], "failed")
                yield {"case": result[1], "status": status, **({"why": "see the log"} if status == "failed" else {})}
    finally:
        process.kill()
        process.wait()
    if not found:
        raise JobFailed(f"pytest ran no test: {said}")


def pytest_collection_finish(session: Any) -> None:
    """pytest, of which this module is then a plugin, has found all tests."""
    print("\n" + _NAMES + json.dumps([item.nodeid.partition("::")[2] for item in session.items]), flush=True)


def _read(process: "subprocess.Popen[str]", lines: "queue.Queue[str | None]") -> None:
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            lines.put(line)
    lines.put(None)
