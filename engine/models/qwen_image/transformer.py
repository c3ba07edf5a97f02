"""Qwen-Image's transformer: what goes into its first block and comes out of its last, by diffusers' own modules."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...compute.context_parallel import Ranks, part_of
from ...compute.linear_choice import DECODED, LinearChoice
from ...errors import InvalidRequest, Unsupported
from ...files.checkpoint import Checkpoint
from ...hardware import Hardware
from ...streaming import BlockSource, FileSource, OnBlock, StoredBlock
from ..streamed_transformer import StreamedTransformer
from .block_hooks import BlockHook, run_hooked
from .branch import Branch, BranchState
from .costs import QwenImageFootprint
from .modulation import ModulationRow, ModulationTable
from .network import QwenImageParts
from .positions import Place, Positions, Shape, branch_tables
from .rotary_tables import RotaryTables
from .tensors import TransformerConfig
from .variants import Variant

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel


class TimestepRounding(Enum):
    """How a timestep reaches the embedding. FP32 is exact; DIFFUSERS rounds as its pipelines do, twice."""

    FP32 = "fp32"
    DIFFUSERS = "diffusers"


class QwenImageTransformer(StreamedTransformer[Branch, BranchState]):
    """Qwen-Image's transformer with its blocks in a BlockStore.

    Guarantees: a branch's result is bit-equal to diffusers' forward pass of that branch alone, wherever the blocks
    live (with ComfyUI's positions: to that with those rotary tables); one pass visits each block once, whatever the
    number of branches. A branch's answer is the velocity of its image, (1, N of the image, 64).
    """

    footprint: QwenImageFootprint
    outside: "QwenImageTransformer2DModel"
    modulation: ModulationTable

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        hardware: Hardware,
        others: Sequence[Hardware] = (),
        rounding: TimestepRounding = TimestepRounding.FP32,
        positions: Positions = Positions.DIFFUSERS,
        variant: Variant | None = None,
        source: Callable[[Sequence[StoredBlock]], BlockSource] = FileSource,
        linear: LinearChoice = DECODED,
        ranks: Ranks | None = None,
    ) -> None:
        """Reads the weights outside the blocks (81 MB in bf16), and no block. `source` makes the blocks' source.
        `variant` None: as the file says. `ranks`: this process has a part of each branch's tokens, and answers whole.

        Raises what QwenImageParts does.
        """
        parts = QwenImageParts(
            checkpoint,
            dtype=dtype,
            hardware=hardware,
            others=others,
            variant=variant,
            source=source,
            linear=linear,
        )
        super().__init__(checkpoint, parts, dtype=dtype, hardware=hardware)
        self.config = parts.config
        self.variant = parts.variant
        self.positions = positions
        self.ranks = ranks
        self._embed = _TimestepEmbedding(self.outside, hardware.device, self.dtype, rounding, self.config)
        assert parts.modulation_store is not None
        self.modulation = ModulationTable(parts.modulation_store, self._embed, slot_bytes=parts.store.slot_bytes)
        layered, embed = self.config.use_layer3d_rope, self.outside.pos_embed

        def tables(shapes: Sequence[Shape], places: Sequence[Place], length: int) -> list[Tensor]:
            whole = branch_tables(embed, shapes, places, length, positions, layered=layered)
            return [part_of(ranks, table, 0) for table in whole]

        self._rotary = RotaryTables(tables, hardware.device)

    def embedding(self, timestep: float, additional_t_cond: int = 0) -> Tensor:
        """The timestep's embedding (rows, inner_dim) on the device."""
        return self._embed(timestep, additional_t_cond)

    def changes_modulation(self, weight: str) -> bool:
        return "_mod." in weight or "time_text_embed." in weight

    def run_hooked(self, states: Sequence[BranchState], hook: BlockHook, index: int, block: nn.Module) -> None:
        if self.ranks is not None:
            super().run_hooked(states, hook, index, block)  # refuses
        run_hooked(states, hook, index, block)

    def begin(self, branches: Sequence[Branch], on_block: OnBlock | None) -> list[BranchState]:
        """Raises what `branch_tables` does, and where several processes cannot compute a branch."""
        for branch in branches:
            _require_parts(branch, self.ranks)
        rows = self.modulation.rows([branch.moment for branch in branches], on_block=on_block)
        rotary = self._rotary.of(branches)
        return [
            self._begin(branch, rows[branch.moment], tables) for branch, tables in zip(branches, rotary, strict=True)
        ]

    def leave_device(self) -> None:
        super().leave_device()
        self._rotary.leave_device()

    def _begin(self, branch: Branch, row: ModulationRow, rotary: tuple[Tensor, Tensor]) -> BranchState:
        outside, device = self.outside, self.hardware.device
        index = None
        if outside.zero_cond_t:
            tokens = [h * w * f for f, h, w in branch.shapes]
            index = torch.zeros(1, sum(tokens), dtype=torch.int, device=device)
            if branch.references_at_zero:
                index[:, tokens[0] :] = 1
            index = part_of(self.ranks, index)
        return BranchState(
            img=outside.img_in(part_of(self.ranks, branch.tokens)),
            txt=outside.txt_in(outside.txt_norm(part_of(self.ranks, branch.prompt_embeds))),
            mask=branch.prompt_mask,
            temb=self.embedding(*branch.moment),
            rotary=rotary,
            modulate_index=index,
            row=row,
            residuals=branch.residuals,
            ranks=self.ranks,
        )

    def finish(self, branch: Branch, state: BranchState) -> Tensor:
        return self._whole(self._velocity(state.img, state.temb), branch)[:, : branch.image_tokens]

    def image_tokens(self, branch: Branch, state: BranchState) -> Tensor:
        img = self._whole(state.img, branch)
        return img if img.shape[1] == branch.image_tokens else img[:, : branch.image_tokens].clone()

    def _whole(self, part: Tensor, branch: Branch) -> Tensor:
        """Of the images' tokens that this process has those that all have."""
        return part if self.ranks is None else self.ranks.whole(part, branch.tokens.shape[1])

    def answer_of(self, branch: Branch, hidden: Tensor) -> Tensor:
        return self._velocity(hidden, self.embedding(*branch.moment))

    def _velocity(self, hidden: Tensor, temb: Tensor) -> Tensor:
        velocity: Tensor = self.outside.proj_out(self.outside.norm_out(hidden, temb[:1]))
        return velocity


def _require_parts(branch: Branch, ranks: Ranks | None) -> None:
    """Raise where the branch has something that is not split, or too few tokens for each process to have one."""
    if ranks is None:
        return
    if branch.prompt_mask is not None or branch.residuals:
        raise Unsupported(
            "Masked prompts and ControlNets are not computed by several processes.\n\nWhat to do: start one.",
            code="ranks.not_split",
        )
    tokens = min(branch.tokens.shape[1], branch.prompt_embeds.shape[1])
    if tokens < ranks.count:
        raise InvalidRequest(
            "A prompt or an image of {tokens} tokens cannot be shared by {ranks} processes.\n\nWhat to do: use a "
            "longer prompt (with cfg 1, no negative prompt is needed), or fewer processes.",
            code="ranks.too_few_tokens",
            tokens=tokens,
            ranks=ranks.count,
        )


@dataclass(frozen=True)
class _TimestepEmbedding:
    """Timestep -> embedding (rows, inner_dim). Not a method of the transformer, to which its table would refer."""

    outside: "QwenImageTransformer2DModel"
    device: torch.device
    dtype: torch.dtype
    rounding: TimestepRounding
    config: TransformerConfig

    @torch.no_grad()
    def __call__(self, timestep: float, additional_t_cond: int) -> Tensor:
        value = torch.full((1,), timestep, dtype=torch.float32, device=self.device)
        if self.rounding is TimestepRounding.DIFFUSERS:
            value = (value * 1000).to(self.dtype) / 1000
        if self.config.zero_cond_t:
            value = torch.cat([value, value * 0])
        like = torch.empty((), dtype=self.dtype, device=self.device)
        condition = None
        if self.config.use_additional_t_cond:
            condition = torch.full((1,), additional_t_cond, dtype=torch.long, device=self.device)
        embedding: Tensor = self.outside.time_text_embed(value, like, condition)
        return embedding
