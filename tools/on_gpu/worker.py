"""A process that does jobs one after another: what it leaves on a card, and what kills it, stays its own."""

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .deadline import Deadline

Row = dict[str, Any]
_PROCESS = Path(__file__).with_name("worker_process.py")


class JobFailed(Exception):
    """The job raised, or its process ended."""


class CutOff(Exception):
    """The deadline came before the job's end; its process is gone."""


class Worker:
    """`with Worker(environment, log) as worker: for row in worker.rows(job, deadline): ...`

    The process starts with the first job, and again with the next one after it was killed or died. What it prints goes
    to the file `log`.
    """

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        self._environment, self._log = dict(environment), log
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()

    def rows(self, job: Mapping[str, Any], deadline: Deadline) -> Iterator[Row]:
        """What the job says, as it says it. Raises JobFailed and CutOff."""
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        except OSError:
            raise self._ended() from None
        while True:
            try:
                line = self._lines.get(timeout=deadline.left)
            except queue.Empty:
                self.close()
                raise CutOff from None
            if line is None:
                raise self._ended()
            said = json.loads(line)
            if "error" in said:
                raise JobFailed(said["error"])
            if "row" not in said:
                return
            yield said["row"]

    def _start(self) -> "subprocess.Popen[str]":
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, _PROCESS],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environment,
                text=True,
                encoding="utf-8",
            )
        self._process, self._lines = process, queue.Queue()
        threading.Thread(target=_read, args=(process, self._lines), daemon=True).start()
        return process

    def _ended(self) -> JobFailed:
        process = self._process
        assert process is not None
        code = process.wait()
        self.close()
        said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return JobFailed(f"the process ended with {code}: {said[-1] if said else 'it said nothing'}")


def _read(process: "subprocess.Popen[str]", lines: "queue.Queue[str | None]") -> None:
    assert process.stdout is not None
    try:
        for line in process.stdout:
            lines.put(line)
    except ValueError:  # closed while it was being read
        pass
    lines.put(None)
