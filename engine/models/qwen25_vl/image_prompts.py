"""Prompts that show pictures: where a picture stands among the tokens, and the positions of all tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...errors import InvalidRequest
from .vision_patches import PatchedPicture

# among a prompt's token ids: here it shows its next picture
PICTURE = -1


class Shown(Protocol):
    """A picture's size in tokens."""

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...


@dataclass(frozen=True)
class PicturePrompt:
    """Token ids of a prompt within its template, PICTURE in the place of each of its pictures."""

    tokens: tuple[int, ...]
    pictures: tuple[PatchedPicture, ...] = ()

    @property
    def length(self) -> int:
        """As the text encoder sees it, pictures at their size."""
        return self.place(len(self.tokens))

    def place(self, index: int) -> int:
        """Where the token `index` stands when the pictures before it take their size."""
        before = sum(token == PICTURE for token in self.tokens[:index])
        return index + sum(picture.tokens - 1 for picture in self.pictures[:before])


def require_places(tokens: Sequence[int], pictures: int) -> None:
    """Raise InvalidRequest unless the prompt has a place for each of its pictures, and no more."""
    places = sum(token == PICTURE for token in tokens)
    if places != pictures:
        raise InvalidRequest(
            "A prompt is given {images} picture{plural} and has {places} place{places_plural} for them "
            "(<|vision_start|><|image_pad|><|vision_end|>). Give it as many as it shows.",
            code="prompt.other_number_of_images",
            images=pictures,
            plural="s" if pictures != 1 else "",
            places=places,
            places_plural="s" if places != 1 else "",
        )


def token_positions(tokens: Sequence[int], pictures: Sequence[Shown]) -> Tensor:
    """(3, length) int64: time, height and width of each token, a picture's tokens in the place of its PICTURE.

    Text counts on in all three. A picture stands still in time; its rows and columns count from where it begins, and
    the text behind it goes on after the longer side (transformers Qwen2_5_VLModel.get_rope_index).
    """
    parts, begin, shown = [], 0, iter(pictures)
    for token in tokens:
        if token != PICTURE:
            parts.append(torch.full((3, 1), begin))
            begin += 1
            continue
        picture = next(shown)
        rows = torch.arange(picture.height).repeat_interleave(picture.width)
        columns = torch.arange(picture.width).repeat(picture.height)
        parts.append(torch.stack([torch.zeros_like(rows), rows, columns]) + begin)
        begin += max(picture.height, picture.width)
    return torch.cat(parts, dim=1)
