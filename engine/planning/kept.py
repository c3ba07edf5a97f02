"""Where what blocks make once is kept for later steps: on the device, in host memory, or nowhere. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..texts import size_text
from .spread import spread_order


@dataclass(frozen=True)
class KeptTiers:
    """Of a model's `blocks`, `remade` at its beginning make theirs anew at every step; the others' lies on the device
    (`on_device` of them) and in host memory. block_bytes: of each. spare_bytes: of host memory, where what lies on the
    device goes when the device is needed for something else. ahead: what lies in host memory is brought while the block
    before it computes, which takes a second buffer; the first is where a block made it.

    Only the beginning can be made anew by itself: what goes into a block comes from the one before.
    """

    blocks: int = 0
    remade: int = 0
    on_device: int = 0
    block_bytes: int = 0
    spare_bytes: int = 0
    ahead: bool = True

    @property
    def in_host(self) -> int:
        return self.blocks - self.remade - self.on_device

    @property
    def kept_bytes(self) -> int:
        """Of all that are kept, wherever."""
        return (self.blocks - self.remade) * self.block_bytes

    @property
    def device(self) -> tuple[int, ...]:
        """Spread among those that are kept, so that copies of the others have computing to hide behind."""
        order = spread_order(self.blocks - self.remade) if self.blocks > self.remade else ()
        return tuple(sorted(self.remade + i for i in order[: self.on_device]))

    @property
    def host(self) -> tuple[int, ...]:
        return tuple(sorted(set(range(self.remade, self.blocks)) - set(self.device)))

    @property
    def device_bytes(self) -> int:
        """With the second buffer that those in host memory pass through."""
        return (self.on_device + (self.ahead and self.in_host > 1)) * self.block_bytes

    @property
    def host_bytes(self) -> int:
        return self.in_host * self.block_bytes + self.spare_bytes

    def __str__(self) -> str:
        if not self.block_bytes:
            return ""
        parts = [f"{self.on_device} blocks on the device", f"for {self.in_host} in RAM"]
        slowly = ", brought while nothing computes" if self.in_host and not self.ahead else ""
        again = f", {self.remade} made anew at every step" if self.remade else ""
        return f"prompt and references kept for {' and '.join(parts)}{slowly}{again} ({size_text(self.kept_bytes)})"


NOTHING_KEPT = KeptTiers()


def choices(blocks: int, block_bytes: int, device_bytes: int, host_bytes: int | None) -> Iterator[KeptTiers]:
    """What can be tried, of so much memory at the most: a plan for each tells which is the fastest.

    host_bytes None: the device is the host, and has no other memory.
    """
    if not block_bytes:
        yield NOTHING_KEPT
        return
    fits = min(blocks, max(0, device_bytes) // block_bytes)
    in_host = 0 if host_bytes is None else min(blocks, max(0, host_bytes) // block_bytes)
    tried = set()
    for host in (in_host, 0):
        for device in (0, blocks - host, fits):
            on_device = min(device, fits)
            tried.add((on_device, min(host, blocks - on_device)))
    for on_device, host in sorted(tried):
        tiers = KeptTiers(blocks, blocks - on_device - host, on_device, block_bytes)
        yield tiers
        if host > 1:
            yield replace(tiers, ahead=False)
