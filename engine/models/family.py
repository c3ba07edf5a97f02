"""What makes an image together: a transformer's network, the text encoder and the VAE that belong to it. Holds none."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import QwenLowVRAMError, Unsupported
from ..files.checkpoint import Checkpoint
from ..planning.request import PromptTokens, SamplingRequest
from .component import Component
from .network import Branch
from .qwen_vl.image_prompts import ImagePrompt
from .shown_images import ShownImages
from .streamed_transformer import StreamedTransformer
from .transformer_parts import TransformerParts


class FromPrompts(Protocol):
    """Whole images of prompts, as the family's reference makes them: Euler's method on a schedule of its own.

    side_px: what an image's sides are multiples of.
    """

    side_px: int

    def noise_shape(self, batch: int, width: int, height: int) -> tuple[int, ...]:
        """Of `batch` images of that many px."""

    def prompt_dim(self, transformer: Any) -> int:
        """Of the prompts that a transformer takes."""

    def require_noise(self, noise: Tensor) -> None:
        """Raise InvalidRequest for a shape that is none of whole images."""

    def show(self, images: Sequence[Tensor], member: Any, size: tuple[int, int], megapixels: float) -> ShownImages:
        """Images (1, H, W, 3) in 0..1 that one of `size` (width, height) in px is to be made of, of so many megapixels
        as the model is shown them, 0: their own. Raises InvalidRequest for images that the member is not shown, and
        Unsupported where none are."""

    def prompt(self, tokenizer: Any, text: str, shown: ShownImages) -> ImagePrompt:
        """A prompt about images."""

    def normalised(self, raw: Tensor) -> Tensor:
        """Latents of the VAE, as the transformer sees them."""

    def request(
        self,
        transformer: Any,
        prompts: Sequence[Tensor],
        noise: Tensor,
        steps: int,
        references: Sequence[Tensor] = (),
    ) -> SamplingRequest:
        """What is to be planned for; prompts: (1, L, dim) each; references: latents of images that are shown. Raises
        InvalidRequest for prompts that are too long."""

    def sigmas(self, transformer: Any, steps: int, noise: Tensor) -> Tensor:
        """(steps + 1,) in fp32, from 1 to 0. Raises InvalidRequest for steps that the model has no schedule for."""

    def branch(self, latent: Tensor, prompt: Tensor, sigma: float, references: Sequence[Tensor] = ()) -> Branch:
        """Of one image."""

    def velocity(self, answers: Sequence[Tensor], noise: Tensor) -> Tensor:
        """Answers to branches, one after another -> latents of one image each, in fp32."""

    def guided(self, positive: Tensor, negative: Tensor, cfg: float) -> Tensor:
        """Two velocities as one."""

    def raw(self, latents: Tensor) -> Tensor:
        """As the VAE decodes them."""


def require_one_process(transformer: Checkpoint, member: Enum, ranks: int) -> None:
    """Of models that several processes cannot make an image by."""
    raise Unsupported(
        "{model} cannot make one image in {ranks} processes: only Qwen-Image of the 20B family can.\n\nWhat to do: "
        "start one process without torchrun, or use Qwen-Image or Qwen-Image-2512.",
        code="ranks.no_such_model",
        model=member.value,
        ranks=ranks,
    )


@dataclass(frozen=True)
class Family:
    """One family of image models.

    transformer, text_encoder, vae: how its files are told from others. members: the family's published models, told by
    `member_of` from what a person says (None: nothing) and what the file says of itself, which raises WrongModel where
    these contradict; `could_be` names those that nothing tells it from. require_encoder, require_vae: raise WrongModel
    for files that do not belong to the transformer's, or to the member. parts, open: of a transformer's file, for plans
    and for passes. encoder, tokenizer: of the text encoder's file and of the tokenizer's folder. empty_vae: of the
    VAE's file without weights, for plans; read_vae: with them. prompts: what its prompts have beside a person's words.
    most_images: that any member is shown. block_prefix: stands before a block's number in tensors' names. quantizable:
    a pattern of the names, in a block, of matrices that may be brought to fewer bits. latent_channels: of its VAE.
    vae_example: that VAE's published file. tokenizer_folder: of a pipeline folder. require_ranks: of a transformer's
    file and member, raises Unsupported or InvalidRequest where so many processes cannot make an image together.
    """

    transformer: Component
    text_encoder: Component
    vae: Component
    members: type[Enum]
    member_of: Callable[[Checkpoint, Any], Any]
    could_be: Callable[[Checkpoint], Sequence[Any]]
    require_encoder: Callable[[Checkpoint, Checkpoint], None]
    require_vae: Callable[[Checkpoint, Any], None]
    parts: Callable[..., TransformerParts]
    open: Callable[..., StreamedTransformer[Any, Any]]
    encoder: Callable[..., Any]
    tokenizer: Callable[[Path], Any]
    empty_vae: Callable[..., Any]
    read_vae: Callable[[Checkpoint, torch.dtype], Any]
    prompts: PromptTokens
    most_images: int
    block_prefix: str
    quantizable: str
    latent_channels: int
    vae_example: str
    from_prompts: FromPrompts
    tokenizer_folder: str = "tokenizer"
    require_ranks: Callable[[Checkpoint, Any, int], None] = require_one_process

    def require_any_vae(self, vae: Checkpoint) -> None:
        """Raise what `require_vae` raises for the first member, where it is none's."""
        first: QwenLowVRAMError | None = None
        for member in self.members:
            try:
                return self.require_vae(vae, member)
            except QwenLowVRAMError as error:
                first = first or error
        if first is not None:
            raise first
