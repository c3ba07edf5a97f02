"""Prompts that show images: where an image stands among the tokens, and the positions of all tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...errors import InvalidRequest
from .images import PatchedImage

# among a prompt's token ids: here it shows its next image
IMAGE = -1


class Shown(Protocol):
    """An image's size in tokens."""

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...


@dataclass(frozen=True)
class ImagePrompt:
    """Token ids of a prompt within its template, IMAGE in the place of each of its images."""

    tokens: tuple[int, ...]
    images: tuple[PatchedImage, ...] = ()

    @property
    def length(self) -> int:
        """As the text encoder sees it, images at their size."""
        return self.place(len(self.tokens))

    def place(self, index: int) -> int:
        """Where the token `index` stands when the images before it take their size."""
        before = sum(token == IMAGE for token in self.tokens[:index])
        return index + sum(image.tokens - 1 for image in self.images[:before])

    @property
    def image_spans(self) -> list[tuple[int, int]]:
        """Where each image begins and ends among what the text encoder sees."""
        return image_spans(self.tokens, [image.tokens for image in self.images])


class PromptTokenizer(Protocol):
    """A model's template around its tokenizer."""

    def start(self, ids: Sequence[int]) -> int:
        """How many tokens stand before the prompt."""

    def require_length(self, prompt: ImagePrompt) -> None:
        """Raise InvalidRequest for a prompt that is longer, template not counted, than the model has positions for."""


def image_spans(tokens: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Where each image begins and ends when all take their size, in tokens."""
    spans, moved, shown = [], 0, iter(sizes)
    for index, token in enumerate(tokens):
        if token == IMAGE:
            size = next(shown)
            spans.append((index + moved, index + moved + size))
            moved += size - 1
    return spans


def drop_template(hidden_states: Tensor, start: int) -> Tensor:
    """(1, length, dim) -> (1, length - start, dim): without the system part, which the model was trained without."""
    return hidden_states[:, start:]


def require_places(tokens: Sequence[int], images: int) -> None:
    """Raise InvalidRequest unless the prompt has a place for each of its images, and no more."""
    places = sum(token == IMAGE for token in tokens)
    if places != images:
        raise InvalidRequest(
            "A prompt comes with {images} image{plural}, but has {places} place{places_plural} for them "
            "(<|vision_start|><|image_pad|><|vision_end|>). Give it as many images as it has places.",
            code="prompt.other_number_of_images",
            images=images,
            plural="s" if images != 1 else "",
            places=places,
            places_plural="s" if places != 1 else "",
        )


def token_positions(tokens: Sequence[int], images: Sequence[Shown]) -> Tensor:
    """(3, length) int64: time, height and width of each token, an image's tokens in the place of its IMAGE.

    Text counts on in all three. An image stands still in time; its rows and columns count from where it begins, and
    the text behind it goes on after the longer side (transformers Qwen2_5_VLModel.get_rope_index).
    """
    parts, begin, shown = [], 0, iter(images)
    for token in tokens:
        if token != IMAGE:
            parts.append(torch.full((3, 1), begin))
            begin += 1
            continue
        image = next(shown)
        rows = torch.arange(image.height).repeat_interleave(image.width)
        columns = torch.arange(image.width).repeat(image.height)
        parts.append(torch.stack([torch.zeros_like(rows), rows, columns]) + begin)
        begin += max(image.height, image.width)
    return torch.cat(parts, dim=1)
