"""The table of modulation: every block's scale, shift and gate vectors at every timestep of a run.

A third of the transformer's weights see nothing but the timestep embedding. Their outputs are computed in one pass
over those weights and kept in host memory; after that the weights are neither held nor read again.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..plan.memory import SPARE_ROWS
from ..streaming import BlockStore, BlockStreamer, Waits


@dataclass(frozen=True)
class ModulationRow:
    """One timestep's outputs of all blocks: `img` (blocks, rows, 6 * dim), `txt` (blocks, 1, 6 * dim).

    rows is 1, or 2 where the model modulates reference tokens as at timestep zero.
    """

    img: Tensor
    txt: Tensor

    def to(self, device: torch.device) -> "ModulationRow":
        return ModulationRow(self.img.to(device), self.txt.to(device))


class ModulationTable:
    """Rows by timestep, for one set of weights.

    Each timestep is embedded and projected in a call of its own, as a plain forward does it, on the compute device:
    rows are bit-equal to what the blocks would have computed.
    """

    def __init__(self, store: BlockStore, embed: Callable[[float], Tensor]) -> None:
        """`store` streams the modulation weights (img_mod, txt_mod per block); `embed` maps a timestep in 0..1 to its
        embedding (rows, dim) on the device."""
        self._store = store
        self._embed = embed
        self._rows: dict[float, ModulationRow] = {}
        self._announced: dict[float, None] = {}
        self._current: tuple[float, ModulationRow] | None = None
        self.waits = Waits()

    @property
    def fetched_bytes(self) -> int:
        """Bytes of modulation weights read so far."""
        return self._store.fetched_bytes

    @property
    def copied_bytes(self) -> int:
        """Bytes of modulation weights copied from host memory to the device so far."""
        return self._store.copied_bytes

    def knows(self, timesteps: Iterable[float]) -> bool:
        """Their rows are here: announcing them reads nothing."""
        return all(t in self._rows for t in timesteps)

    def announce(
        self, timesteps: Iterable[float], *, slots: int = 2, on_block: Callable[[int], None] | None = None
    ) -> None:
        """Compute the rows that are missing, in one pass over the weights; none where all are known.

        `on_block` is called before each block of the pass with its index, and may raise to end it.
        """
        self._announced = dict.fromkeys(timesteps)
        self._forget_all_but(self._announced)
        self._compute([t for t in self._announced if t not in self._rows], slots, on_block)

    def _compute(self, missing: list[float], slots: int, on_block: Callable[[int], None] | None) -> None:
        if not missing:
            return
        try:
            rows = self._project(missing, slots, on_block)
        finally:
            self._store.release()  # host buffers and files; the device's slots went with the streamer
        self._rows.update(zip(missing, rows, strict=True))

    def _project(self, missing: list[float], slots: int, on_block: Callable[[int], None] | None) -> list[ModulationRow]:
        embedded = [self._embed(t) for t in missing]
        rows: list[ModulationRow] = []
        with BlockStreamer(self._store, slots=slots) as streamer:
            for index, block in streamer.visit():
                if on_block is not None:
                    on_block(index)
                outputs = [(block.img_mod(temb), block.txt_mod(temb[:1])) for temb in embedded]
                if not rows:
                    rows = [ModulationRow(self._empty(img), self._empty(txt)) for img, txt in outputs]
                for row, (img, txt) in zip(rows, outputs, strict=True):
                    row.img[index].copy_(img)
                    row.txt[index].copy_(txt)
            self.waits += streamer.waits
        return rows

    def _empty(self, output: Tensor) -> Tensor:
        """Host memory for such an output of every block."""
        return torch.empty(len(self._store.blocks), *output.shape, dtype=output.dtype)

    def row(self, timestep: float, *, on_block: Callable[[int], None] | None = None) -> ModulationRow:
        """The row of `timestep` on the device. One that was not announced costs a pass over the weights."""
        if self._current is None or self._current[0] != timestep:
            if timestep not in self._rows:
                self._forget_all_but(self._announced)
                self._compute([timestep], 1, on_block)
            self._current = timestep, self._rows[timestep].to(self._store.hardware.device)
        return self._current[1]

    def forget(self) -> None:
        """Give back all rows: the next run reads the weights again."""
        self.leave_device()
        self._rows.clear()

    def leave_device(self) -> None:
        """Give back the row on the device; the rows stay in host memory."""
        self._current = None

    def _forget_all_but(self, wanted: dict[float, None]) -> None:
        spare = [t for t in self._rows if t not in wanted]
        for timestep in spare[: max(0, len(spare) - SPARE_ROWS)]:
            del self._rows[timestep]
