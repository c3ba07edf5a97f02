"""The host's threads: the clock of each, and what orders them: submit, result, exception, shutdown, and locks."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from .clocks import Clock


@dataclass
class HostThread:
    """`seconds`: the thread's place in simulated time."""

    name: str
    clock: Clock = field(default_factory=Clock)
    seconds: float = 0.0

    def step(self) -> Clock:
        """One more access of this thread."""
        self.clock.tick(self.name)
        return self.clock

    def now(self) -> "Moment":
        return Moment(self.clock.copy(), self.seconds)

    def join(self, moment: "Moment") -> None:
        """This thread has waited for that moment."""
        self.clock.join(moment.clock)
        self.seconds = max(self.seconds, moment.seconds)


@dataclass(frozen=True)
class Moment:
    """What a thread or a stream knew at some time, which others can wait for."""

    clock: Clock
    seconds: float


class HostThreads:
    """One HostThread for each thread that comes by."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._numbers = itertools.count()

    def here(self) -> HostThread:
        if not hasattr(self._local, "thread"):
            self._local.thread = HostThread(f"host {next(self._numbers)} ({threading.current_thread().name})")
        thread: HostThread = self._local.thread
        return thread

    @contextmanager
    def ordered_by_executors(
        self, entered: Callable[[], AbstractContextManager[Any]], jitter: Callable[[], float]
    ) -> Iterator[None]:
        """Within it, thread pools order the threads of this process. `entered`: a context that each of their tasks runs
        in; `jitter`: seconds by which a task begins late."""
        threads, submit, shutdown = self, ThreadPoolExecutor.submit, ThreadPoolExecutor.shutdown

        def ordered_submit(pool: ThreadPoolExecutor, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            begin, ends, delay = threads.here().now(), [], jitter()

            def run() -> Any:
                thread = threads.here()
                thread.join(begin)
                time.sleep(delay)
                try:
                    with entered():
                        return function(*args, **kwargs)
                finally:
                    ends.append(thread.now())
                    pool.__dict__.setdefault("_ends", []).append(ends[0])

            future = submit(pool, run)
            future.__dict__["_ends"] = ends
            return future

        def ordered_shutdown(pool: ThreadPoolExecutor, wait: bool = True, **options: Any) -> None:
            shutdown(pool, wait, **options)
            if wait:
                threads._join_all(pool)

        def ordered(method: Any) -> Any:
            def call(future: Future[Any], *args: Any, **kwargs: Any) -> Any:
                try:
                    return method(future, *args, **kwargs)
                finally:
                    threads._join_all(future)

            return call

        with (
            patch.object(ThreadPoolExecutor, "submit", ordered_submit),
            patch.object(ThreadPoolExecutor, "shutdown", ordered_shutdown),
            patch.object(Future, "result", ordered(Future.result)),
            patch.object(Future, "exception", ordered(Future.exception)),
        ):
            yield

    def _join_all(self, owner: Any) -> None:
        for end in owner.__dict__.get("_ends", ()):
            self.here().join(end)


class Disk:
    """Reads of all threads, one after the other."""

    def __init__(self, threads: HostThreads) -> None:
        self._lock = threading.Lock()
        self._threads = threads
        self._free_at = 0.0

    def read(self, seconds: float) -> None:
        """The present thread waits for one that takes so many simulated seconds."""
        thread = self._threads.here()
        with self._lock:
            self._free_at = thread.seconds = max(thread.seconds, self._free_at) + seconds


class OrderedLock:
    """A lock whose holders come one after the other, also in their clocks."""

    def __init__(self, threads: HostThreads) -> None:
        self._lock = threading.RLock()
        self._threads = threads
        self._left = Moment(Clock(), 0.0)

    def __enter__(self) -> bool:
        self._lock.acquire()
        self._threads.here().join(self._left)
        return True

    def __exit__(self, *error: object) -> None:
        self._left = self._threads.here().now()
        self._lock.release()
