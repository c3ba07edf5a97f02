"""Say in words what a graph asks of Qwen-Image-2.1 that it does not do, and what it does poorly."""

from typing import Any

import torch
from torch import Tensor

from ...engine.errors import InvalidRequest, Unsupported
from ...engine.models.qwen_image_21.latents import CHANNELS, TOKEN_PX
from ...engine.models.qwen_image_21.schedule import TURBO_SIGMAS
from ...engine.models.qwen_image_21.sizes import BESIDE_IT, HALOED
from ...engine.told import Told
from ..display_names import ENCODE_EDIT
from .progress import warn

SLOTS_KEY = "image_slots"  # of a condition: before which of its tokens each reference stands


def tell_other_schedule(sigmas: Tensor) -> None:
    """Turbo was made for eight sigmas; what is left of them where an image is changed (denoise) is theirs too."""
    own = torch.tensor([*TURBO_SIGMAS, 0.0])
    taken = sigmas.float().cpu()
    if len(taken) > len(own) or not torch.allclose(taken, own[-len(taken) :], atol=1e-3):
        told = Told(
            "Qwen-Image-2.1-Turbo makes poor images with any schedule but its own: use the preset '2.1-Turbo, 8 "
            "steps' of Sample (low VRAM), or ManualSigmas with {sigmas}.",
            code="told.other_schedule",
            sigmas=", ".join(f"{sigma:g}" for sigma in own.tolist()),
        )
        warn(told)


def tell_haloed_edit(output: tuple[int, int], references: int) -> None:
    """`output`: (width, height) in px of an image that is made beside so many references."""
    if references and output == HALOED:
        width, height = HALOED
        told = Told(
            "Edits with Qwen-Image-2.1 of exactly {width}x{height} px are known to come out as near-copies of the "
            "image with halos, in diffusers and ComfyUI too. Use another size: in {encode_edit}, set megapixels to 1 "
            "and width and height to 0, which edits a square image at {other_width}x{other_height} px.",
            code="told.haloed_edit",
            width=width,
            height=height,
            encode_edit=ENCODE_EDIT,
            other_width=BESIDE_IT[0],
            other_height=BESIDE_IT[1],
        )
        warn(told)


def check_references_21(entry: dict[str, Any], noise: Tensor) -> None:
    """Raise InvalidRequest for references that are no images of this model's, or whose places are not said."""
    references, slots = list(entry.get("reference_latents") or ()), list(entry.get(SLOTS_KEY) or ())
    for latent in references:
        if latent.ndim != 4 or latent.shape[1] != CHANNELS:
            raise InvalidRequest(
                "A reference latent has the shape {shape}; for Qwen-Image-2.1 it is [1, {channels}, height / {px}, "
                "width / {px}].\n\nWhat to do: encode the image with VAE Encode and this model's VAE.",
                code="graph_21.wrong_reference_shape",
                shape=list(latent.shape),
                channels=CHANNELS,
                px=TOKEN_PX,
            )
        if any((side - own) % 2 for side, own in zip(latent.shape[-2:], noise.shape[-2:], strict=True)):
            raise Unsupported(
                "An image of {width}x{height} px and a reference of {ref_width}x{ref_height} px are half a token out "
                "of line.\n\nWhat to do: use sides in multiples of {step} px for both.",
                code="graph_21.half_a_token",
                width=noise.shape[-1] * TOKEN_PX,
                height=noise.shape[-2] * TOKEN_PX,
                ref_width=latent.shape[-1] * TOKEN_PX,
                ref_height=latent.shape[-2] * TOKEN_PX,
                step=2 * TOKEN_PX,
            )
    tokens = entry["cross_attn"].shape[1]
    in_order = slots == sorted(slots) and all(0 <= slot <= tokens for slot in slots)
    if len(slots) != len(references) or not in_order:
        raise InvalidRequest(
            "A prompt's images ({count}) and the places it has for them ({slots}) do not match.\n\nWhat "
            "to do: encode prompt and images with one node that knows Qwen-Image-2.1, such as '{encode_edit}'; "
            "ReferenceLatent does not record this.",
            code="graph_21.places_of_references",
            count=len(references),
            slots=len(slots),
            encode_edit=ENCODE_EDIT,
        )
