"""An image on its way into a prompt: as patches for the vision tower, then as what the language model sees of it."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from .vision_files import MERGE

# frames that an image is doubled to, and its channels, in every Qwen-VL so far
FRAMES, CHANNELS = 2, 3


@dataclass(frozen=True, eq=False)
class PatchedImage:
    """patches: (height * width, 3 * 2 * side * side), `side` of a patch in px, in float32 on the host, as the tower
    reads them; height and width are in patches."""

    patches: Tensor
    height: int
    width: int

    @property
    def tokens(self) -> int:
        """That it takes in a prompt."""
        return self.height * self.width // MERGE**2

    @cached_property
    def digest(self) -> str:
        """Equal for equal images."""
        digest = hashlib.sha256(f"{self.height}x{self.width} ".encode())
        digest.update(self.patches.numpy())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class SeenImage:
    """What the language model sees of an image: embeddings (height * width, hidden) on the host, row by row; height
    and width are in tokens. deepstack: of the same shape, each added to what a layer makes of the image's tokens: the
    first to that of the first layer, and so on."""

    embeds: Tensor
    height: int
    width: int
    deepstack: tuple[Tensor, ...] = ()
