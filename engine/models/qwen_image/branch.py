"""One prompt for one image: what the transformer is given, and what it carries from block to block."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, reduce
from importlib.metadata import version
from math import prod
from operator import add
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn

from ...compute.context_parallel import Ranks
from .modulation import ModulationRow, Moment
from .positions import Place, Shape


@dataclass(frozen=True)
class Branch:
    """One forward pass: a prompt for one image.

    tokens: packed, normalised latents (1, N, 64), the image's tokens first, then those of its references.
    shapes: (frames, height, width) in patches, of the image, then of each reference; layers are frames.
    prompt_embeds: (1, L, joint_attention_dim); prompt_mask: (1, L) bool, None where nothing is masked.
    timestep: sigma, 0..1. additional_t_cond: which of the model's two additional conditions, where it has them.
    residuals: of each ControlNet what is added behind each block, (1, n, dim) for the first n tokens, or None.
    places: of each shape among the rotary positions; empty: each centred, in a frame of its own, as diffusers has them.
    references_at_zero: whether a model that has learned it (zero_cond_t) computes references at timestep zero.
    """

    tokens: Tensor
    shapes: tuple[Shape, ...]
    prompt_embeds: Tensor
    prompt_mask: Tensor | None
    timestep: float
    additional_t_cond: int = 0
    residuals: tuple[Sequence[Tensor | None], ...] = ()
    places: tuple[Place, ...] = ()
    references_at_zero: bool = True

    @property
    def moment(self) -> Moment:
        return self.timestep, self.additional_t_cond

    @property
    def image_tokens(self) -> int:
        """Of the image that is made, without its references."""
        return prod(self.shapes[0])


@dataclass
class BranchState:
    """What a branch carries from block to block."""

    img: Tensor  # (1, N, dim)
    txt: Tensor  # (1, L, dim)
    mask: Tensor | None
    temb: Tensor
    rotary: tuple[Tensor, Tensor]
    modulate_index: Tensor | None
    row: ModulationRow
    residuals: tuple[Sequence[Tensor | None], ...]
    ranks: Ranks | None = None  # of which this process has its part of img, txt, rotary and modulate_index

    @property
    def tokens(self) -> int:
        """Of images and prompt together, that this process has."""
        return self.img.shape[1] + self.txt.shape[1]

    def move(self, device: torch.device) -> None:
        """Hand everything but the residuals on to `device`; of the table's row, a copy that branches share."""
        self.row.on(device)
        self.img, self.txt, self.temb = self.img.to(device), self.txt.to(device), self.temb.to(device)
        self.rotary = (self.rotary[0].to(device), self.rotary[1].to(device))
        self.mask = None if self.mask is None else self.mask.to(device)
        self.modulate_index = None if self.modulate_index is None else self.modulate_index.to(device)

    def run(self, index: int, block: nn.Module) -> None:
        if self.ranks is not None:
            block.attn.processor._parallel_config = self.ranks.config
        row = self.row.on(self.img.device)
        block.img_mod.value, block.txt_mod.value = row.img[index], row.txt[index]
        try:
            self.txt, self.img = block(
                hidden_states=self.img,
                encoder_hidden_states=self.txt,
                temb=self.temb,
                image_rotary_emb=self.rotary,
                modulate_index=self.modulate_index,
                **_mask_arguments(self.mask, self.img.shape[1]),
            )
        finally:
            del block.img_mod.value, block.txt_mod.value  # a resident block would keep the row on the device

    def add_residuals(self, index: int) -> None:
        """Behind block `index`. Several are summed up first, in their order, as ComfyUI does it."""
        added = [net[index] for net in self.residuals if index < len(net)]
        present = [residual for residual in added if residual is not None]
        if present:
            total = reduce(add, present).to(self.img.device)
            self.img[:, : total.shape[1]] += total


def _mask_arguments(mask: Tensor | None, image_tokens: int) -> dict[str, Any]:
    """How a block of the installed diffusers is told which of the prompt's tokens are masked.

    Before 0.39 a block ignores the prompt's mask, and takes the joint one of prompt and image; later ones refuse that.
    """
    if mask is None:
        return {"encoder_hidden_states_mask": None, "joint_attention_kwargs": None}
    if _blocks_join_masks():
        return {"encoder_hidden_states_mask": mask, "joint_attention_kwargs": None}
    joint = torch.cat([mask, mask.new_ones(len(mask), image_tokens)], dim=1)
    return {"encoder_hidden_states_mask": None, "joint_attention_kwargs": {"attention_mask": joint[:, None, None, :]}}


@cache
def _blocks_join_masks() -> bool:
    return Version(version("diffusers")) >= Version("0.39.0.dev0")
