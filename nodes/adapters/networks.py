"""The families of models that the nodes serve: what each is in ComfyUI. A family of engine/models/, and a line here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...engine.files.checkpoint import Checkpoint
from ...engine.models.families import family_of
from ...engine.models.family import Family
from ...engine.models.qwen_image.family import QWEN_IMAGE
from ...engine.models.qwen_image_21.family import QWEN_IMAGE_21
from .clip import LowVRAMCLIP
from .clip_21 import LowVRAMCLIP21, encode_edit_21
from .edit_prompts import Edit, EncodedEdit, encode_edit
from .model import make_model, own_sigmas, rescaled_guidance
from .model_21 import IMAGE_MODEL, make_model_21, own_sigmas_21
from .patcher import LowVRAMPatcher


@dataclass(frozen=True)
class ServedFamily:
    """image_model: ComfyUI's name of its network. make_model: a MODEL of an opened transformer, as `model.make_model`.
    own_sigmas: of the reference's schedule, from a MODEL (ours or ComfyUI's own), latents, steps and denoise.
    rescaled_guidance: as ComfyUI's sampler_cfg_function; None where the reference does not rescale. clip: the CLIP of
    its encoder. encode_edit: prompts with images for a member of it."""

    family: Family
    image_model: str
    make_model: Callable[..., LowVRAMPatcher]
    own_sigmas: Callable[[Any, Tensor, int, float], Tensor]
    rescaled_guidance: Callable[[dict[str, Any]], Tensor] | None
    clip: type[LowVRAMCLIP]
    encode_edit: Callable[[Edit, Any], EncodedEdit]


SERVED = (
    ServedFamily(QWEN_IMAGE, "qwen_image", make_model, own_sigmas, rescaled_guidance, LowVRAMCLIP, encode_edit),
    ServedFamily(QWEN_IMAGE_21, IMAGE_MODEL, make_model_21, own_sigmas_21, None, LowVRAMCLIP21, encode_edit_21),
)


def served_of(checkpoint: Checkpoint, served: Sequence[ServedFamily] = SERVED) -> ServedFamily:
    """Whose transformer a file is, or holds; the first one's where it is none of theirs, so that `require` names what
    the file is."""
    family = family_of(checkpoint, [one.family for one in served])
    return next(one for one in served if one.family is family)


def served_model(model: Any, served: Sequence[ServedFamily] = SERVED) -> ServedFamily:
    """Whose schedule and guidance a MODEL takes; the first one's where it is none of theirs."""
    name = model.model.model_config.unet_config.get("image_model")
    return next((one for one in served if one.image_model == name), served[0])


def served_member(member: Any, served: Sequence[ServedFamily] = SERVED) -> ServedFamily:
    """Whose member it is."""
    return next(one for one in served if isinstance(member, one.family.members))
