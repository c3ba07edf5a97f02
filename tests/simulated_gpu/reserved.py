"""What torch keeps of a card's memory: segments from the driver, cut up, put together again, and never returned.

By the rules of torch's CUDACachingAllocator (c10/cuda) with its default settings. Sizes and places only, no bytes.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass

MIB = 1024**2
ROUND_BYTES = 512
SMALL_BYTES = MIB  # requests up to here have a pool of their own
SMALL_SEGMENT_BYTES = 2 * MIB
OWN_SEGMENT_BYTES = 10 * MIB  # from here on a new segment is as large as what is asked for
MIDDLE_SEGMENT_BYTES = 20 * MIB
SEGMENT_ROUND_BYTES = 2 * MIB

Pool = tuple[str, bool]  # of a stream, and whether it is that of small requests


@dataclass(eq=False)
class Piece:
    """Of a segment: in use, or free in its pool."""

    pool: Pool
    address: int
    nbytes: int
    free: bool = False
    before: "Piece | None" = None
    after: "Piece | None" = None

    @property
    def place(self) -> tuple[int, int]:
        """In the order in which pieces are chosen."""
        return self.nbytes, self.address


class Reserved:
    """Of all cards together. `scale`: so many bytes are meant by each that is asked for."""

    def __init__(self, scale: int = 1) -> None:
        self.nbytes = 0
        self.allocated_bytes = self.peak_allocated_bytes = 0
        self._scale = scale
        self._end = 0
        self._free: dict[Pool, list[Piece]] = defaultdict(list)  # by their places

    def take(self, nbytes: int, stream: str) -> Piece:
        """The smallest free piece that is large enough; where the stream has none, one of a new segment."""
        wanted = _rounded(max(1, nbytes * self._scale), ROUND_BYTES)
        pool = stream, wanted <= SMALL_BYTES
        free = self._free[pool]
        at = bisect_left(free, (wanted, 0), key=lambda piece: piece.place)
        piece = free.pop(at) if at < len(free) else self._new_segment(pool, wanted)
        piece.free = False
        self._cut(piece, wanted)
        self.allocated_bytes += piece.nbytes
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return piece

    def give_back(self, piece: Piece) -> None:
        """Free neighbours are one piece with it again."""
        self.allocated_bytes -= piece.nbytes
        if piece.before is not None and piece.before.free:
            self._forget(piece.before)
            piece = _joined(piece.before, piece)
        if piece.after is not None and piece.after.free:
            self._forget(piece.after)
            piece = _joined(piece, piece.after)
        self._keep(piece)

    def _new_segment(self, pool: Pool, wanted: int) -> Piece:
        if wanted <= SMALL_BYTES:
            nbytes = SMALL_SEGMENT_BYTES
        elif wanted < OWN_SEGMENT_BYTES:
            nbytes = MIDDLE_SEGMENT_BYTES
        else:
            nbytes = _rounded(wanted, SEGMENT_ROUND_BYTES)
        address, self._end = self._end, self._end + nbytes
        self.nbytes += nbytes
        return Piece(pool, address, nbytes)

    def _cut(self, piece: Piece, wanted: int) -> None:
        """What is left of a piece is free, unless it is too little."""
        left, (_, small) = piece.nbytes - wanted, piece.pool
        if left < ROUND_BYTES or (not small and left <= SMALL_BYTES):
            return
        rest = Piece(piece.pool, piece.address + wanted, left, before=piece, after=piece.after)
        if rest.after is not None:
            rest.after.before = rest
        piece.nbytes, piece.after = wanted, rest
        self._keep(rest)

    def _keep(self, piece: Piece) -> None:
        piece.free = True
        insort(self._free[piece.pool], piece, key=lambda piece: piece.place)

    def _forget(self, piece: Piece) -> None:
        free = self._free[piece.pool]
        del free[bisect_left(free, piece.place, key=lambda piece: piece.place)]


def _joined(first: Piece, second: Piece) -> Piece:
    """Of the same segment, one behind the other."""
    first.nbytes += second.nbytes
    first.after = second.after
    if first.after is not None:
        first.after.before = first
    return first


def _rounded(nbytes: int, to: int) -> int:
    return -(-nbytes // to) * to
