"""The table of all kinds of models, in the order in which they are looked for: the first that shows a sign decides."""

from . import foreign
from .qwen3_vl.component import TEXT_ENCODER as QWEN3_VL
from .qwen25_vl.component import TEXT_ENCODER
from .qwen_image.component import TRANSFORMER
from .qwen_image_21.component import TRANSFORMER_21
from .qwen_image_vae.component import VAE
from .qwen_vl.component import VISION

COMPONENTS = (
    foreign.UNMERGED,
    foreign.LORA,
    foreign.MODEL_PATCH,
    foreign.CONTROLNET,
    foreign.OTHER_QUANTIZATION,
    TRANSFORMER_21,
    TRANSFORMER,
    QWEN3_VL,
    foreign.OTHER_TEXT_ENCODER,
    VISION,
    TEXT_ENCODER,
    foreign.STABLE_DIFFUSION,
    foreign.FLUX,
    foreign.WAN,
    VAE,
    foreign.TINY_VAE,
)
