"""How far reading, copying and computing hide behind each other in a step, block by block. Numbers in, seconds out;
imports no torch."""

from collections import deque
from dataclasses import dataclass
from enum import Enum
from functools import cache, lru_cache
from math import floor, inf

from .spread import spread_order

# of file bytes on their way through host memory: as many pieces as a disk wants reads, at the least; and each as large
# as its full speed takes, at the most
RING_PIECES = 4
PIECE_BYTES = 32 * 1024**2
# passes that are followed; the first block of the first one is there when it begins
PASSES = 3


class Way(Enum):
    """How a block comes to be computed with."""

    STAYS = "stays on the device"
    HELD = "is copied from host memory"
    READ = "is read from the file"


@dataclass(frozen=True)
class BlockSeconds:
    """What one block takes: to be computed with, copied to the device, read from its file; to be decoded there, and
    what computing with another one loses meanwhile; to be locked in host memory, where it is kept."""

    compute: float
    copy: float
    read: float
    decode: float = 0.0
    lost: float = 0.0
    lock: float = 0.0


@cache
def ways(blocks: int, *, streamed: int, from_file: int) -> tuple[Way, ...]:
    """Of each block: those that stay, then those that are held, are the first ones of `spread_order`."""
    found, order = [Way.READ] * blocks, spread_order(blocks)
    for index in order[: blocks - from_file]:
        found[index] = Way.HELD
    for index in order[: blocks - streamed]:
        found[index] = Way.STAYS
    return tuple(found)


@lru_cache(4096)
def pass_seconds(
    blocks: int,
    one: BlockSeconds,
    *,
    streamed: int,
    from_file: int,
    slots: int,
    ring_blocks: float,
    piece_blocks: float,
    between: float = 0.0,
    first: bool = False,
) -> float:
    """Seconds of a pass over all blocks, among others that follow after `between` seconds; or of the `first` one, which
    begins with empty slots and reads what host memory is to hold.

    A copy waits for the last use of its slot, and for what it copies; decoding follows it. ring_blocks: what is read
    ahead of the copies; piece_blocks: what has to be there to be copied; in blocks. Less to read, to copy, to decode or
    to wait for is never slower.
    """
    computed = copied = read = locked = 0.0
    used = deque([0.0] * max(1, slots), maxlen=max(1, slots))
    ahead = floor(ring_blocks) + 1
    begun = deque([-inf] * ahead, maxlen=ahead)  # long ago
    brought = one.copy + one.decode
    there = not first
    passes = 1 if first else PASSES
    for _ in range(passes):
        for way in ways(blocks, streamed=streamed, from_file=from_file):
            if way is Way.STAYS and not one.decode:
                computed += one.compute
                continue
            begin = max(copied, used[0])
            if there:
                there = False
            elif way is Way.STAYS:
                copied = begin + one.decode
            elif way is Way.HELD and not first:
                copied = begin + brought
            else:
                begun.append(begin)
                if way is Way.HELD:  # its pages are locked while what comes before it is read
                    locked += one.lock
                    read = max(read, locked)
                # the ring is full from the middle of an earlier block on, until its copy has come that far
                room = begun[0] + (ahead - ring_blocks) * max(one.read, brought)
                read = max(read + one.read, room)
                copied = max(begin + brought, read + min(1.0, piece_blocks) * brought)
            computed = max(computed, copied) + one.compute + (one.lost if slots > 1 else 0.0)
            used.append(computed)
        computed += between
    return computed / passes
