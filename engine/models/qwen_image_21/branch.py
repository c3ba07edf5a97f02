"""One prompt for one image, and what goes through the blocks of it: the prefix, then the image behind it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...streaming import KeptTensors
from .layers import Block, KeysValues, Run
from .positions import Shape
from .prefix import Prefix


@dataclass(frozen=True, eq=False)
class Branch:
    """One forward pass. tokens: normalised latents of the image (1, height * width, 64) of `shape` (height, width).
    timestep: sigma, 0..1."""

    tokens: Tensor
    shape: Shape
    prefix: Prefix
    timestep: float


@dataclass
class StretchState:
    """A part of a prefix on its way through the blocks; shared by all branches that begin with it.

    begin: its tokens, their rotary factors and what they see, for the first block. computed: how many blocks it runs
    through; its keys and values of those behind them are kept, under `key`. key: None where none may be.
    """

    modulation: Tensor  # (1, 1, 4 * dim), of timestep 0
    earlier: Sequence["StretchState"]
    begin: Callable[[], tuple[Tensor, Tensor, list[Run]]]
    kept: KeptTensors
    key: str | None
    computed: int
    _tokens: tuple[Tensor, Tensor, list[Run]] | None = None
    _block: int = -1
    _own: KeysValues | None = None

    @property
    def keys_values(self) -> KeysValues:
        """Of the block that it was in last."""
        assert self._own is not None
        return self._own

    def move(self, device: torch.device) -> None:
        self.modulation = self.modulation.to(device)
        if self._tokens is not None:
            hidden, rotary, runs = self._tokens
            self._tokens = hidden.to(device), rotary.to(device), [run.to(device) for run in runs]

    def run(self, index: int, block: Block) -> None:
        """Through block `index`, once, however many branches ask."""
        if self._block == index:
            return
        for stretch in self.earlier:
            stretch.run(index, block)
        self._own = None  # before the next are made
        self._own = self._compute(index, block) if index < self.computed else self._fetch(index)
        self._block = index

    def _compute(self, index: int, block: Block) -> KeysValues:
        hidden, rotary, runs = self._tokens if self._tokens is not None else self.begin()
        self._tokens = None
        self.kept.made_tokens += hidden.shape[1]
        if index == self.computed - 1:  # nobody asks for more
            own = block.keys_values(hidden, self.modulation, rotary)
        else:
            before = [stretch.keys_values for stretch in self.earlier]
            hidden, own = block.with_keys_values(hidden, self.modulation, rotary, runs, before)
            self._tokens = hidden, rotary, runs
        if self.key is not None:
            self.kept.put(self.key, index, own)
        return own

    def _fetch(self, index: int) -> KeysValues:
        assert self.key is not None
        device = self.modulation.device
        return tuple(tensor.to(device) for tensor in self.kept.get(self.key, index))


@dataclass
class BranchState:
    """What a branch carries from block to block. embedding: (2, dim) of its timestep, and of 0."""

    img: Tensor  # (1, N, dim)
    rotary: Tensor
    modulation: Tensor  # (1, 1, 4 * dim)
    embedding: Tensor
    runs: list[Run]
    stretches: Sequence[StretchState]
    prefix_tokens: int

    @property
    def tokens(self) -> int:
        """Of prefix and image together."""
        return self.prefix_tokens + self.img.shape[1]

    def move(self, device: torch.device) -> None:
        self.img, self.rotary = self.img.to(device), self.rotary.to(device)
        self.modulation, self.embedding = self.modulation.to(device), self.embedding.to(device)
        self.runs = [run.to(device) for run in self.runs]
        for stretch in self.stretches:
            stretch.move(device)

    def run(self, index: int, block: Block) -> None:
        for stretch in self.stretches:
            stretch.run(index, block)
        before = [stretch.keys_values for stretch in self.stretches]
        self.img = block(self.img, self.modulation, self.rotary, self.runs, before)

    def add_residuals(self, index: int) -> None:
        """There are none: no ControlNet hands them to this network's blocks."""
