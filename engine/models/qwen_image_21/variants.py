"""Which of the two 2.1 models a transformer is: what a person says, else its pipeline's folder or its name. Tensors and
shapes are the same."""

import re
from enum import Enum

from ...files.checkpoint import Checkpoint
from ..titles import pipeline_index, titles_of

_TURBO = re.compile(r"(?<![a-z])turbo(?![a-z])", re.I)


class Variant21(Enum):
    """A member by its published name."""

    BASE = "Qwen-Image-2.1"
    TURBO = "Qwen-Image-2.1-Turbo"

    @property
    def edits(self) -> bool:
        """Whether it was trained to change images that it is shown; it makes images of text alone as well."""
        return True

    @property
    def needs_images(self) -> bool:
        """Whether it makes none of text alone."""
        return False

    @property
    def makes_layers(self) -> bool:
        """Whether it takes an image apart into layers."""
        return False

    @property
    def is_turbo(self) -> bool:
        """Whether it was distilled for eight steps of its own."""
        return self is Variant21.TURBO


def variant_of(checkpoint: Checkpoint, chosen: Variant21 | None = None) -> Variant21:
    """`chosen`, or what is said of the file: its pipeline states sigmas of its own, or a name has the word turbo."""
    if chosen is not None:
        return chosen
    turbo = bool(pipeline_index(checkpoint).get("sample_sigmas")) or any(map(_TURBO.search, titles_of(checkpoint)))
    return Variant21.TURBO if turbo else Variant21.BASE
