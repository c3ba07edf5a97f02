"""The 20B family: Qwen-Image, its Edit models and Layered, with Qwen2.5-VL and their VAEs."""

from functools import partial

from ...errors import InvalidRequest
from ...files.checkpoint import Checkpoint
from ..family import Family, require_one_process
from ..qwen25_vl.component import TEXT_ENCODER
from ..qwen25_vl.tensors import require_fitting_encoder
from ..qwen25_vl.text_encoder import TextEncoder
from ..qwen_image_vae.component import VAE
from ..qwen_image_vae.image_vae import ImageVAE
from ..qwen_image_vae.shapes import LATENT_CHANNELS
from ..qwen_image_vae.tensor_names import RGB, RGBA, require_image_vae
from .component import TRANSFORMER
from .costs import PROMPT_SIZES
from .edit_sizes import MOST_IMAGES
from .from_prompts import QwenImageFromPrompts
from .network import QwenImageParts
from .positions import Positions
from .prompts import PromptTokenizer
from .tensors import BLOCKS, sort_transformer
from .transformer import QwenImageTransformer
from .variants import Variant, could_be, variant_of


def _require_vae(vae: Checkpoint, member: Variant) -> None:
    require_image_vae(vae, channels=RGBA if member.makes_layers else RGB)


def _require_ranks(transformer: Checkpoint, member: Variant, ranks: int) -> None:
    if member.makes_layers:
        require_one_process(transformer, member, ranks)
    heads = sort_transformer(transformer, member).config.num_attention_heads
    if heads % ranks:
        raise InvalidRequest(
            "One image cannot be made in {ranks} processes: each takes as many of the model's {heads} heads of "
            "attention as the others.\n\nWhat to do: start {possible} processes.",
            code="ranks.heads",
            ranks=ranks,
            heads=heads,
            possible=" or ".join(str(n) for n in range(2, heads + 1) if heads % n == 0),
        )


QWEN_IMAGE = Family(
    transformer=TRANSFORMER,
    text_encoder=TEXT_ENCODER,
    vae=VAE,
    members=Variant,
    member_of=variant_of,
    could_be=could_be,
    require_encoder=require_fitting_encoder,
    require_vae=_require_vae,
    parts=QwenImageParts,
    open=partial(QwenImageTransformer, positions=Positions.COMFYUI),
    encoder=TextEncoder,
    tokenizer=PromptTokenizer,
    empty_vae=ImageVAE.without_weights,
    read_vae=ImageVAE.read,
    prompts=PROMPT_SIZES,
    most_images=MOST_IMAGES,
    block_prefix=BLOCKS,
    quantizable=r"(?!(img|txt)_mod\.).+\.weight",  # modulation is computed once, and is never held
    latent_channels=LATENT_CHANNELS,
    vae_example=VAE.example,
    from_prompts=QwenImageFromPrompts(),
    require_ranks=_require_ranks,
)
