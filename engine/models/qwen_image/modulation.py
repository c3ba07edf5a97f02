"""The table of modulation: every block's scale, shift and gate vectors at every timestep of a run.

A third of the transformer's weights see nothing but the timestep embedding. Their outputs are computed in one pass
over those weights and kept in host memory; after that the weights are neither held nor read again.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...planning.draft import SPARE_ROWS
from ...streaming import BlockStore, HostBuffer, RowSlots, StreamedBlocks, VisitsBlocks

# a timestep in 0..1 and the index of the additional condition, 0 where the model has none
Moment = tuple[float, int]
OnBlock = Callable[[int], None]


@dataclass(frozen=True)
class ModulationRow:
    """One timestep's outputs of all blocks: `img` (blocks, rows, 6 * dim), `txt` (blocks, 1, 6 * dim).

    rows is 1, or 2 where the model modulates reference tokens as at timestep zero.
    """

    img: Tensor
    txt: Tensor
    _copies: "dict[torch.device, ModulationRow]" = field(default_factory=dict, compare=False, repr=False)

    def on(self, device: torch.device) -> "ModulationRow":
        """The same there; a copy is made once."""
        if device == self.img.device:
            return self
        if device not in self._copies:
            self._copies[device] = ModulationRow(self.img.to(device), self.txt.to(device))
        return self._copies[device]


@dataclass(frozen=True)
class _RowLayout:
    """How a row lies in bytes: all of `img`, then all of `txt`."""

    img: torch.Size
    txt: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, blocks: int, img: Tensor, txt: Tensor) -> "_RowLayout":
        """For such outputs of every block."""
        return cls(torch.Size((blocks, *img.shape)), torch.Size((blocks, *txt.shape)), img.dtype)

    @property
    def nbytes(self) -> int:
        return (self.img.numel() + self.txt.numel()) * self.dtype.itemsize

    def views(self, data: Tensor) -> ModulationRow:
        numbers = data.view(self.dtype)
        img, txt = numbers.split([self.img.numel(), self.txt.numel()])
        return ModulationRow(img.view(self.img), txt.view(self.txt))


class ModulationTable(VisitsBlocks):
    """Rows by timestep and additional condition, for one set of weights.

    Each timestep is embedded and projected in a call of its own, as a plain forward does it, on the compute device:
    rows are bit-equal to what the blocks would have computed. The host waits for the device once a pass, at its end;
    while a row is used, the next announced one is brought to the device.
    """

    def __init__(self, store: BlockStore, embed: Callable[[float, int], Tensor], *, slot_bytes: int = 0) -> None:
        """`store` streams the modulation weights (img_mod, txt_mod per block); `embed` maps a timestep in 0..1 and the
        index of the additional condition to their embedding (rows, dim) on the device. `slot_bytes`: of the blocks that
        come after an announcement, one of which is to have the memory that it was computed in."""
        self._store = store
        self._blocks = StreamedBlocks(store)
        self._embed = embed
        self._slot_bytes = slot_bytes
        self._rows: dict[Moment, HostBuffer] = {}
        self._layout: _RowLayout | None = None
        self._announced: dict[Moment, Moment | None] = {}  # with what comes after each
        self._on_device = RowSlots(store.order, store.hardware)

    def knows(self, timesteps: Iterable[float]) -> bool:
        """Their rows are here: announcing them reads nothing."""
        return all((t, 0) in self._rows for t in timesteps)

    def announce(self, timesteps: Iterable[float], *, slots: int = 2, on_block: OnBlock | None = None) -> None:
        """Compute the rows that are missing, of additional condition 0, in one pass over the weights; none where all
        are known. They will be asked for in this order.

        `on_block` is called before each block of the pass with its index, and may raise to end it.
        """
        self.leave_device()  # rows that are forgotten may be on their way there
        moments = list(dict.fromkeys((t, 0) for t in timesteps))
        self._announced = dict(zip(moments, [*moments[1:], None], strict=True))
        self._forget_others(SPARE_ROWS)
        missing = [moment for moment in moments if moment not in self._rows]
        self._compute(missing, slots, on_block, self._slot_bytes)

    def row(self, timestep: float, additional_t_cond: int = 0, *, on_block: OnBlock | None = None) -> ModulationRow:
        """The row of one moment, as `rows` has it."""
        moment = timestep, additional_t_cond
        return self.rows([moment], on_block=on_block)[moment]

    def rows(self, moments: Iterable[Moment], *, on_block: OnBlock | None = None) -> dict[Moment, ModulationRow]:
        """The rows of these moments on the device, for one pass. Those that were not announced cost a pass over the
        weights, all together."""
        wanted = list(dict.fromkeys(moments))
        missing = [moment for moment in wanted if moment not in self._rows]
        if missing:
            self.leave_device()
            self._forget_others(max(0, SPARE_ROWS - len(missing)), wanted)
            self._compute(missing, 1, on_block)
        following = next((after for m in wanted if (after := self._announced.get(m)) is not None), None)
        ahead = None if following is None else self._rows[following]
        brought = self._on_device.bring([self._rows[moment] for moment in wanted], ahead)
        assert self._layout is not None
        return {moment: self._layout.views(data) for moment, data in zip(wanted, brought, strict=True)}

    def forget(self) -> None:
        """Give back all rows: the next run reads the weights again."""
        self.leave_device()
        self._rows.clear()

    def leave_device(self) -> None:
        """Give back the rows on the device; they stay in host memory."""
        self._on_device.leave_device()

    def _compute(
        self,
        missing: Sequence[Moment],
        slots: int,
        on_block: OnBlock | None,
        together_bytes: int | None = None,
    ) -> None:
        if not missing:
            return
        rows: list[HostBuffer] = []
        embedded = [self._embed(*moment) for moment in missing]
        done = self._store.order.mark()
        try:
            with self._blocks.visit(slots, on_block, together_bytes=together_bytes) as blocks:
                for index, block in blocks:
                    for i, temb in enumerate(embedded):
                        img, txt = block.img_mod(temb), block.txt_mod(temb[:1])
                        if not index:
                            rows.append(self._new_row(img, txt))
                        self._keep(rows[i], index, img, txt)
        finally:
            # nobody may read rows that the device still writes, and nobody else have their memory
            self._store.order.record_compute(done)
            self._store.order.host_waits(done)
        self._rows.update(zip(missing, rows, strict=True))

    def _new_row(self, img: Tensor, txt: Tensor) -> HostBuffer:
        """Host memory for a moment's outputs of every block."""
        self._layout = self._layout or _RowLayout.of(len(self._blocks), img, txt)
        return self._store.take_host_memory(self._layout.nbytes)

    def _keep(self, row: HostBuffer, index: int, img: Tensor, txt: Tensor) -> None:
        assert self._layout is not None
        views = self._layout.views(row.data)
        views.img[index].copy_(img, non_blocking=row.pinned)
        views.txt[index].copy_(txt, non_blocking=row.pinned)

    def _forget_others(self, most: int, wanted: Sequence[Moment] = ()) -> None:
        """Keep so many rows beside those that are announced or wanted. Nothing of the device's reads them."""
        spare = [moment for moment in self._rows if moment not in self._announced and moment not in wanted]
        for moment in spare[: max(0, len(spare) - most)]:
            del self._rows[moment]
