"""One call of Qwen-Image-2.1's diffusion model by ComfyUI, translated to branches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...engine.models.qwen_image_21.branch import Branch
from ...engine.models.qwen_image_21.latents import pack, shape_in_tokens, unpack
from ...engine.models.qwen_image_21.prefix import Prefix
from ...engine.runs.branch_keys import BranchKey
from .block_patches import BlockPatches
from .graph_checks import seen_of_call
from .model_call import row_of


class Call21:
    """One call of the diffusion model by ComfyUI: a batch of images, each a branch."""

    patches: BlockPatches | None = None
    identities: Sequence[BranchKey] = ()

    def __init__(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        *,
        mask: Tensor | None,
        references: Sequence[Tensor],
        slots: Sequence[int],
        keys: Sequence[tuple[str, str]] | None,
        dtype: torch.dtype,
    ) -> None:
        self._x = x.to(dtype)
        self.timesteps = timestep
        self._context = context.to(dtype)
        self._mask = seen_of_call(mask)
        self._references = [image.to(dtype) for image in references]
        self._slots, self._keys = tuple(slots), keys

    @property
    def batch(self) -> int:
        return self._x.shape[0]

    def unpack(self, tokens: Tensor) -> Tensor:
        """A branch's velocity, (1, 64, h, w)."""
        return unpack(tokens, *self._x.shape[-2:])

    def branches(self, timesteps: Sequence[float]) -> list[Branch]:
        prefixes: dict[int, Prefix] = {}
        made = []
        for i in range(self.batch):
            row = min(i, self._rows - 1)
            if row not in prefixes:
                prefixes[row] = self._prefix(row)
            image = self._x[i : i + 1]
            made.append(Branch(pack(image), shape_in_tokens(image), prefixes[row], timesteps[i]))
        return made

    @property
    def _rows(self) -> int:
        """How many prompts the batch has: one for all images, or one for each."""
        batched = [self._context, *self._references, *([] if self._mask is None else [self._mask])]
        return max(len(tensor) for tensor in batched)

    def _prefix(self, row: int) -> Prefix:
        references = [row_of(image, row) for image in self._references]
        return Prefix(
            text=row_of(self._context, row),
            references=tuple(map(pack, references)),
            shapes=tuple(map(shape_in_tokens, references)),
            slots=self._slots,
            mask=None if self._mask is None else row_of(self._mask, row),
            keys=None if self._keys is None else self._keys[min(row, len(self._keys) - 1)],
        )


def prefix_keys(
    prompt: Tensor, mask: Tensor | None, references: Sequence[Tensor], slots: Sequence[int]
) -> tuple[tuple[str, str], ...]:
    """Of each prompt of a condition: what its images and the text before them are, and all of it."""
    rows = max(len(tensor) for tensor in (prompt, *references, *(() if mask is None else (mask,))))
    keys = []
    for row in range(rows):
        prefix = Prefix(
            text=row_of(prompt, row),
            references=tuple(pack(row_of(image, row)) for image in references),
            shapes=tuple(map(shape_in_tokens, references)),
            slots=tuple(slots),
            mask=None if mask is None else row_of(mask, row).bool(),
        )
        found = [stretch.key for stretch in prefix.stretches]
        keys.append((found[0] if references else "", found[-1]))
    return tuple(keys)
