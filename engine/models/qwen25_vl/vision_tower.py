"""Qwen2.5-VL's eyes: images to embeddings, block by block from the file. Keeps nothing after it answers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...compute.attention import attention_by
from ...files.checkpoint import Checkpoint
from ..qwen_vl import vision_tower
from ..qwen_vl.images import PatchedImage, SeenImage
from ..qwen_vl.vision_files import MERGE, VisionTensors
from .costs import Qwen25VisionFootprint
from .vision_patches import PATCH_PX
from .vision_tensors import sort_vision

if TYPE_CHECKING:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig


class VisionTower(vision_tower.VisionTower):
    """Of a Qwen2.5-VL text encoder; its forward is transformers' own."""

    @staticmethod
    def parts(encoder: Checkpoint) -> tuple[VisionTensors, vision_tower.TowerModules]:
        vision = sort_vision(encoder)
        modules = vision_tower.TowerModules(
            partial(_empty_tower, vision.config),
            partial(_empty_block, _hf_config(vision.config)),
            Qwen25VisionFootprint,
            PATCH_PX,
            "Qwen2.5-VL",
        )
        return vision, modules

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
        tower = self._read_outside()
        # the table of rotary frequencies is in no file; it depends on the heads' size alone
        small = {"hidden_size": self.footprint.head_dim, "num_heads": 1, "out_hidden_size": 1, "depth": 0}
        with torch.random.fork_rng(devices=()):  # it draws first weights, which nobody uses
            made = _network().Qwen2_5_VisionTransformerPretrainedModel(_hf_config({**self._settings, **small}))
        tower.rotary_pos_emb = made.rotary_pos_emb.to(self.hardware.device)
        return tower


class _InTurn(nn.Module):
    """Stands where the tower has its list of blocks, and hands out each when its turn comes.

    Blocks ask for the lengths of the windows that they attend within; on the device, each would wait for all before it.
    """

    def __init__(self, blocks: Iterator[tuple[int, nn.Module]]) -> None:
        super().__init__()
        self._blocks = blocks

    def __iter__(self) -> Iterator[Callable[..., Tensor]]:
        on_host: dict[int, tuple[Tensor, Tensor]] = {}  # by id, beside what has it

        def run(block: nn.Module, *states: Tensor, cu_seqlens: Tensor, **options: Any) -> Tensor:
            if id(cu_seqlens) not in on_host:
                on_host[id(cu_seqlens)] = cu_seqlens, cu_seqlens.cpu()
            output: Tensor = block(*states, cu_seqlens=on_host[id(cu_seqlens)][1], **options)
            return output

        for _, block in self._blocks:
            yield partial(run, block)


def _network() -> Any:
    """transformers' modules of Qwen2.5-VL, imported when a tower is opened: it takes seconds."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

    return modeling_qwen2_5_vl


def _empty_tower(settings: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"):
        tower: nn.Module = _network().Qwen2_5_VisionTransformerPretrainedModel(_hf_config({**settings, "depth": 0}))
    return tower.eval()


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
