"""One call of the diffusion model by ComfyUI, translated to branches."""

from collections.abc import Sequence
from math import prod

import torch
from comfy.ldm.common_dit import pad_to_patch_size
from torch import Tensor

from ...engine.models.qwen_image.branch import Branch
from ...engine.models.qwen_image.latents import PATCH, pack, shape_in_patches, unpack
from ...engine.runs.branch_keys import BranchKey
from .block_patches import BlockPatches
from .controlnets import Residuals, sample_of
from .graph_checks import refuse, seen_of_call
from .references import at_zero, places_of


class Call:
    """One call of the diffusion model by ComfyUI: a batch of images, each a branch."""

    def __init__(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        *,
        attention_mask: Tensor | None,
        references: list[Tensor],
        method: str | None,
        additional_t_cond: Tensor | None,
        residuals: Residuals,
        dtype: torch.dtype,
    ) -> None:
        self._additional = [0] if additional_t_cond is None else additional_t_cond.reshape(-1).tolist()
        if not set(self._additional) <= {0, 1}:
            refuse(
                "An additional time condition of {value}",
                "use 0 or 1.",
                code="graph.wrong_additional_time",
                value=self._additional,
            )
        self._size = x.shape[-2:]
        self._x = pad_to_patch_size(x, (1, PATCH, PATCH)).to(dtype)
        self.timesteps = timestep
        self._context = context.to(dtype)
        self._mask = seen_of_call(attention_mask)
        # ComfyUI's own text nodes make references of odd sizes, and its model wraps them round to whole patches
        self._references = [pad_to_patch_size(image, (1, PATCH, PATCH)).to(dtype) for image in references]
        self._places = places_of(method, references)
        self._at_zero = at_zero(method)
        self._residuals = residuals
        self.patches: BlockPatches | None = None
        self.identities: Sequence[BranchKey] = ()

    @property
    def batch(self) -> int:
        return self._x.shape[0]

    @property
    def reference_tokens(self) -> list[int]:
        return [prod(shape_in_patches(image)) for image in self._references]

    def unpack(self, tokens: Tensor) -> Tensor:
        """A branch's velocity, (1, 16, F, H, W), without what whole patches have beyond it."""
        frames, height, width = self._x.shape[2:]
        return unpack(tokens, height, width, frames)[..., : self._size[0], : self._size[1]]

    def branches(self, timesteps: Sequence[float]) -> list[Branch]:
        images = [self._x, *self._references]
        shapes = tuple(shape_in_patches(image) for image in images)
        return [
            Branch(
                tokens=torch.cat([pack(row_of(image, i)) for image in images], dim=1),
                shapes=shapes,
                prompt_embeds=row_of(self._context, i),
                prompt_mask=None if self._mask is None else row_of(self._mask, i),
                timestep=timesteps[i],
                additional_t_cond=int(self._additional[min(i, len(self._additional) - 1)]),
                residuals=sample_of(self._residuals, i),
                places=self._places,
                references_at_zero=self._at_zero,
            )
            for i in range(self.batch)
        ]


def row_of(batch: Tensor, index: int) -> Tensor:
    """Sample `index` of a batch, or the only one there is, with its batch dimension."""
    index = min(index, batch.shape[0] - 1)
    return batch[index : index + 1]
