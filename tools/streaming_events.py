"""A discrete-event model of sampling: disk, ring, bus, copy stream, decoding, slots and computing, piece by piece.

It knows nothing of the planner's forecast, which it is there to check; `benchmarks/simulate.py` says for which cards.

What it follows, of the code: the ring's reads go on in the order of the blocks that are read, over the borders of
groups, blocks and steps, and each waits for a buffer whose last copy is done (`streaming/ring.py`); one reader thread
issues copies and decoding of one block after the other on the copy stream, which waits for the last use of the slot
(`streaming/streamer.py`); the host issues a block when its fill has been issued and the block before the last one has
been computed, and waits for the device at the end of a step. What blocks make once of a prompt is kept on the device,
or brought on the same copy stream.
"""

import heapq
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise

from qwenimage_lowvram.engine.planning.footprint import TransformerFootprint
from qwenimage_lowvram.engine.planning.forecast import Speeds, decode_seconds, link_seconds
from qwenimage_lowvram.engine.planning.memory_plan import MemoryPlan
from qwenimage_lowvram.engine.planning.overlap import PIECE_BYTES, Way, ways
from qwenimage_lowvram.engine.planning.rates import (
    DECODE_SHARE,
    ISSUE_SECONDS,
    LOCK_BYTES,
    READER_SHARE,
    STEP_SECONDS,
)

Process = Generator["float | Gate", None, None]
EPSILON = 1e-9


@dataclass(frozen=True)
class Machine:
    """Rates in bytes per second. disk_bytes: of reads in several threads; reader_bytes: of one thread alone;
    lock_bytes: of page-locking.

    decode_share: of decoding's seconds, what computing beside it loses. issue_seconds: of the host, for a block and a
    branch; step_seconds: from the end of a step to the first block of the next one.
    """

    bus_bytes: float
    disk_bytes: float
    reader_bytes: float
    lock_bytes: float
    decode_share: float
    issue_seconds: float
    step_seconds: float


@dataclass(frozen=True)
class Keeping:
    """What each block makes once, in make_seconds of computing: the first `remade` make it at every step. nbytes: of
    each; `host`: blocks of which it lies in host memory, from where it comes while the one before computes (`ahead`) or
    when it is asked for."""

    make_seconds: float = 0.0
    remade: int = 0
    nbytes: int = 0
    host: tuple[int, ...] = ()
    ahead: bool = True


@dataclass(frozen=True)
class Job:
    """Passes over blocks. ways: how each of them comes. group_bytes: what of a block is copied, then decoded, one after
    the other. decode_seconds, compute_seconds: of a block, alone on the device; branches: that compute_seconds are of,
    all together. link_seconds: that a block's computing waits for other processes."""

    ways: Sequence[Way]
    group_bytes: Sequence[int]
    decode_seconds: float
    compute_seconds: float
    branches: int
    slots: int
    ring_pieces: int
    piece_bytes: int
    keeping: Keeping = Keeping()
    link_seconds: float = 0.0


class Gate:
    """Something that happens once."""

    def __init__(self, happened: bool = False) -> None:
        self.happened = happened
        self.waiting: list[Process] = []


class Events:
    """Runs processes: what they yield they wait for, seconds or a gate."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Process]] = []
        self._order = count()

    def start(self, process: Process) -> None:
        self._at(self.now, process)

    def open(self, gate: Gate) -> None:
        gate.happened = True
        for process in gate.waiting:
            self._at(self.now, process)
        gate.waiting.clear()

    def run(self) -> None:
        while self._queue:
            self.now, _, process = heapq.heappop(self._queue)
            for wanted in process:
                if isinstance(wanted, float):
                    self._at(self.now + wanted, process)
                    break
                if not wanted.happened:
                    wanted.waiting.append(process)
                    break

    def _at(self, moment: float, process: Process) -> None:
        heapq.heappush(self._queue, (moment, next(self._order), process))


@dataclass
class Stream:
    """Work of the device, one after the other, in the order in which it was issued."""

    events: Events
    work: deque[tuple[Process, Gate]] = field(default_factory=deque)
    more: Gate = field(default_factory=Gate)

    def __post_init__(self) -> None:
        self.events.start(self._run())

    def issue(self, work: Process) -> Gate:
        done = Gate()
        self.work.append((work, done))
        self.events.open(self.more)
        return done

    def _run(self) -> Process:
        while True:
            while self.work:
                work, done = self.work.popleft()
                yield from work
                self.events.open(done)
            self.more = Gate()
            yield self.more


@dataclass
class Piece:
    """Of a block on its way through the ring: up to byte `end`."""

    nbytes: int
    end: int
    room: Gate
    read: Gate = field(default_factory=Gate)


class Sampling:
    """One run of a job on a machine. `first`: nothing is there when it begins, and what is to be held is read."""

    def __init__(self, job: Job, machine: Machine, *, steps: int, first: bool) -> None:
        self.job, self.machine, self.steps, self.first = job, machine, steps, first
        self._events = Events()
        self._copies, self._compute = Stream(self._events), Stream(self._events)
        self._disk_free = 0.0
        self._decoded, self._decoding_since = 0.0, -1.0
        passing = [way for way in job.ways if way is not Way.STAYS or job.decode_seconds]
        self._queue = [(step, way) for step in range(steps) for way in passing]
        self._submitted, self._issued, self._used = ([Gate() for _ in self._queue] for _ in range(3))
        self._filled: dict[int, Gate] = {}
        self._next_fill = 0
        self._rooms = [Gate() for step, way in self._queue if self._locks(step, way)]
        self._pieces = deque(self._to_read())
        self._ahead = list(self._pieces)
        self._places, self._place_free = job.ring_pieces, Gate()
        self._brought: dict[int, Gate] = {}
        self._ends: list[float] = []

    def run(self) -> list[float]:
        """Seconds of each step."""
        for process in (self._lock_rooms(), self._read_ahead(), self._fill_slots(), self._issue_blocks()):
            self._events.start(process)
        self._events.run()
        return [end - begin for begin, end in pairwise([0.0, *self._ends])]

    def _locks(self, step: int, way: Way) -> bool:
        return self.first and step == 0 and way is Way.HELD

    def _reads(self, step: int, way: Way) -> bool:
        return way is Way.READ or self._locks(step, way)

    def _to_read(self) -> Iterator[Piece]:
        rooms, piece_bytes, total = iter(self._rooms), self.job.piece_bytes, sum(self.job.group_bytes)
        for step, way in self._queue:
            if self._reads(step, way):
                room = next(rooms) if self._locks(step, way) else Gate(happened=True)
                for begin in range(0, total, piece_bytes):
                    end = min(total, begin + piece_bytes)
                    yield Piece(end - begin, end, room)

    def _lock_rooms(self) -> Process:
        for room in self._rooms:
            yield sum(self.job.group_bytes) / self.machine.lock_bytes
            self._events.open(room)

    def _read_ahead(self) -> Process:
        for piece in self._ahead:
            yield piece.room
            while not self._places:
                self._place_free = Gate()
                yield self._place_free
            self._places -= 1
            self._events.start(self._read(piece))

    def _read(self, piece: Piece) -> Process:
        machine, now = self.machine, self._events.now
        self._disk_free = max(self._disk_free, now) + piece.nbytes / machine.disk_bytes
        yield max(self._disk_free, now + piece.nbytes / machine.reader_bytes) - now
        self._events.open(piece.read)

    def _copy(self, nbytes: int, *, gives_place: bool = False) -> Process:
        yield nbytes / self.machine.bus_bytes
        if gives_place:
            self._places += 1
            self._events.open(self._place_free)

    def _decode(self, seconds: float) -> Process:
        self._decoding_since = self._events.now
        yield seconds
        self._decoded += seconds
        self._decoding_since = -1.0

    def _decoded_by_now(self) -> float:
        return self._decoded + (self._events.now - self._decoding_since if self._decoding_since >= 0 else 0.0)

    def _compute_block(self, used: Gate, seconds: float) -> Process:
        begin, before = self._events.now, self._decoded_by_now()
        while True:
            lost = self.machine.decode_share * (self._decoded_by_now() - before)
            left = seconds + lost - (self._events.now - begin)
            if left < EPSILON:
                break
            yield left
        self._events.open(used)

    def _exchange(self) -> Process:
        yield self.job.link_seconds

    def _wait(self, gate: Gate) -> Process:
        yield gate

    def _fill_slots(self) -> Process:
        """The reader thread."""
        job, copies, total = self.job, self._copies, sum(self.job.group_bytes)
        for k, (step, way) in enumerate(self._queue):
            yield self._submitted[k]
            if k >= job.slots:
                copies.issue(self._wait(self._used[k - job.slots]))
            done = 0
            for group in job.group_bytes:
                if self._reads(step, way):
                    yield from self._copy_pieces(done, done + group)
                elif way is Way.HELD:
                    copies.issue(self._copy(group))
                done += group
                if job.decode_seconds:
                    copies.issue(self._decode(job.decode_seconds * group / total))
            self._filled[k] = copies.issue(self._wait(Gate(happened=True)))
            self._events.open(self._issued[k])

    def _copy_pieces(self, begin: int, end: int) -> Process:
        """These bytes of a block, when they have been read; the last copy of a piece gives its place back."""
        while begin < end:
            piece = self._pieces[0]
            yield piece.read
            until = min(piece.end, end)
            whole = until == piece.end
            self._copies.issue(self._copy(until - begin, gives_place=whole))
            if whole:
                self._pieces.popleft()
            begin = until

    def _issue_blocks(self) -> Process:
        """The thread that computes."""
        job, machine = self.job, self.machine
        for _ in range(max(1, job.slots)):
            self._submit()
        computed: deque[Gate] = deque(maxlen=2)
        k = 0
        for step in range(self.steps):
            yield machine.step_seconds
            for index, way in enumerate(job.ways):
                if len(computed) == 2:
                    yield computed[0]
                used, passes = Gate(), way is not Way.STAYS or job.decode_seconds > 0
                if passes:
                    yield self._issued[k]
                    self._compute.issue(self._wait(self._filled[k]))
                    used = self._used[k]
                    k += 1
                makes = (self.first and step == 0) or index < job.keeping.remade
                if not makes:
                    self._want_kept(index, computed)
                if job.link_seconds:
                    self._compute.issue(self._exchange())
                seconds = job.compute_seconds + makes * job.keeping.make_seconds
                computed.append(self._compute.issue(self._compute_block(used, seconds)))
                if makes and index in job.keeping.host:
                    self._copies.issue(self._wait(computed[-1]))
                    self._copies.issue(self._copy(job.keeping.nbytes))
                yield machine.issue_seconds * job.branches
                if passes:
                    self._submit()
            yield computed[-1]
            self._ends.append(self._events.now)

    def _want_kept(self, index: int, computed: Sequence[Gate]) -> None:
        """A block waits for what it made once; that of the next one follows it (`streaming/kept_tensors.py`)."""
        host = self.job.keeping.host
        if index in host:
            brought = self._brought.pop(index) if index in self._brought else self._bring(computed)
            self._compute.issue(self._wait(brought))
        following = next((other for other in host if other > index), None)
        if self.job.keeping.ahead and following is not None and following not in self._brought:
            self._brought[following] = self._bring(computed)

    def _bring(self, computed: Sequence[Gate]) -> Gate:
        """Into a buffer that the blocks before may use."""
        if computed:
            self._copies.issue(self._wait(computed[-1]))
        return self._copies.issue(self._copy(self.job.keeping.nbytes))

    def _submit(self) -> None:
        if self._next_fill < len(self._queue):
            self._events.open(self._submitted[self._next_fill])
            self._next_fill += 1


def step_seconds(job: Job, machine: Machine, *, steps: int = 5) -> float:
    """Seconds of a step among others: the mean of the last ones, as blocks fall into other places from step to step."""
    ends = Sampling(job, machine, steps=steps, first=False).run()[1:]
    return sum(ends) / len(ends)


def first_seconds(job: Job, machine: Machine) -> float:
    """Seconds of the first step of all: slots and ring are empty, and what host memory is to hold is read."""
    return Sampling(job, machine, steps=1, first=True).run()[0]


def machine_of(speeds: Speeds) -> Machine:
    """What `planning/rates.py` says of any machine, at these speeds."""
    return Machine(
        bus_bytes=speeds.bus_bytes,
        disk_bytes=speeds.disk_bytes,
        reader_bytes=READER_SHARE * speeds.disk_bytes,
        lock_bytes=LOCK_BYTES,
        decode_share=DECODE_SHARE,
        issue_seconds=ISSUE_SECONDS,
        step_seconds=STEP_SECONDS,
    )


def job_of(footprint: TransformerFootprint, plan: MemoryPlan, speeds: Speeds) -> Job:
    """What a plan makes the streamer do. A block is decoded in as many groups as its largest fits into."""
    groups = 1 if footprint.native else max(1, round(footprint.stored_bytes / footprint.staging_bytes))
    begins = [footprint.stored_bytes * group // groups for group in range(groups + 1)]
    return Job(
        ways=ways(footprint.blocks, streamed=plan.streamed, from_file=plan.from_file),
        group_bytes=[end - begin for begin, end in pairwise(begins)],
        decode_seconds=decode_seconds(footprint.decode_bytes, footprint.decode_launches, speeds),
        compute_seconds=footprint.step_flops(plan.request) / speeds.flops / footprint.all_blocks,
        branches=plan.request.branches,
        slots=max(1, plan.slots),
        ring_pieces=plan.ring,
        piece_bytes=min(PIECE_BYTES, footprint.stored_bytes),
        keeping=Keeping(
            footprint.kept_flops(plan.request) / speeds.flops / footprint.all_blocks,
            plan.kept.remade,
            plan.kept.block_bytes,
            plan.kept.host,
            plan.kept.ahead,
        ),
        link_seconds=link_seconds(footprint, plan.request),
    )
