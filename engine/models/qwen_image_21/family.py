"""Qwen-Image-2.1 and 2.1-Turbo, with Qwen3-VL-8B and the VAE of their own."""

from collections.abc import Sequence
from typing import Any

from ...files.checkpoint import Checkpoint
from ..family import Family
from ..qwen3_vl.component import TEXT_ENCODER
from ..qwen3_vl.prompts import PromptTokenizer
from ..qwen3_vl.tensors import require_fitting_encoder
from ..qwen3_vl.text_encoder import TextEncoder
from ..qwen_image_21_vae.image_vae import ImageVAE21
from ..qwen_image_21_vae.tensor_names import NAME as VAE_NAME
from ..qwen_image_21_vae.tensor_names import require_image_vae_21
from ..qwen_image_vae.component import VAE
from .component import TRANSFORMER_21
from .costs import PROMPT_SIZES
from .from_prompts import QwenImage21FromPrompts
from .latents import CHANNELS
from .network import QwenImage21Parts
from .sizes import MOST_IMAGES
from .tensors import BLOCKS
from .transformer import QwenImage21Transformer
from .variants import Variant21, variant_of


def _could_be(checkpoint: Checkpoint) -> Sequence[Variant21]:
    """Nothing is left open: what no name calls Turbo is 2.1."""
    return ()


def _require_vae(vae: Checkpoint, member: Variant21) -> None:
    require_image_vae_21(vae)


def _parts(checkpoint: Checkpoint, *, variant: Variant21 | None = None, **settings: Any) -> QwenImage21Parts:
    """Both members have the same."""
    return QwenImage21Parts(checkpoint, **settings)


def _open(checkpoint: Checkpoint, *, rounding: Any = None, positions: Any = None, **settings: Any) -> Any:
    """Timesteps are always rounded as the reference rounds them, and positions counted as it counts them: ComfyUI does
    the same."""
    return QwenImage21Transformer(checkpoint, **settings)


QWEN_IMAGE_21 = Family(
    transformer=TRANSFORMER_21,
    text_encoder=TEXT_ENCODER,
    vae=VAE,
    members=Variant21,
    member_of=variant_of,
    could_be=_could_be,
    require_encoder=require_fitting_encoder,
    require_vae=_require_vae,
    parts=_parts,
    open=_open,
    encoder=TextEncoder,
    tokenizer=PromptTokenizer,
    empty_vae=ImageVAE21.without_weights,
    read_vae=ImageVAE21.read,
    prompts=PROMPT_SIZES,
    most_images=MOST_IMAGES,
    block_prefix=BLOCKS,
    quantizable=r".+\.weight",
    latent_channels=CHANNELS,
    vae_example=VAE_NAME,
    from_prompts=QwenImage21FromPrompts(),
    tokenizer_folder="processor",
)
