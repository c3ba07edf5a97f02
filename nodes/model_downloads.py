"""Fetch a known model into ComfyUI's folders because a person asked for it: one at a time, shown, stopped on demand."""

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..engine.errors import InvalidRequest, QwenLowVRAMError
from ..engine.files.hub_download import Stopped, endpoint_of, fetch, pieces_of
from ..engine.files.known_files import KnownFile, KnownFolder
from ..engine.log import logger

EVENT = "qwen_lowvram.download"
RUNNING, DONE, FAILED, STOPPED = "running", "done", "failed", "stopped"
BETWEEN_SECONDS = 0.25  # at most four events a second


@dataclass(frozen=True)
class Download:
    """One that runs, or has ended. file: of `files`, the one that is coming, from 1. text, values: what went wrong."""

    folder: str
    name: str
    state: str = RUNNING
    file: int = 0
    files: int = 0
    done_bytes: int = 0
    total_bytes: int = 0
    text: str = ""
    values: dict[str, Any] | None = None


class Downloads:
    """send(event, data): to all pages, from any thread; no more often than every `between_seconds` while it runs."""

    def __init__(self, send: Callable[[str, dict[str, Any]], None], between_seconds: float = BETWEEN_SECONDS) -> None:
        self._send, self._between_seconds = send, between_seconds
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._now: Download | None = None
        self._thread: threading.Thread | None = None
        self._sent = 0.0

    @property
    def now(self) -> dict[str, Any] | None:
        """The one that runs, or the last one; None before the first."""
        with self._lock:
            return None if self._now is None else asdict(self._now)

    def start(self, wanted: KnownFile | KnownFolder, folder: Path, source: str) -> None:
        """Into `folder`, ComfyUI's own for such files. Raises InvalidRequest while another one runs."""
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                raise InvalidRequest(
                    "A download is running already: {name}.\n\nWhat to do: wait for it, or stop it first.",
                    code="download.running",
                    name=self._now.name if self._now else "",
                )
            self._stop.clear()
            self._now = Download(wanted.folder, wanted.name)
            self._thread = threading.Thread(
                target=self._run, args=(wanted, folder, source), name="qwen_lowvram download", daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        """Soon: at the next piece that comes. What has come stays."""
        self._stop.set()

    def wait(self) -> None:
        """For the end of the one that runs."""
        if self._thread is not None:
            self._thread.join()

    def _run(self, wanted: KnownFile | KnownFolder, folder: Path, source: str) -> None:
        logger.info("Downloading %s to %s.", wanted.name, folder)
        self._say(force=True)
        try:
            pieces = pieces_of(wanted, folder, endpoint_of(source))
            for number, piece in enumerate(pieces, start=1):
                self._say(file=number, files=len(pieces))
                fetch(piece, self._on_bytes)
        except Stopped:
            end: dict[str, Any] = {"state": STOPPED}
        except QwenLowVRAMError as error:
            end = {"state": FAILED, "text": str(error), "values": error.as_dict()}
        except Exception as error:  # the thread's end: nobody else could tell it
            end = {"state": FAILED, "text": f"{type(error).__name__}: {error}"}
        else:
            end = {"state": DONE}
        logger.info("Download of %s: %s.", wanted.name, end.get("text", "").partition("\n")[0] or end["state"])
        self._say(force=True, **end)

    def _on_bytes(self, name: str, done: int, total: int) -> None:
        if self._stop.is_set():
            raise Stopped
        self._say(done_bytes=done, total_bytes=total)

    def _say(self, *, force: bool = False, **changed: Any) -> None:
        with self._lock:
            assert self._now is not None
            self._now = replace(self._now, **changed)
            now = time.monotonic()
            if not force and now - self._sent < self._between_seconds:
                return
            self._sent = now
            data = asdict(self._now)
        self._send(EVENT, data)
