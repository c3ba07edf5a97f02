"""The table of modulation: every block's scale, shift and gate vectors at every timestep of a run.

A third of the transformer's weights see nothing but the timestep embedding. Their outputs are computed in one pass
over those weights and kept in host memory; after that the weights are neither held nor read again.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...planning.memory import SPARE_ROWS
from ...streaming import BlockStore, StreamedBlocks, VisitsBlocks

# a timestep in 0..1 and the index of the additional condition, 0 where the model has none
Moment = tuple[float, int]


@dataclass(frozen=True)
class ModulationRow:
    """One timestep's outputs of all blocks: `img` (blocks, rows, 6 * dim), `txt` (blocks, 1, 6 * dim).

    rows is 1, or 2 where the model modulates reference tokens as at timestep zero.
    """

    img: Tensor
    txt: Tensor

    def to(self, device: torch.device) -> "ModulationRow":
        return ModulationRow(self.img.to(device), self.txt.to(device))


class ModulationTable(VisitsBlocks):
    """Rows by timestep and additional condition, for one set of weights.

    Each timestep is embedded and projected in a call of its own, as a plain forward does it, on the compute device:
    rows are bit-equal to what the blocks would have computed.
    """

    def __init__(self, store: BlockStore, embed: Callable[[float, int], Tensor]) -> None:
        """`store` streams the modulation weights (img_mod, txt_mod per block); `embed` maps a timestep in 0..1 and the
        index of the additional condition to their embedding (rows, dim) on the device."""
        self._blocks = StreamedBlocks(store)
        self._embed = embed
        self._rows: dict[Moment, ModulationRow] = {}
        self._announced: dict[Moment, None] = {}
        self._current: tuple[Moment, ModulationRow] | None = None

    def knows(self, timesteps: Iterable[float]) -> bool:
        """Their rows are here: announcing them reads nothing."""
        return all((t, 0) in self._rows for t in timesteps)

    def announce(
        self, timesteps: Iterable[float], *, slots: int = 2, on_block: Callable[[int], None] | None = None
    ) -> None:
        """Compute the rows that are missing, of additional condition 0, in one pass over the weights; none where all
        are known.

        `on_block` is called before each block of the pass with its index, and may raise to end it.
        """
        self._announced = dict.fromkeys((t, 0) for t in timesteps)
        self._forget_all_but(self._announced)
        self._compute([moment for moment in self._announced if moment not in self._rows], slots, on_block)

    def _compute(self, missing: list[Moment], slots: int, on_block: Callable[[int], None] | None) -> None:
        if not missing:
            return
        rows = self._project(missing, slots, on_block)
        self._rows.update(zip(missing, rows, strict=True))

    def _project(
        self, missing: list[Moment], slots: int, on_block: Callable[[int], None] | None
    ) -> list[ModulationRow]:
        embedded = [self._embed(*moment) for moment in missing]
        rows: list[ModulationRow] = []
        with self._blocks.visit(slots, on_block) as blocks:
            for index, block in blocks:
                outputs = [(block.img_mod(temb), block.txt_mod(temb[:1])) for temb in embedded]
                if not rows:
                    rows = [ModulationRow(self._empty(img), self._empty(txt)) for img, txt in outputs]
                for row, (img, txt) in zip(rows, outputs, strict=True):
                    row.img[index].copy_(img)
                    row.txt[index].copy_(txt)
        return rows

    def _empty(self, output: Tensor) -> Tensor:
        """Host memory for such an output of every block."""
        return torch.empty(len(self._blocks), *output.shape, dtype=output.dtype)

    def row(
        self, timestep: float, additional_t_cond: int = 0, *, on_block: Callable[[int], None] | None = None
    ) -> ModulationRow:
        """The row of a moment on the device. One that was not announced costs a pass over the weights."""
        moment = timestep, additional_t_cond
        if self._current is None or self._current[0] != moment:
            if moment not in self._rows:
                self._forget_all_but(self._announced)
                self._compute([moment], 1, on_block)
            self._current = moment, self._rows[moment].to(self._blocks.device)
        return self._current[1]

    def forget(self) -> None:
        """Give back all rows: the next run reads the weights again."""
        self.leave_device()
        self._rows.clear()

    def leave_device(self) -> None:
        """Give back the row on the device; the rows stay in host memory."""
        self._current = None

    def _forget_all_but(self, wanted: dict[Moment, None]) -> None:
        spare = [moment for moment in self._rows if moment not in wanted]
        for moment in spare[: max(0, len(spare) - SPARE_ROWS)]:
            del self._rows[moment]
