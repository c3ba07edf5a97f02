"""Qwen3-VL's eyes: images to embeddings and a deepstack, block by block from the file. Keeps nothing after it answers.

Blocks and mergers are transformers' own modules; what lies between them is here, so that it is the same with every
transformers, and so that images are seen one after another within a block.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import isqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...compute.attention import attention_by
from ...files.checkpoint import Checkpoint
from ..qwen_vl import vision_tower
from ..qwen_vl.images import PatchedImage, SeenImage
from ..qwen_vl.vision_files import MERGE, VisionTensors
from .costs import Qwen3VisionFootprint
from .vision_patches import PATCH_PX
from .vision_positions import rotary, table_weights
from .vision_tensors import sort_vision

if TYPE_CHECKING:
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig


class VisionTower(vision_tower.VisionTower):
    """Of a Qwen3-VL text encoder. What an image is seen as depends on that image alone, to the last bit."""

    @staticmethod
    def parts(encoder: Checkpoint) -> tuple[VisionTensors, vision_tower.TowerModules]:
        vision = sort_vision(encoder)
        config = _hf_config(vision.config)
        modules = vision_tower.TowerModules(
            partial(_Outside, config), partial(_empty_block, config), Qwen3VisionFootprint, PATCH_PX, "Qwen3-VL"
        )
        return vision, modules

    @torch.no_grad()
    def see(
        self, images: Sequence[PatchedImage], *, slots: int = 2, on_block: Callable[[int], None] | None = None
    ) -> list[SeenImage]:
        outside, device = self._read_outside(), self.hardware.device
        states = [outside(image, device) for image in images]
        angles = [rotary(image.height, image.width, self.footprint.head_dim, device) for image in images]
        ends = [torch.tensor([0, image.height * image.width], dtype=torch.int32) for image in images]
        mergers = dict(zip(self._settings["deepstack_visual_indexes"], outside.deepstack_merger_list, strict=True))
        deepstack: list[list[Tensor]] = [[] for _ in images]
        with self._blocks.visit(slots, on_block) as blocks, attention_by(self.footprint.attention):
            for index, block in blocks:
                for i, state in enumerate(states):
                    states[i] = block(state, cu_seqlens=ends[i], position_embeddings=angles[i])
                    if index in mergers:
                        deepstack[i].append(mergers[index](states[i]).cpu())
        return [
            SeenImage(outside.merger(state).cpu(), image.height // MERGE, image.width // MERGE, tuple(stack))
            for image, state, stack in zip(images, states, deepstack, strict=True)
        ]


class _Outside(nn.Module):
    """What lies outside of the blocks: the beginning, and the mergers. Parameters are named as in transformers' tower,
    and are on the meta device."""

    def __init__(self, config: "Qwen3VLVisionConfig") -> None:
        super().__init__()
        network = _network()
        with torch.device("meta"):
            self.patch_embed = network.Qwen3VLVisionPatchEmbed(config)
            self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
            self.merger = network.Qwen3VLVisionPatchMerger(config, use_postshuffle_norm=False)
            self.deepstack_merger_list = nn.ModuleList(
                network.Qwen3VLVisionPatchMerger(config, use_postshuffle_norm=True)
                for _ in config.deepstack_visual_indexes
            )
        self.side = isqrt(config.num_position_embeddings)

    def forward(self, image: PatchedImage, device: torch.device) -> Tensor:
        """(height * width, hidden), as the first block sees it."""
        indices, weights = table_weights(image.height, image.width, self.side)
        positions = (self.pos_embed(indices.to(device)) * weights.to(device)[:, :, None]).sum(1)
        patches = self.patch_embed(image.patches.to(self.pos_embed.weight.dtype).to(device))
        embedded: Tensor = patches + positions.to(patches.dtype)
        return embedded


def _empty_block(config: "Qwen3VLVisionConfig") -> nn.Module:
    with torch.device("meta"):
        block: nn.Module = _network().Qwen3VLVisionBlock(config).eval()
    return block


def _network() -> Any:
    """transformers' modules of Qwen3-VL, imported when a tower is opened: it takes seconds."""
    from transformers.models.qwen3_vl import modeling_qwen3_vl

    return modeling_qwen3_vl


def _hf_config(settings: Mapping[str, Any]) -> "Qwen3VLVisionConfig":
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig

    config = Qwen3VLVisionConfig(**settings)
    config._attn_implementation = "sdpa"
    return config
