"""Images that prompts are about, as the parts of a model take them. Decides nothing."""

from dataclasses import dataclass

from torch import Tensor

from .qwen_vl.images import PatchedImage


@dataclass(frozen=True)
class ShownImages:
    """in_prompts: as the text encoder sees them; labelled: whether each has a name there. pixels: (1, H, W, 3) in 0..1,
    as the VAE encodes them; latents: what it made of them, as the transformer sees them."""

    in_prompts: tuple[PatchedImage, ...] = ()
    labelled: bool = False
    pixels: tuple[Tensor, ...] = ()
    latents: tuple[Tensor, ...] = ()


NONE_SHOWN = ShownImages()
