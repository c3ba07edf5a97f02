"""Where the tokens of a branch stand: its rotary tables, as diffusers places them. Knows no weights."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import InvalidRequest

MAX_POSITIONS = 4096  # of diffusers' rotary tables

Shape = tuple[int, int, int]


def rotary_tables(embed: nn.Module, shapes: Sequence[Shape], length: int, *, layered: bool) -> tuple[Tensor, Tensor]:
    """Of all picture tokens, and of a prompt of `length` tokens, on the host. `embed` is diffusers' module; `shapes`
    are (frames, height, width) in patches, of the picture, then of each reference.

    layered: frame i of the picture is layer i, and the one reference, the picture that is taken apart, is layer -1.
    Raises InvalidRequest for positions beyond the tables, and for several references of a layered picture.
    """
    (frames, height, width), *references = shapes
    reach = max(max(h, w) // 2 for _, h, w in shapes)
    given = list(shapes)
    if layered:
        if len(references) > 1:
            raise InvalidRequest(f"One picture is taken apart at a time, {len(references)} are shown. Show one.")
        reach = max(reach, frames)
        # the last shape is that of the picture; without one, a token stands in its place and is cut off below
        given = [(1, height, width)] * frames + (references or [(1, 1, 1)])
    if reach + length > MAX_POSITIONS:
        raise InvalidRequest(
            f"The prompt has {length} tokens; beside pictures of up to {reach * 32} px the model has "
            f"positions for {MAX_POSITIONS - reach}. Shorten the prompt."
        )
    # on the host: on the device diffusers caches the tables for ever, by size
    pictures, text = embed([given], max_txt_seq_len=length, device=torch.device("cpu"))
    return pictures[: sum(f * h * w for f, h, w in shapes)], text
