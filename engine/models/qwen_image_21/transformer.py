"""Qwen-Image-2.1's transformer: what goes into its first block and comes out of its last."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...compute.linear_choice import DECODED, LinearChoice
from ...files.checkpoint import Checkpoint
from ...hardware import Hardware
from ...streaming import BlockSource, FileSource, OnBlock, StoredBlock
from ..streamed_transformer import StreamedTransformer
from .branch import Branch, BranchState, StretchState
from .costs import QwenImage21Footprint, kept_bytes
from .layers import Outside, Run, time_frequencies
from .network import QwenImage21Parts
from .positions import RotaryTables, runs_of
from .prefix import Prefix, Stretch
from .rotary_tables import Place, PlacedFactors
from .variants import Variant21, variant_of


class QwenImage21Transformer(StreamedTransformer[Branch, BranchState]):
    """Qwen-Image-2.1's transformer with its blocks in a BlockStore.

    Guarantees: a branch's result is bit-equal to that of the branch alone, wherever the blocks live; one pass visits
    each block once, whatever the number of branches; a prefix that several begin with runs through it once, and not
    again in later steps as far as its keys and values are kept (`load`), which changes no bit. A branch's answer is the
    velocity of its image, (1, N, 64).
    """

    footprint: QwenImage21Footprint
    outside: Outside

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        hardware: Hardware,
        others: Sequence[Hardware] = (),
        variant: Variant21 | None = None,
        source: Callable[[Sequence[StoredBlock]], BlockSource] = FileSource,
        linear: LinearChoice = DECODED,
    ) -> None:
        """Reads the weights outside the blocks (272 MB in bf16), and no block. `variant` None: as the file says.
        `source` makes the blocks' source.

        Raises what QwenImage21Parts does.
        """
        parts = QwenImage21Parts(
            checkpoint, dtype=dtype, hardware=hardware, others=others, source=source, linear=linear
        )
        super().__init__(checkpoint, parts, dtype=dtype, hardware=hardware)
        self.config = parts.config
        self.variant = variant_of(checkpoint, variant)
        self._rotary = PlacedFactors(RotaryTables(parts.config.rope_axes), hardware.device)
        self._frequencies: Tensor | None = None  # on the device, during a run

    def begin(self, branches: Sequence[Branch], on_block: OnBlock | None) -> list[BranchState]:
        """Raises InvalidRequest for prompts and images beyond the model's positions."""
        clocks = {timestep: self._clocks(timestep) for timestep in dict.fromkeys(b.timestep for b in branches)}
        modulation = next(iter(clocks.values()))[1][1:].unsqueeze(1) if clocks else None
        prefixes = [branch.prefix for branch in branches]
        stretches = self._stretches(prefixes, modulation)
        made = {s.key: s for prefix in prefixes for s in prefix.stretches if stretches[s.key].computed}
        self._rotary.bring([*map(_place_of_image, branches), *((s.pieces, s.start) for s in made.values())])
        return [self._begin(branch, *clocks[branch.timestep], stretches) for branch in branches]

    def _stretches(self, prefixes: Sequence[Prefix], modulation: Tensor | None) -> dict[str, StretchState]:
        """Of all prefixes, each once, by their keys. What is kept of them runs through no block."""
        kept, blocks, states = self.store.kept, self.config.layers, dict[str, StretchState]()
        every = {stretch.key: stretch for prefix in prefixes for stretch in prefix.stretches}
        dim, in_half = self.config.inner_dim, self.products_dtype != self.dtype
        sizes = {key: kept_bytes(s.tokens, dim, self.dtype.itemsize, in_half=in_half) for key, s in every.items()}
        wanted = kept.want({self._kept_key(key): nbytes for key, nbytes in sizes.items()})
        for prefix in prefixes:
            own: list[StretchState] = []
            for stretch in prefix.stretches:
                if stretch.key not in states:
                    key = self._kept_key(stretch.key)
                    missing = set(range(blocks)) - kept.blocks(key) if key in wanted else set(range(blocks))
                    assert modulation is not None
                    states[stretch.key] = StretchState(
                        modulation=modulation,
                        earlier=tuple(own),
                        begin=_Beginning(self, stretch),
                        kept=kept,
                        key=key if key in wanted else None,
                        computed=max(missing, default=-1) + 1,
                    )
                own.append(states[stretch.key])
        return states

    def _kept_key(self, key: str) -> str:
        """With what else keys and values depend on; what is of other weights, patches or kernels is forgotten."""
        return f"{self.dtype} {key}"

    def _begin(
        self, branch: Branch, embedding: Tensor, modulation: Tensor, stretches: dict[str, StretchState]
    ) -> BranchState:
        device, prefix = self.hardware.device, branch.prefix
        own = [stretches[stretch.key] for stretch in prefix.stretches]
        tokens = branch.tokens.shape[1]
        runs = [Run(0, tokens, prefix.tokens + tokens)]
        if prefix.seen is not None:
            seen = torch.cat([prefix.seen, prefix.seen.new_ones(1, tokens)], dim=1)
            runs = [Run(0, tokens, prefix.tokens + tokens, seen[:, None, None].to(device))]
        return BranchState(
            img=self.outside.img_in(branch.tokens),
            rotary=self._rotary.of(_place_of_image(branch)),
            modulation=modulation[:1].unsqueeze(1),
            embedding=embedding,
            runs=runs,
            stretches=own,
            prefix_tokens=prefix.tokens,
        )

    def leave_device(self) -> None:
        super().leave_device()
        self._rotary.leave_device()
        self._frequencies = None

    def finish(self, branch: Branch, state: BranchState) -> Tensor:
        return self.outside.velocity(state.img, state.embedding)

    def image_tokens(self, branch: Branch, state: BranchState) -> Tensor:
        return state.img

    def answer_of(self, branch: Branch, hidden: Tensor) -> Tensor:
        embedding, _ = self._clocks(branch.timestep)
        return self.outside.velocity(hidden, embedding)

    def _clocks(self, timestep: float) -> tuple[Tensor, Tensor]:
        """As `Outside.clocks`."""
        if self._frequencies is None:
            self._frequencies = time_frequencies().to(self.hardware.device)
        return self.outside.clocks(timestep, self._frequencies, self.dtype)

    def first_tokens(self, stretch: Stretch) -> tuple[Tensor, Tensor, list[Run]]:
        """What goes into the first block of a prefix: tokens (1, N, dim), their rotary factors, and what they see."""
        device, outside = self.hardware.device, self.outside
        rotary = self._rotary.of((stretch.pieces, stretch.start))
        runs = runs_of(stretch.pieces, stretch.before, stretch.seen, device)
        text = None if stretch.text is None else outside.txt_in(stretch.text.to(device, self.dtype))
        images = None if stretch.images is None else outside.img_in(stretch.images.to(device, self.dtype))
        if text is None or images is None:
            tokens = images if text is None else text
            assert tokens is not None
            return tokens, rotary, runs
        tokens = text.new_empty(1, stretch.tokens, text.shape[-1])
        taken = {True: 0, False: 0}
        for run, piece in zip(runs, stretch.pieces, strict=True):
            is_text = isinstance(piece, int)
            source, at = (text if is_text else images), taken[is_text]
            tokens[:, run.start : run.stop] = source[:, at : at + run.stop - run.start]
            taken[is_text] += run.stop - run.start
        return tokens, rotary, runs


def _place_of_image(branch: Branch) -> Place:
    return (branch.shape,), branch.prefix.end


class _Beginning:
    """A stretch at the first block, made when it is asked for."""

    def __init__(self, transformer: QwenImage21Transformer, stretch: Stretch) -> None:
        self._transformer, self._stretch = transformer, stretch

    def __call__(self) -> tuple[Tensor, Tensor, list[Run]]:
        return self._transformer.first_tokens(self._stretch)
