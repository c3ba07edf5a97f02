"""Branches for tests of Qwen-Image-2.1's transformer: random latents, prompts and references."""

from collections.abc import Callable, Sequence

import torch
from qwenimage_lowvram.engine.models.qwen_image_21.branch import Branch
from qwenimage_lowvram.engine.models.qwen_image_21.prefix import Prefix
from small_transformer_21 import PROMPT_DIM
from torch import Tensor

Shape = tuple[int, int]
REFERENCES: tuple[Shape, ...] = ((4, 6), (2, 4), (10, 4))
SLOTS = (3, 5, 5)  # two images without text between them


def make_prefix(
    length: int,
    *,
    dtype: torch.dtype = torch.float32,
    references: int = 0,
    masked: int = 0,
    seed: int = 0,
) -> Prefix:
    """`seed`: of the text behind the references; what stands before it depends on its length alone. The last `masked`
    tokens are padding."""
    fixed, own = torch.Generator().manual_seed(1), torch.Generator().manual_seed(100 * seed + length)
    slots, shapes = SLOTS[:references], REFERENCES[:references]
    split = slots[-1] if slots else 0
    images = tuple(torch.randn(1, h * w, 64, generator=fixed).to(dtype) for h, w in shapes)
    text = [torch.randn(1, split, PROMPT_DIM, generator=fixed), torch.randn(1, length, PROMPT_DIM, generator=own)]
    mask = None if not masked else (torch.arange(split + length) < split + length - masked)[None]
    return Prefix(torch.cat(text, dim=1).to(dtype), images, shapes, slots, mask)


def make_branch(
    length: int,
    *,
    dtype: torch.dtype = torch.float32,
    references: int = 0,
    masked: int = 0,
    seed: int = 0,
    shape: Shape = (6, 8),
    timestep: float = 0.7,
) -> Branch:
    generator = torch.Generator().manual_seed(7 + seed)
    tokens = torch.randn(1, shape[0] * shape[1], 64, generator=generator).to(dtype)
    prefix = make_prefix(length, dtype=dtype, references=references, masked=masked, seed=seed)
    return Branch(tokens, shape, prefix, timestep)


BRANCHES: dict[str, Callable[[torch.dtype], list[Branch]]] = {
    "one": lambda d: [make_branch(9, dtype=d)],
    "guidance": lambda d: [make_branch(13, dtype=d), make_branch(5, dtype=d)],
    "one reference": lambda d: [make_branch(9, dtype=d, references=1)],
    "two references": lambda d: [make_branch(9, dtype=d, references=2)],
    "three references, with guidance": lambda d: [make_branch(n, dtype=d, references=3) for n in (13, 5)],
    "with references, and without": lambda d: [make_branch(13, dtype=d, references=2), make_branch(5, dtype=d)],
    "padding": lambda d: [make_branch(13, dtype=d, masked=4), make_branch(9, dtype=d, references=1, masked=2)],
    "images of two sizes": lambda d: [make_branch(6, dtype=d), make_branch(6, dtype=d, shape=(4, 10))],
    "a batch": lambda d: [
        Branch(make_branch(6, dtype=d, seed=i).tokens, (6, 8), make_prefix(9, dtype=d, references=1), 0.7)
        for i in range(3)
    ],
    "two timesteps": lambda d: [make_branch(6, dtype=d), make_branch(6, dtype=d, timestep=0.3)],
}


def with_slots(prefix: Prefix) -> tuple[Tensor, Tensor, Tensor | None]:
    """As the encoder has it before its images' slots are cut out: embeddings, which of them are slots, and the mask."""
    embeds: list[Tensor] = []
    is_slot: list[Tensor] = []
    seen: list[Tensor] = []
    mask = prefix.text.new_ones(prefix.text.shape[:2], dtype=torch.bool) if prefix.mask is None else prefix.mask
    at = 0
    ends: Sequence[tuple[int, Tensor | None]] = [
        *zip(prefix.slots, prefix.references, strict=True),
        (mask.shape[1], None),
    ]
    for end, image in ends:
        embeds.append(prefix.text[:, at:end])
        is_slot.append(torch.zeros(1, end - at, dtype=torch.bool))
        seen.append(mask[:, at:end])
        if image is not None:
            count = image.shape[1] // 4
            embeds.append(torch.full((1, count, prefix.text.shape[2]), 3.0, dtype=prefix.text.dtype))
            is_slot.append(torch.ones(1, count, dtype=torch.bool))
            seen.append(torch.ones(1, count, dtype=torch.bool))
        at = end
    return torch.cat(embeds, 1), torch.cat(is_slot, 1), None if prefix.mask is None else torch.cat(seen, 1)
