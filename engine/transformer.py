"""The transformer: prologue, `for block: for branch`, epilogue, around diffusers' own modules. Does not sample."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

import torch
from accelerate import init_empty_weights
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .chunking import ChunkedTokens
from .errors import InvalidRequest, Unsupported
from .families import sort_transformer
from .footprint import TransformerFootprint
from .hardware import Hardware
from .modulation import ModulationRow, ModulationTable
from .streaming import BlockSource, BlockStore, BlockStreamer, FileSource, StoredBlock, bind, read_params, store_block

MODULATION = ("img_mod.1.weight", "img_mod.1.bias", "txt_mod.1.weight", "txt_mod.1.bias")
MAX_POSITIONS = 4096  # of diffusers' rotary tables

OnBlock = Callable[[int], None]


class TimestepRounding(Enum):
    """How a timestep reaches the embedding. FP32 is exact; DIFFUSERS rounds as its pipelines do, twice."""

    FP32 = "fp32"
    DIFFUSERS = "diffusers"


@dataclass(frozen=True)
class Branch:
    """One forward pass: a prompt for one picture.

    tokens: packed, normalised latents (1, N, 64), the picture's tokens first, then those of its references.
    shapes: (frames, height, width) in patches, of the picture, then of each reference.
    prompt_embeds: (1, L, joint_attention_dim); prompt_mask: (1, L) bool, None where nothing is masked.
    timestep: sigma, 0..1.
    """

    tokens: Tensor
    shapes: tuple[tuple[int, int, int], ...]
    prompt_embeds: Tensor
    prompt_mask: Tensor | None
    timestep: float


class QwenImageTransformer:
    """Qwen-Image's transformer with its blocks in a BlockStore.

    Guarantees: a branch's result is bit-equal to diffusers' forward pass of that branch alone, wherever the blocks
    live; one pass visits each block once, whatever the number of branches. Weights are in no `nn.Module` that others
    see: nothing but the methods here moves them.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        hardware: Hardware,
        rounding: TimestepRounding = TimestepRounding.FP32,
        source: Callable[[Sequence[StoredBlock]], BlockSource] = FileSource,
    ) -> None:
        """Reads the weights outside the blocks (81 MB in bf16), and no block. `source` makes the blocks' source.

        Raises WrongModel, DamagedFile, MissingFile, or Unsupported for a family member that is not supported.
        """
        tensors = sort_transformer(checkpoint)
        self.config = tensors.config
        if self.config.use_additional_t_cond or self.config.use_layer3d_rope:
            raise Unsupported(f"{checkpoint.path} is {self.config.member}, which is not supported yet. Use Qwen-Image.")
        self.dtype = dtype
        self.hardware = hardware
        self._rounding = rounding
        self._loaded = False
        self._outside = self._empty_model()
        shapes = {name: tuple(p.shape) for name, p in self._outside.named_parameters()}
        where = str(checkpoint.path)
        self._outside.load_state_dict(read_params(tensors.outside, shapes, dtype, where, source), assign=True)

        shapes = {name: tuple(p.shape) for name, p in self._empty_block().named_parameters()}
        blocks = [
            store_block(shapes, entries, dtype, f"{where}, block {i}") for i, entries in enumerate(tensors.blocks)
        ]
        self.store = BlockStore(blocks, source(blocks), self._empty_block, hardware)
        shapes = {name: tuple(p.shape) for name, p in self._empty_modulation().named_parameters()}
        mods = [store_block(shapes, entries, dtype, f"{where}, block {i}") for i, entries in enumerate(tensors.blocks)]
        mod_store = BlockStore(mods, source(mods), self._empty_modulation, hardware, ring_buffers=1)
        self.modulation = ModulationTable(mod_store, self._embed_timestep)
        self.footprint = TransformerFootprint(
            blocks=self.config.num_layers,
            slot_bytes=self.store.slot_bytes,
            stored_bytes=self.store.raw_bytes,
            staging_bytes=self.store.staging_bytes,
            native=all(block.native for block in blocks),
            outside_bytes=sum(p.nbytes for p in self._outside.parameters()),
            modulation_slot_bytes=mod_store.slot_bytes,
            modulation_staging_bytes=mod_store.staging_bytes,
            inner_dim=self.config.inner_dim,
            head_dim=self.config.attention_head_dim,
            joint_attention_dim=self.config.joint_attention_dim,
            element_bytes=dtype.itemsize,
            scratch_bytes=self.store.scratch_bytes,
            modulation_scratch_bytes=mod_store.scratch_bytes,
        )

    def load(self, resident: Sequence[int]) -> None:
        """Bring the weights outside the blocks and the `resident` blocks to the device."""
        self.return_outside()
        self.store.set_resident(resident)

    def return_outside(self) -> None:
        """Bring the weights outside the blocks to the device, unless they are there."""
        if not self._loaded:
            self._move_outside(self.hardware.device)
            self._loaded = True

    def unload(self) -> None:
        """Leave the device: what `load` brought there is given back. The modulation table stays in host memory."""
        self._move_outside(torch.device("cpu"))
        self._loaded = False
        self.store.release()
        self.modulation.leave_device()

    def shrink(self, nbytes: int) -> int:
        """Give back resident blocks until `nbytes` are free or none is left; returns the bytes given back."""
        before = self.store.resident_bytes
        kept = sorted(self.store.resident)
        while kept and (len(self.store.resident) - len(kept)) * self.footprint.resident_block_bytes < nbytes:
            kept.pop()
        self.store.set_resident(kept)
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
    def session(self, *, slots: int, mlp_chunk_tokens: int | None = None) -> Iterator["TransformerSession"]:
        """What a run of several passes needs on the device, given back on every way out."""
        with BlockStreamer(self.store, slots=slots) as streamer:
            try:
                yield TransformerSession(self, self._outside, streamer, mlp_chunk_tokens)
            finally:
                self.modulation.leave_device()

    def embedding(self, timestep: float) -> Tensor:
        """The timestep's embedding (rows, inner_dim) on the device."""
        return self._embed_timestep(timestep)

    @torch.no_grad()
    def _embed_timestep(self, timestep: float) -> Tensor:
        value = torch.full((1,), timestep, dtype=torch.float32, device=self.hardware.device)
        if self._rounding is TimestepRounding.DIFFUSERS:
            value = (value * 1000).to(self.dtype) / 1000
        if self.config.zero_cond_t:
            value = torch.cat([value, value * 0])
        return self._outside.time_text_embed(value, torch.empty((), dtype=self.dtype, device=self.hardware.device))

    def _move_outside(self, device: torch.device) -> None:
        with torch.inference_mode(False):
            bind(self._outside, {name: p.data.to(device) for name, p in self._outside.named_parameters()})

    def _empty_model(self) -> QwenImageTransformer2DModel:
        config = self.config
        with init_empty_weights():
            return QwenImageTransformer2DModel(
                in_channels=config.in_channels,
                out_channels=config.out_channels,
                num_layers=0,
                attention_head_dim=config.attention_head_dim,
                num_attention_heads=config.num_attention_heads,
                joint_attention_dim=config.joint_attention_dim,
                axes_dims_rope=config.axes_dims_rope,
                zero_cond_t=config.zero_cond_t,
            ).eval()

    def _whole_block(self) -> QwenImageTransformerBlock:
        with torch.device("meta"):
            return QwenImageTransformerBlock(
                dim=self.config.inner_dim,
                num_attention_heads=self.config.num_attention_heads,
                attention_head_dim=self.config.attention_head_dim,
                zero_cond_t=self.config.zero_cond_t,
            ).eval()

    def _empty_block(self) -> nn.Module:
        block = self._whole_block()
        block.img_mod, block.txt_mod = _FromTable(), _FromTable()
        block.img_mlp, block.txt_mlp = ChunkedTokens(block.img_mlp), ChunkedTokens(block.txt_mlp)
        return block

    def _empty_modulation(self) -> nn.Module:
        block = self._whole_block()
        part = nn.Module()
        part.img_mod, part.txt_mod = block.img_mod, block.txt_mod
        return part


class TransformerSession:
    """The passes of one run. Made by `QwenImageTransformer.session`."""

    def __init__(
        self,
        transformer: QwenImageTransformer,
        outside: QwenImageTransformer2DModel,
        streamer: BlockStreamer,
        mlp_chunk_tokens: int | None,
    ) -> None:
        self._transformer = transformer
        self._outside = outside
        self._streamer = streamer
        self._mlp_chunk_tokens = mlp_chunk_tokens

    @property
    def waited_seconds(self) -> float:
        """How long compute has waited for blocks to be read."""
        return self._streamer.waited_seconds

    @torch.no_grad()
    def forward(
        self, branches: Sequence[Branch], *, more: bool = False, on_block: OnBlock | None = None
    ) -> list[Tensor]:
        """The velocity of each branch's picture, (1, N of the picture, 64), in one pass over the blocks.

        `more`: another pass follows. `on_block` is called before each block with its index; it may raise, and the
        session can be used again after that. Raises InvalidRequest for positions beyond the rotary tables.
        """
        self._transformer.return_outside()  # it may have been asked to leave since the last pass
        rows = {b.timestep: self._transformer.modulation.row(b.timestep, on_block=on_block) for b in branches}
        states = [self._begin(branch, rows[branch.timestep]) for branch in branches]
        for index, block in self._streamer.visit(more=more):
            if on_block is not None:
                on_block(index)
            block.img_mlp.chunk_tokens = block.txt_mlp.chunk_tokens = self._mlp_chunk_tokens
            for state in states:
                state.run(index, block)
        del rows
        return [self._finish(branch, states.pop(0)) for branch in branches]

    def _begin(self, branch: Branch, row: ModulationRow) -> "_State":
        outside, device = self._outside, self._transformer.hardware.device
        length = branch.prompt_embeds.shape[1]
        reach = max(max(h, w) // 2 for _, h, w in branch.shapes)
        if reach + length > MAX_POSITIONS:
            raise InvalidRequest(
                f"The prompt has {length} tokens; beside pictures of up to {reach * 32} px the model has "
                f"positions for {MAX_POSITIONS - reach}. Shorten the prompt."
            )
        # on the host: on the device diffusers caches the tables for ever, by size
        rotary = outside.pos_embed([list(branch.shapes)], max_txt_seq_len=length, device=torch.device("cpu"))
        index = None
        if outside.zero_cond_t:
            tokens = [h * w * f for f, h, w in branch.shapes]
            index = torch.zeros(1, sum(tokens), dtype=torch.int, device=device)
            index[:, tokens[0] :] = 1
        return _State(
            img=outside.img_in(branch.tokens),
            txt=outside.txt_in(outside.txt_norm(branch.prompt_embeds)),
            mask=branch.prompt_mask,
            temb=self._transformer.embedding(branch.timestep),
            rotary=(rotary[0].to(device), rotary[1].to(device)),
            modulate_index=index,
            row=row,
        )

    def _finish(self, branch: Branch, state: "_State") -> Tensor:
        velocity = self._outside.proj_out(self._outside.norm_out(state.img, state.temb[:1]))
        frames, height, width = branch.shapes[0]
        return velocity[:, : frames * height * width]


@dataclass
class _State:
    """What a branch carries from block to block."""

    img: Tensor  # (1, N, dim)
    txt: Tensor  # (1, L, dim)
    mask: Tensor | None
    temb: Tensor
    rotary: tuple[Tensor, Tensor]
    modulate_index: Tensor | None
    row: ModulationRow

    def run(self, index: int, block: nn.Module) -> None:
        block.img_mod.value, block.txt_mod.value = self.row.img[index], self.row.txt[index]
        self.txt, self.img = block(
            hidden_states=self.img,
            encoder_hidden_states=self.txt,
            encoder_hidden_states_mask=self.mask,
            temb=self.temb,
            image_rotary_emb=self.rotary,
            joint_attention_kwargs=None,
            modulate_index=self.modulate_index,
        )
        del block.img_mod.value, block.txt_mod.value  # a resident block would keep the row on the device


class _FromTable(nn.Module):
    """Stands in a block where its modulation weights were, and returns what they would have computed."""

    value: Tensor

    def forward(self, temb: Tensor) -> Tensor:
        return self.value
