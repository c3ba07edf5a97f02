"""What a step loses where copies and reads cannot hide behind computing: by slots, and by the ring. Imports no torch.

A block may be brought into a slot when the block that was in it has been computed, and read ahead of that as far as the
ring has room.
"""

from dataclasses import dataclass

# pieces of the ring: the least, with which a disk is measured, and what a plan may choose among
RING_PIECES = 4
RINGS = (RING_PIECES, 5, 6, 8, 12, 16)


@dataclass(frozen=True)
class Passage:
    """What blocks pass through on their way to computing.

    passing: how many of `blocks` pass through slots in a step; streamed: how many of them are not on the device;
    from_file: how many of these are read. block_bytes: of one, as stored. piece_bytes: of one of the ring's pieces, 0
    where files are read straight into a slot.
    """

    blocks: int
    passing: int
    streamed: int
    from_file: int
    block_bytes: int
    slots: int
    ring: int = RING_PIECES
    piece_bytes: int = 0

    def disk_bytes(self, *, disk_bytes: float, bus_bytes: float) -> float:
        """Bytes per second that the ring takes from a disk of that rate: the disk needs RING_PIECES reads at a time,
        and a piece is no room for reading while it is copied."""
        if not self.piece_bytes:
            return disk_bytes
        return min(disk_bytes, self.ring / (RING_PIECES / disk_bytes + 1 / bus_bytes))

    def stalled_seconds(
        self, *, compute_seconds: float, bus_bytes: float, disk_bytes: float, decode_seconds: float = 0.0
    ) -> float:
        """Of a step's, in which computing stands still because blocks come late, though bus and disk may be idle at
        other times.

        bus_bytes, disk_bytes: per second; decode_seconds: of one block, on the way into its slot. More slots, a larger
        ring and more blocks in faster places never make it longer.
        """
        if not self.passing:
            return 0.0
        # from the end of what was in the slot to the beginning of the block
        hidden = max(0.0, (self.slots * self.blocks / self.passing - 1) * compute_seconds / self.blocks)
        copying = self.block_bytes / bus_bytes + decode_seconds
        reading = max(0, self.block_bytes - self.ring * self.piece_bytes) / disk_bytes
        from_ram = max(0.0, copying - hidden)
        from_file = max(0.0, max(copying, reading) - hidden)
        return (self.streamed - self.from_file) * from_ram + self.from_file * from_file
