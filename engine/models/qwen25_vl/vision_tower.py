"""Qwen2.5-VL's eyes: images to embeddings, block by block from the file. Keeps nothing after it answers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...compute.attention import attention_by, kernel_of
from ...errors import WrongModel
from ...files.checkpoint import Checkpoint
from ...hardware import Hardware
from ...streaming import (
    BlockFiles,
    BlockSource,
    FileSource,
    StoredBlock,
    StreamedBlocks,
    bind,
    read_params,
    store_block,
)
from ..qwen_vl import vision_tower
from ..qwen_vl.images import CHANNELS, FRAMES, MERGE, PatchedImage, SeenImage
from .costs import Qwen25VisionFootprint
from .vision_patches import PATCH_PX
from .vision_tensors import sort_vision

if TYPE_CHECKING:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig


class VisionTower(vision_tower.VisionTower):
    """Of a Qwen2.5-VL text encoder; its forward is transformers' own."""

    def __init__(
        self,
        encoder: Checkpoint,
        *,
        dtype: torch.dtype,
        hardware: Hardware,
        source: Callable[[Sequence[StoredBlock]], BlockSource] = FileSource,
    ) -> None:
        """Reads headers only: those of the text encoder, and of the file beside a GGUF one. Raises MissingFile or
        WrongModel."""
        tensors = sort_vision(encoder)
        self.identity = tensors.checkpoint.identity
        self.dtype = dtype
        self.hardware = hardware
        self._where = str(tensors.checkpoint.path)
        self._settings = tensors.config
        self._require_known_patches()
        self._config = _hf_config(self._settings)
        self._outside, self._source = tensors.outside, source
        self._outside_shapes = {name: tuple(p.shape) for name, p in self._empty_tower().named_parameters()}
        outside = store_block(self._outside_shapes, self._outside, dtype, self._where)
        make_block = partial(_empty_block, self._config)  # which, unlike a method, holds no reference to this tower
        files = BlockFiles(tensors.blocks, make_block, dtype, f"{self._where}, vision block", source)
        self._blocks = StreamedBlocks(files.open(hardware))
        self.footprint = Qwen25VisionFootprint(
            blocks=len(self._blocks),
            **self._blocks.nbytes,
            outside_bytes=outside.slot.nbytes,
            patch_values=CHANNELS * FRAMES * PATCH_PX**2,
            hidden_size=self._settings["hidden_size"],
            intermediate_size=self._settings["intermediate_size"],
            head_dim=self._settings["hidden_size"] // self._settings["num_heads"],
            merge=MERGE,
            out_hidden_size=self._settings["out_hidden_size"],
            element_bytes=dtype.itemsize,
            attention=kernel_of(hardware, dtype),
        )

    @torch.no_grad()
    def see(
        self, images: Sequence[PatchedImage], *, slots: int = 2, on_block: Callable[[int], None] | None = None
    ) -> list[SeenImage]:
        device = self.hardware.device
        tower = self._tower()
        with self._blocks.visit(slots, on_block) as blocks, attention_by(self.footprint.attention):
            tower.blocks = _InTurn(blocks)
            grids = torch.tensor([(1, image.height, image.width) for image in images], device=device)
            patches = torch.cat([image.patches.to(self.dtype) for image in images]).to(device)
            embeds = _merged(tower(patches, grid_thw=grids)).cpu()
        parts = embeds.split([image.tokens for image in images])
        sizes = [(image.height // MERGE, image.width // MERGE) for image in images]
        return [SeenImage(part, *size) for part, size in zip(parts, sizes, strict=True)]

    def _tower(self) -> nn.Module:
        """The tower without its blocks, on the device."""
        tower = self._empty_tower()
        read = read_params(self._outside, self._outside_shapes, self.dtype, self._where, self._source)
        bind(tower, {name: value.to(self.hardware.device) for name, value in read.items()})
        # the table of rotary frequencies is in no file; it depends on the heads' size alone
        small = {"hidden_size": self.footprint.head_dim, "num_heads": 1, "out_hidden_size": 1, "depth": 0}
        with torch.random.fork_rng(devices=()):  # it draws first weights, which nobody uses
            made = _network().Qwen2_5_VisionTransformerPretrainedModel(_hf_config({**self._settings, **small}))
        tower.rotary_pos_emb = made.rotary_pos_emb.to(self.hardware.device)
        return tower

    def _empty_tower(self) -> nn.Module:
        with torch.device("meta"):
            return (
                _network().Qwen2_5_VisionTransformerPretrainedModel(_hf_config({**self._settings, "depth": 0})).eval()
            )

    def _require_known_patches(self) -> None:
        names = ("in_channels", "temporal_patch_size", "patch_size", "spatial_merge_size")
        stated, known = tuple(self._settings[name] for name in names), (CHANNELS, FRAMES, PATCH_PX, MERGE)
        if stated != known:
            raise WrongModel(
                "{where}: the vision part has {names} of {stated}, Qwen2.5-VL has {known}. Use the text encoder of "
                "Qwen-Image.",
                code="vision.other_settings",
                where=self._where,
                names=names,
                stated=stated,
                known=known,
            )


class _InTurn(nn.Module):
    """Stands where the tower has its list of blocks, and hands out each when its turn comes."""

    def __init__(self, blocks: Iterator[tuple[int, nn.Module]]) -> None:
        super().__init__()
        self._blocks = blocks

    def __iter__(self) -> Iterator[nn.Module]:
        for _, block in self._blocks:
            yield block


def _network() -> Any:
    """transformers' modules of Qwen2.5-VL, imported when a tower is opened: it takes seconds."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

    return modeling_qwen2_5_vl


def _empty_block(config: "Qwen2_5_VLVisionConfig") -> nn.Module:
    with torch.device("meta"):
        block: nn.Module = _network().Qwen2_5_VLVisionBlock(config).eval()
    return block


def _merged(output: Any) -> Tensor:
    """transformers 4 returns the merged tokens, transformers 5 an object that has them."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _hf_config(settings: Mapping[str, Any]) -> "Qwen2_5_VLVisionConfig":
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

    config = Qwen2_5_VLVisionConfig(**settings)
    config._attn_implementation = "sdpa"
    return config
