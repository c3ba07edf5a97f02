"""Host memory for blocks that are to stay there, taken while others are read: locking its pages takes about as long."""

from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from ..hardware import Hardware
from ..out_of_memory import reason
from .pinned_memory import HostBuffer, PinnedMemory


@dataclass(frozen=True)
class Room:
    """buffer: None where the system has no memory, for that `reason`."""

    buffer: HostBuffer | None
    reason: str = ""


class Rooms:
    """One buffer for each block that asked for one, until it is taken or forgotten."""

    def __init__(self, hardware: Hardware, host: PinnedMemory) -> None:
        self._hardware = hardware
        self._host = host
        self._asked: dict[int, Future[Room]] = {}
        self._locker: ThreadPoolExecutor | None = None

    def __contains__(self, index: int) -> bool:
        return index in self._asked

    def ask(self, index: int, nbytes: int, *, spare_bytes: int) -> "Future[Room]":
        """For block `index`; the same one however often it is asked for. Not page-locked where no more than
        `spare_bytes` could be after it."""
        if index not in self._asked:
            self._asked[index] = self._start(nbytes, spare_bytes)
        return self._asked[index]

    def take(self, index: int) -> Room:
        """It is the caller's from now on."""
        return self._asked.pop(index).result()

    def forget(self, indices: Collection[int]) -> None:
        """Give back the rooms of these blocks, which nobody reads into any more."""
        for index in self._asked.keys() & set(indices):
            self._asked.pop(index).cancel()

    def end_run(self) -> None:
        """Give back all."""
        self.forget(tuple(self._asked))
        if self._locker is not None:
            self._locker.shutdown(wait=True)
            self._locker = None

    def _start(self, nbytes: int, spare_bytes: int) -> "Future[Room]":
        if self._hardware.prefetch:
            if self._locker is None:
                self._locker = ThreadPoolExecutor(1, thread_name_prefix="qwen-block-reader-room")
            return self._locker.submit(self._take, nbytes, spare_bytes)
        future: Future[Room] = Future()
        future.set_result(self._take(nbytes, spare_bytes))
        return future

    def _take(self, nbytes: int, spare_bytes: int) -> Room:
        try:
            return Room(self._host.take(nbytes, spare_bytes=spare_bytes))
        except (RuntimeError, MemoryError) as error:
            return Room(None, reason(error))
