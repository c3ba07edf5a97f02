"""Find files below ComfyUI's folders that its own lists leave out: never round in circles, and again only when a
folder has changed. Opens no file."""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import folder_paths

from ..engine.log import logger

MAX_FOLDERS = 10_000  # below one of ComfyUI's folders
# a folder that was changed just now may be changed again without another time: clocks of file systems are as coarse
SETTLED_NS = 2_000_000_000
_LEFT_OUT = (".git",)

# the path of a folder below the root and the names in it -> what is found there, and whether to go on below it
Wanted = Callable[[str, list[str]], tuple[list[str], bool]]


@dataclass(frozen=True)
class _Walk:
    found: tuple[str, ...]
    times_ns: dict[str, int]

    @property
    def is_true(self) -> bool:
        """Whether every folder is as it was."""
        return bool(self.times_ns) and all(_time_of(folder) == time_ns for folder, time_ns in self.times_ns.items())


class FolderSearch:
    """What `wanted` finds below a root.

    Links are followed, but never into a folder that they lie in. Kept until a folder below the root is changed, and
    while ComfyUI lists all nodes not even that is looked at, as with its own lists. Any thread may ask.
    """

    def __init__(self, name: str, wanted: Wanted) -> None:
        self._name, self._wanted = name, wanted
        self._lock = threading.Lock()
        self._kept: dict[str, _Walk] = {}

    def below(self, root: str) -> tuple[str, ...]:
        """In the order of the paths; empty where the root cannot be read."""
        key = f"qwen_lowvram {self._name} {root}"
        listed: tuple[str, ...] | None = folder_paths.cache_helper.get(key)
        if listed is None:
            with self._lock:
                listed = self._search(root)
            folder_paths.cache_helper.set(key, listed)
        return listed

    def _search(self, root: str) -> tuple[str, ...]:
        kept = self._kept.pop(root, None)
        if kept is not None and kept.is_true:
            self._kept[root] = kept
            return kept.found
        now_ns = time.time_ns()
        walk = self._walk(root)
        if now_ns - max(walk.times_ns.values(), default=now_ns) > SETTLED_NS:
            self._kept[root] = walk
        return walk.found

    def _walk(self, root: str) -> _Walk:
        found: list[str] = []
        times: dict[str, int] = {}
        waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [(root, frozenset())]
        while waiting:
            folder, above = waiting.pop()
            try:
                stat = os.stat(folder)
                files, subfolders = _listed(folder)
            except OSError:
                continue  # gone, or not this user's to read
            this = (stat.st_dev, stat.st_ino)
            if this in above:
                continue  # a link to a folder that it lies in
            if len(times) == MAX_FOLDERS:
                logger.warning("%s has over %d folders; the models in the others are not listed.", root, MAX_FOLDERS)
                break
            times[folder] = stat.st_mtime_ns
            here, deeper = self._wanted(os.path.relpath(folder, root), files)
            found += here
            if deeper:
                waiting += [(os.path.join(folder, name), above | {this}) for name in subfolders]
        return _Walk(tuple(sorted(found)), times)


def _listed(folder: str) -> tuple[list[str], list[str]]:
    """Names of files, and of folders, the last of these first."""
    files: list[str] = []
    folders: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            (folders if entry.is_dir() else files).append(entry.name)
    return files, sorted((name for name in folders if name not in _LEFT_OUT), reverse=True)


def _time_of(folder: str) -> int | None:
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return None
