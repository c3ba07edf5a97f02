"""The host's threads: the clock of each, and what orders them: submit, result, exception, shutdown, and locks."""

import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from .clocks import Clock

LOOK_SECONDS = 0.01


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


@dataclass(eq=False)
class Turn:
    """Of a pool's task among those that were submitted before: it has passed when it has read, or will not.

    task: its future, whose result is not to be kept alive here; gone when nobody will run it.
    """

    pool: list["Turn"]
    task: "weakref.ref[Future[Any]] | None" = None
    passed: bool = False

    @property
    def waits(self) -> bool:
        """Whether one before it may still read."""
        before = self.pool[: self.pool.index(self)]
        return any(turn.may_read for turn in before)

    @property
    def may_read(self) -> bool:
        task = None if self.task is None else self.task()
        gone = self.task is not None and (task is None or task.cancelled())
        return not self.passed and not gone


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
        self.turns = threading.Condition()

    def here(self) -> HostThread:
        if not hasattr(self._local, "thread"):
            self._local.thread = HostThread(f"host {next(self._numbers)} ({threading.current_thread().name})")
        thread: HostThread = self._local.thread
        return thread

    @property
    def turn(self) -> Turn | None:
        """Of the present thread's task."""
        turn: Turn | None = getattr(self._local, "turn", None)
        return turn

    @contextmanager
    def ordered_by_executors(
        self, entered: Callable[[], AbstractContextManager[Any]], jitter: Callable[[], float]
    ) -> Iterator[None]:
        """Within it, thread pools order the threads of this process. `entered`: a context that each of their tasks runs
        in; `jitter`: seconds by which a task begins late."""
        threads, submit, shutdown = self, ThreadPoolExecutor.submit, ThreadPoolExecutor.shutdown

        def ordered_submit(pool: ThreadPoolExecutor, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            begin, ends, delay = threads.here().now(), [], jitter()
            turn = threads._next_turn(pool)

            def run() -> Any:
                thread = threads.here()
                threads._local.turn = turn
                thread.join(begin)
                time.sleep(delay)
                try:
                    with entered():
                        return function(*args, **kwargs)
                finally:
                    threads._pass(turn)
                    ends.append(thread.now())
                    pool.__dict__.setdefault("_ends", []).append(ends[0])

            future = submit(pool, run)
            turn.task = weakref.ref(future)
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

    def _next_turn(self, pool: Any) -> Turn:
        with self.turns:
            turns: list[Turn] = pool.__dict__.setdefault("_turns", [])
            while turns and not turns[0].may_read:
                del turns[0]
            turns.append(Turn(turns))
            return turns[-1]

    def _pass(self, turn: Turn) -> None:
        with self.turns:
            turn.passed = True
            self.turns.notify_all()

    def _join_all(self, owner: Any) -> None:
        for end in owner.__dict__.get("_ends", ()):
            self.here().join(end)


class Disk:
    """Reads of all threads, one after the other: those of one pool in the order of its tasks, as they are when their
    threads are as fast as each other."""

    def __init__(self, threads: HostThreads) -> None:
        self._threads = threads
        self._free_at = 0.0

    def read(self, seconds: float) -> None:
        """The present thread waits for one that takes so many simulated seconds."""
        thread, turn = self._threads.here(), self._threads.turn
        with self._threads.turns:
            while turn is not None and not turn.passed and turn.waits:
                self._threads.turns.wait(LOOK_SECONDS)  # nobody tells of a task that is cancelled
            self._free_at = thread.seconds = max(thread.seconds, self._free_at) + seconds
        if turn is not None:
            self._threads._pass(turn)


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
