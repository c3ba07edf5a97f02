"""A small server in the place of a model hub: what huggingface_hub asks of one for files, with ranges and checksums."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import _http

COMMIT = "0" * 40
_SETTINGS = {"HF_HUB_OFFLINE": False, "DOWNLOAD_CHUNK_SIZE": 64 * 1024}


@dataclass
class Hub:
    """files: by path. etags: others than their sha256. asked: method, path and range of each request."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, str, str]] = field(default_factory=list)


class _Answers(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *arguments: Any) -> None:
        pass

    def _answer(self, body: bool) -> None:
        wanted = self.headers.get("Range", "")
        self.hub.asked.append((self.command, self.path, wanted))
        data = self.hub.files.get(self.path)
        if data is None:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
        self.send_response(206 if wanted else 200)
        etag = self.hub.etags.get(self.path, hashlib.sha256(data).hexdigest())
        self.send_header("ETag", '"version"')
        self.send_header("X-Linked-Etag", f'"{etag}"')
        self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data) - start))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if body:
            self.wfile.write(data[start:])


@contextmanager
def hub_stand_in() -> Iterator[Hub]:
    """As long as it lasts huggingface_hub asks it, in pieces of 64 KiB."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (_Answers,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    settings = {**_SETTINGS, "ENDPOINT": hub.url}
    before = {name: getattr(constants, name) for name in settings}
    _set(settings)
    try:
        yield hub
    finally:
        _set(before)
        server.shutdown()
        server.server_close()
        thread.join()


def _set(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        setattr(constants, name, value)
    forget_sessions()


def forget_sessions() -> None:
    """They hold whether the network may be used."""
    for name in ("close_session", "reset_sessions"):
        if hasattr(_http, name):
            getattr(_http, name)()
