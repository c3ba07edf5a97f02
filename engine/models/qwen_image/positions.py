"""Where the tokens of a branch stand: its rotary tables, as ComfyUI or as diffusers places them. Knows no weights.

The two differ where a side has an odd number of patches (which half gets the middle one), and where a reference is
longer than the image (whether the prompt begins behind it). ComfyUI: comfy/ldm/qwen_image/model.py, process_img and
_forward; diffusers: transformer_qwenimage.py, QwenEmbedRope and QwenEmbedLayer3DRope.
"""

from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InvalidRequest

# of the rotary tables, either side of 0: no prompt can have more tokens
MAX_POSITIONS = 4096

Shape = tuple[int, int, int]  # frames, height, width in patches
Place = tuple[int, int, int]  # frame, patches down and to the right of the centre


class Positions(Enum):
    """Whose positions are counted. DIFFUSERS is the reference implementation; both draw good images."""

    COMFYUI = "comfyui"
    DIFFUSERS = "diffusers"

    def before_centre(self, side: int) -> int:
        """Of so many patches, how many stand before position 0."""
        return side // 2 if self is Positions.COMFYUI else side - side // 2


def branch_tables(
    embed: Any, shapes: Sequence[Shape], places: Sequence[Place], length: int, positions: Positions, *, layered: bool
) -> tuple[Tensor, Tensor]:
    """Rotary factors of all image tokens, and of a prompt of `length` tokens, on the host.

    `embed` is diffusers' module; `shapes` are (frames, height, width) in patches, of the image, then of each reference;
    `places`: of each of them, none where each has a frame of its own. Raises what `rotary_tables` does.
    """
    if positions is Positions.DIFFUSERS:
        images, text = rotary_tables(embed, shapes, length, layered=layered)
        return (place_images(embed, shapes, places) if places else images), text
    if layered:
        _require_one_reference(shapes)
    reach = require_text_positions(shapes, length, positions, layered=layered)
    frame = -1 if layered else 1  # of the first reference, with the next ones going on
    given = places or [(frame * i, 0, 0) for i in range(len(shapes))]
    images = place_images(embed, shapes, given, positions)
    return images, embed.pos_freqs[reach : reach + length]


def rotary_tables(embed: nn.Module, shapes: Sequence[Shape], length: int, *, layered: bool) -> tuple[Tensor, Tensor]:
    """Of all image tokens, and of a prompt of `length` tokens, on the host. `embed` is diffusers' module; `shapes`
    are (frames, height, width) in patches, of the image, then of each reference.

    layered: frame i of the image is layer i, and the one reference, the image that is taken apart, is layer -1.
    Raises InvalidRequest for positions beyond the tables, and for several references of a layered image.
    """
    (frames, height, width), *references = shapes
    given = list(shapes)
    if layered:
        _require_one_reference(shapes)
        # the last shape is that of the image; without one, a token stands in its place and is cut off below
        given = [(1, height, width)] * frames + (references or [(1, 1, 1)])
    require_text_positions(shapes, length, Positions.DIFFUSERS, layered=layered)
    # on the host: on the device diffusers caches the tables for ever, by size
    images, text = embed([given], max_txt_seq_len=length, device=torch.device("cpu"))
    return images[: sum(f * h * w for f, h, w in shapes)], text


def _require_one_reference(shapes: Sequence[Shape]) -> None:
    if len(shapes) > 2:
        raise InvalidRequest(
            "Only one image can be taken apart at a time, but {count} are given. Use one.",
            code="layered.several_images",
            count=len(shapes) - 1,
        )


def require_text_positions(shapes: Sequence[Shape], length: int, positions: Positions, *, layered: bool) -> int:
    """The position that the prompt begins at. Raises InvalidRequest where its end is beyond the tables."""
    frames, *sides = shapes[0]
    reach = max(sides) // 2
    if positions is Positions.DIFFUSERS:
        reach = max(max(h, w) // 2 for _, h, w in shapes)
        reach = max(reach, frames) if layered else reach
    if reach + length > MAX_POSITIONS:
        raise InvalidRequest(
            "The prompt has {tokens} tokens; with images of up to {image_px} px the model has positions for {most}. "
            "Shorten the prompt.",
            code="prompt.too_many_tokens_beside_images",
            tokens=length,
            image_px=reach * 32,
            most=MAX_POSITIONS - reach,
        )
    return reach


def place_images(
    rope: Any, shapes: Sequence[Shape], places: Sequence[Place], positions: Positions = Positions.DIFFUSERS
) -> Tensor:
    """Rotary factors (tokens of all images, head_dim / 2) of images that lie at `places`.

    `rope` is diffusers' QwenEmbedRope. At place (i, 0, 0) image i has the factors that `rope` gives it, where
    positions are diffusers'. Raises InvalidRequest for positions beyond its tables.
    """
    table = torch.cat([rope.neg_freqs, rope.pos_freqs])  # row MAX_POSITIONS is position 0
    axes = table.split([size // 2 for size in rope.axes_dim], dim=1)
    factors = []
    for shape, (frame, down, right) in zip(shapes, places, strict=True):
        starts = frame, down - positions.before_centre(shape[1]), right - positions.before_centre(shape[2])
        if any(not -MAX_POSITIONS <= s <= MAX_POSITIONS - n for s, n in zip(starts, shape, strict=True)):
            raise InvalidRequest(
                "A reference image begins {distance_px} px away from the centre of the others, but the model has only "
                "{positions} positions of 16 px.\n\nWhat to do: use fewer or smaller images.",
                code="edit.reference_too_far",
                distance_px=max(down, right) * 16,
                positions=MAX_POSITIONS,
            )
        rows = [axes[i][MAX_POSITIONS + starts[i] :][: shape[i]] for i in range(3)]
        views = [rows[0][:, None, None], rows[1][None, :, None], rows[2][None, None, :]]
        factors.append(torch.cat([view.expand(*shape, -1) for view in views], dim=-1).flatten(0, 2))
    return torch.cat(factors)
