"""The transformer: prologue, `for block: for branch`, epilogue, around diffusers' own modules. Does not sample."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...compute.interruption import interruptible
from ...files.checkpoint import Checkpoint
from ...hardware import Hardware
from ...planning.footprint import TransformerFootprint
from ...planning.memory import Annex, spread_order
from ...streaming import BlockSource, BlockStreamer, FileSource, StoredBlock, Waits, WeightPatch, bind
from .block_hooks import Hooked, run_hooked
from .branch import Branch, BranchState
from .modulation import ModulationRow, ModulationTable
from .positions import Positions, branch_tables
from .tensors import TransformerConfig
from .transformer_parts import BLOCKS, TransformerParts
from .variants import Variant

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel

OnBlock = Callable[[int], None]


class TimestepRounding(Enum):
    """How a timestep reaches the embedding. FP32 is exact; DIFFUSERS rounds as its pipelines do, twice."""

    FP32 = "fp32"
    DIFFUSERS = "diffusers"


class QwenImageTransformer:
    """Qwen-Image's transformer with its blocks in a BlockStore.

    Guarantees: a branch's result is bit-equal to diffusers' forward pass of that branch alone, wherever the blocks
    live (with ComfyUI's positions: to that with those rotary tables); one pass visits each block once, whatever the
    number of branches. Weights are in no `nn.Module` that others see: nothing but the methods here moves them.
    """

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
    ) -> None:
        """Reads the weights outside the blocks (81 MB in bf16), and no block. `source` makes the blocks' source.
        `variant` None: as the file says.

        Raises what TransformerParts does.
        """
        parts = TransformerParts(
            checkpoint, dtype=dtype, hardware=hardware, others=others, variant=variant, source=source
        )
        self.config = parts.config
        self.variant = parts.variant
        self.positions = positions
        self.dtype = dtype
        self.hardware = hardware
        self.file = checkpoint.largest_file
        self._loaded = False
        self._outside = parts.empty_model()
        self._outside.load_state_dict(parts.read_outside(), assign=True)
        checkpoint.require_unchanged()  # what was read of it belongs together
        self.store = parts.store
        self.annexes = {str(other.device): store for other, store in zip(others, parts.annex_stores, strict=True)}
        self._embed = _TimestepEmbedding(self._outside, hardware.device, self.dtype, rounding, self.config)
        self.modulation = ModulationTable(parts.modulation_store, self._embed)
        self._parts = parts
        self._patches: dict[str, WeightPatch] = {}

    @property
    def footprint(self) -> TransformerFootprint:
        """What a plan is made from; patches count."""
        return self._parts.footprint

    @property
    def outside(self) -> "QwenImageTransformer2DModel":
        """diffusers' model without its blocks; its weights are on the device after `return_outside`."""
        return self._outside

    @property
    def weights(self) -> dict[str, tuple[int, ...]]:
        """Every weight's shape by its name in diffusers' model: what can be patched."""
        return self._parts.weights

    def patch(self, patches: Mapping[str, WeightPatch]) -> None:
        """Apply these to the weights of those names from the next run on, and no others.

        Blocks on the device that change are decoded again from their source, so that no patch leaves a trace; the
        modulation table is computed again where it depends on what changed.
        """
        names = patches.keys() | self._patches.keys()
        changed = {name for name in names if patches.get(name) != self._patches.get(name)}
        if not changed:
            return
        outside = None
        if any(not name.startswith(BLOCKS) for name in changed):
            with torch.inference_mode(False):
                outside = self._parts.read_outside(patches)  # first: it may fail
        self._parts.patch(patches)
        if outside is not None:
            with torch.inference_mode(False):
                self._outside.load_state_dict(outside, assign=True)
            self._loaded = False
        if any(part in name for name in changed for part in ("_mod.", "time_text_embed.")):
            self.modulation.forget()
        self._patches = dict(patches)

    def load(
        self,
        resident: Iterable[int],
        held: Iterable[int] = (),
        annexes: Sequence[Annex] = (),
        *,
        on_block: OnBlock | None = None,
    ) -> None:
        """Bring the weights outside the blocks and the `resident` blocks to the device, and keep `held` ones in host
        memory from their next visit on; the blocks of `annexes` go to their devices.

        `on_block` is called before each block that is brought to a device, and may raise.
        """
        self.return_outside()
        there = {annex.device: annex.blocks for annex in annexes}
        for device, store in self.annexes.items():
            store.set_resident(there.get(device, ()), on_block=on_block)
        self.store.set_resident(resident, on_block=on_block)  # first: a block may come from host memory
        self.store.set_held(held)

    def return_outside(self) -> None:
        """Bring the weights outside the blocks to the device, unless they are there."""
        if not self._loaded:
            self._move_outside(self.hardware.device)
            self._loaded = True

    def unload(self) -> None:
        """Leave the device: what `load` brought there is given back. The modulation table stays in host memory."""
        self._move_outside(torch.device("cpu"))
        self._loaded = False
        for store in (self.store, *self.annexes.values()):
            store.release()
        self.modulation.leave_device()

    def shrink(self, nbytes: int) -> int:
        """Give back resident blocks until `nbytes` are free or none is left; returns the bytes given back."""
        before, block_bytes = self.store.resident_bytes, self.footprint.resident_block_bytes
        resident = self.store.resident
        leaving = [index for index in reversed(spread_order(len(self.store.blocks))) if index in resident]
        self.store.set_resident(resident - set(leaving[: -(-nbytes // block_bytes)]))
        return before - self.store.resident_bytes

    @property
    def weight_format(self) -> str:
        """The format of the blocks' largest weights, as a name of `formats.CODECS`."""
        return max(self.store.blocks[0].params, key=lambda param: param.nbytes).codec

    @property
    def loaded_bytes(self) -> int:
        """Bytes that stay on the device between runs."""
        return self.store.resident_bytes + (self.footprint.outside_bytes if self._loaded else 0)

    @contextmanager
    def session(
        self, *, slots: int, mlp_chunk_tokens: int | None = None, annexes: Sequence[Annex] = ()
    ) -> Iterator["TransformerSession"]:
        """What a run of several passes needs on the devices, given back on every way out."""
        away = min((annex.blocks.start for annex in annexes), default=len(self.store.blocks))
        with ExitStack() as stack:
            streamers = [stack.enter_context(BlockStreamer(self.store, slots=slots, blocks=range(away)))]
            for annex in sorted(annexes, key=lambda annex: annex.blocks.start):
                store = self.annexes[annex.device]
                streamers.append(stack.enter_context(BlockStreamer(store, slots=2, blocks=annex.blocks)))
            stack.callback(self.modulation.leave_device)
            yield TransformerSession(self, self._outside, streamers, mlp_chunk_tokens)

    def embedding(self, timestep: float, additional_t_cond: int = 0) -> Tensor:
        """The timestep's embedding (rows, inner_dim) on the device."""
        return self._embed(timestep, additional_t_cond)

    def _move_outside(self, device: torch.device) -> None:
        with torch.inference_mode(False):
            bind(self._outside, {name: p.data.to(device) for name, p in self._outside.named_parameters()})


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


class TransformerSession:
    """The passes of one run. Made by `QwenImageTransformer.session`."""

    def __init__(
        self,
        transformer: QwenImageTransformer,
        outside: "QwenImageTransformer2DModel",
        streamers: Sequence[BlockStreamer],
        mlp_chunk_tokens: int | None,
    ) -> None:
        self._transformer = transformer
        self._outside = outside
        self._streamers = streamers
        self._mlp_chunk_tokens = mlp_chunk_tokens

    @property
    def waits(self) -> Waits:
        """How long compute has waited for blocks, by where they came from."""
        return sum((streamer.waits for streamer in self._streamers), Waits())

    @torch.no_grad()
    def forward(
        self,
        branches: Sequence[Branch],
        *,
        hooked: Sequence[Hooked] = (),
        more: bool = False,
        on_block: OnBlock | None = None,
        check: Callable[[], None] | None = None,
    ) -> list[Tensor]:
        """The velocity of each branch's picture, (1, N of the picture, 64), in one pass over the blocks.

        `hooked`: branches with something around their blocks. `more`: another pass follows. `on_block` is called
        before each block with its index, `check` within those of huge images (`interruptible`); both may raise, and the
        session can be used again after that. Raises what `branch_tables` does.
        """
        self._transformer.return_outside()  # it may have been asked to leave since the last pass
        rows = {b.moment: self._transformer.modulation.row(*b.moment, on_block=on_block) for b in branches}
        states = [self._begin(branch, rows[branch.moment]) for branch in branches]
        alone = set(range(len(states))).difference(*(group.branches for group in hooked))
        tokens = max((state.tokens for state in states), default=0)
        for streamer in self._streamers:
            for state in states:
                state.move(streamer.device)
            for index, block in streamer.visit(more=more):
                if on_block is not None:
                    on_block(index)
                block.img_mlp.chunk_tokens = block.txt_mlp.chunk_tokens = self._mlp_chunk_tokens
                with interruptible(tokens, check):
                    for i in sorted(alone):
                        states[i].run(index, block)
                    for group in hooked:
                        run_hooked([states[i] for i in group.branches], group.hook, index, block)
                for state in states:
                    state.add_residuals(index)
        for state in states:
            state.move(self._transformer.hardware.device)
        del rows
        return [self._finish(branch, states.pop(0)) for branch in branches]

    def _begin(self, branch: Branch, row: ModulationRow) -> BranchState:
        outside, device = self._outside, self._transformer.hardware.device
        layered = self._transformer.config.use_layer3d_rope
        rotary = branch_tables(
            outside.pos_embed,
            branch.shapes,
            branch.places,
            branch.prompt_embeds.shape[1],
            self._transformer.positions,
            layered=layered,
        )
        index = None
        if outside.zero_cond_t:
            tokens = [h * w * f for f, h, w in branch.shapes]
            index = torch.zeros(1, sum(tokens), dtype=torch.int, device=device)
            if branch.references_at_zero:
                index[:, tokens[0] :] = 1
        return BranchState(
            img=outside.img_in(branch.tokens),
            txt=outside.txt_in(outside.txt_norm(branch.prompt_embeds)),
            mask=branch.prompt_mask,
            temb=self._transformer.embedding(*branch.moment),
            rotary=(rotary[0].to(device), rotary[1].to(device)),
            modulate_index=index,
            row=row,
            residuals=branch.residuals,
        )

    def _finish(self, branch: Branch, state: BranchState) -> Tensor:
        velocity = self._outside.proj_out(self._outside.norm_out(state.img, state.temb[:1]))
        frames, height, width = branch.shapes[0]
        return velocity[:, : frames * height * width]
