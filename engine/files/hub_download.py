"""Fetch known model files from the hub or its mirror, through huggingface_hub: resumed, checked, never half in place.

What has come lies beside its place as `<name>.<etag>.part` until it is whole and has the checksum that the hub gave.
Knows no page and no thread; the functions block, and end at the next piece where `on_bytes` raises.
"""

import glob
import hashlib
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..errors import DownloadError, NoNetwork, QwenLowVRAMError
from ..texts import printable
from .atomic_files import UNFINISHED
from .known_files import MIRROR, KnownFile, KnownFolder

FREE_BYTES = 256 * 1024**2  # left on the disk
_PIECE_BYTES = 8 * 1024**2
# what a pipeline needs of its repository; this file comes last: it makes a folder one that can be chosen
_LAST = "model_index.json"
_WANTED = ("transformer/*", "text_encoder/*", "vae/*", "tokenizer/*", "processor/*", "scheduler/*", _LAST)

OnBytes = Callable[[str, int, int], None]  # a file's name, its bytes until now and in all


class Stopped(Exception):
    """A person stopped it: for `on_bytes` to raise."""


@dataclass(frozen=True)
class Piece:
    """A file of a repository and where it belongs."""

    url: str
    target: Path
    sha256: str = ""


def endpoint_of(source: str) -> str:
    """ "hub": what HF_ENDPOINT says, else the hub itself. "mirror": the mirror of it."""
    from huggingface_hub import constants

    return MIRROR if source == "mirror" else str(constants.ENDPOINT).rstrip("/")


def pieces_of(wanted: KnownFile | KnownFolder, folder: Path, endpoint: str) -> list[Piece]:
    """The files to fetch, below ComfyUI's folder for them. Asks the hub for a pipeline folder's.

    Raises DownloadError.
    """
    if isinstance(wanted, KnownFile):
        return [Piece(wanted.url_at(endpoint), folder / wanted.name, wanted.sha256)]
    from huggingface_hub import HfApi

    with _said(wanted.repository, endpoint):
        listed = HfApi(endpoint=endpoint, token=False).model_info(wanted.repository, revision=wanted.revision)
    names = [file.rfilename for file in listed.siblings or () if _is_wanted(file.rfilename)]
    root = f"{endpoint}/{wanted.repository}/resolve/{listed.sha or wanted.revision}"
    ordered = sorted(names, key=lambda name: (name == _LAST, name))
    return [Piece(f"{root}/{name}", folder / wanted.name / name) for name in ordered]


def _is_wanted(name: str) -> bool:
    plain = not any(part in ("", ".", "..") for part in name.split("/")) and "\\" not in name and ":" not in name
    return plain and any(fnmatch(name, pattern) for pattern in _WANTED)


def fetch(piece: Piece, on_bytes: OnBytes) -> None:
    """Put the file in its place, whole and checked. One that is there in its full size is left as it is.

    Raises DownloadError, and what `on_bytes` raises; what has come by then is used the next time.
    """
    from huggingface_hub import get_hf_file_metadata

    name = piece.target.name
    with _said(name, piece.url):
        known = get_hf_file_metadata(piece.url, token=False)
    if not known.etag or known.size is None:
        raise DownloadError(
            "The hub does not say how large {name} is, or gives no checksum for it.\n\nWhat to do: open its link.",
            code="download.unknown",
            name=name,
        )
    size, checksum = known.size, piece.sha256 or known.etag
    if piece.target.is_file() and piece.target.stat().st_size == size:
        return on_bytes(name, size, size)
    with _said(name, piece.url):
        piece.target.parent.mkdir(parents=True, exist_ok=True)
        part = _part_of(piece.target, known.etag)
        _require_room(part, size)
        _append(piece.url, part, size, lambda done: on_bytes(name, done, size))
        _require_checksum(part, checksum, name, lambda: on_bytes(name, size, size))
        os.replace(part, piece.target)


def _part_of(target: Path, etag: str) -> Path:
    """Of this version of the file; parts of others go."""
    part = target.with_name(f"{target.name}.{''.join(c for c in etag if c.isalnum())[:16]}{UNFINISHED}")
    for other in target.parent.glob(f"{glob.escape(target.name)}.*{UNFINISHED}"):
        if other != part:
            other.unlink(missing_ok=True)
    return part


def _require_room(part: Path, size: int) -> None:
    have = part.stat().st_size if part.exists() else 0
    free = shutil.disk_usage(part.parent).free
    if size - have + FREE_BYTES > free:
        raise DownloadError(
            "{name} needs {need_bytes} more on the disk, and {free_bytes} are free.\n\nWhat to do: make room there; "
            "what was downloaded is kept, and the download continues from there.",
            code="download.disk",
            name=part.name.removesuffix(UNFINISHED).rpartition(".")[0],
            need_bytes=size - have,
            free_bytes=free,
        )


class _Counted(io.FileIO):
    """A file that tells how far it is."""

    def __init__(self, path: Path, on_bytes: Callable[[int], None]) -> None:
        super().__init__(path, "ab+")
        self._on_bytes = on_bytes

    def write(self, data: Any) -> int:
        written = super().write(data)
        self._on_bytes(self.tell())
        return written


def _append(url: str, part: Path, size: int, on_bytes: Callable[[int], None]) -> None:
    from huggingface_hub.file_download import http_get

    have = part.stat().st_size if part.exists() else 0
    if have > size:
        part.unlink()
        have = 0
    on_bytes(have)
    with _Counted(part, on_bytes) as file:
        http_get(url, file, resume_size=have, expected_size=size)


def _require_checksum(part: Path, checksum: str, name: str, on_piece: Callable[[], None]) -> None:
    """A sha256, or of small files git's sha1; other marks of a version say nothing about the bytes."""
    digest = {64: hashlib.sha256(), 40: hashlib.sha1(usedforsecurity=False)}.get(len(checksum))
    if digest is None or any(char not in "0123456789abcdef" for char in checksum):
        return
    if len(checksum) == 40:
        digest.update(f"blob {part.stat().st_size}\0".encode())
    for piece in _pieces(part):
        digest.update(piece)
        on_piece()
    if digest.hexdigest() != checksum:
        part.unlink()
        raise DownloadError(
            "{name} arrived damaged: its checksum is not the hub's.\n\nWhat to do: download it again, perhaps from the "
            "other source.",
            code="download.damaged",
            name=name,
        )


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            yield piece


def _is_of_the_network(error: Exception) -> bool:
    """Of several generations of huggingface_hub; errors of the disk have a number."""
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    by_library = type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3"))
    return by_library or (isinstance(error, OSError) and error.errno is None)


@contextmanager
def _said(name: str, address: str) -> Iterator[None]:
    """Errors of the network and the hub in words of a person."""
    host = address.split("://")[-1].split("/")[0]
    try:
        yield
    except (QwenLowVRAMError, Stopped):
        raise
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403, 404):
            raise DownloadError(
                "{host} does not provide {name} ({status}).\n\nWhat to do: try the other source, or open the link.",
                code="download.not_there",
                host=host,
                name=name,
                status=status,
            ) from error
        reason = printable(str(error).strip().partition("\n")[0][:300]) or type(error).__name__
        if status is None and _is_of_the_network(error):
            raise NoNetwork(
                "{host} cannot be reached ({reason}).\n\nWhat to do: check the network, or try the other source; "
                "what was downloaded is kept, and the download continues from there.",
                code="download.no_network",
                host=host,
                reason=reason,
            ) from error
        raise DownloadError(
            "{name} could not be fetched: {reason}.\n\nWhat to do: try again; what was downloaded is kept.",
            code="download.failed",
            name=name,
            reason=reason,
        ) from error
