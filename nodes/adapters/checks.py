"""Values that no widget gives and graphs send all the same: numbers, latents, conditionings and masks, refused by name.

ComfyUI checks what is typed into a widget, not what is linked to it, and lets NaN pass.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...engine.errors import InvalidRequest
from ...engine.plan.request import GIB


def check_widgets(inputs: Mapping[str, Mapping[str, Any]], **values: Any) -> None:
    """Raise InvalidRequest for a number that the widget of its name would not take; `inputs`: as INPUT_TYPES."""
    specs = {name: spec for group in inputs.values() for name, spec in group.items()}
    for name, value in values.items():
        kind, options = specs[name]
        whole = kind == "INT"
        known = type(value) is int or (type(value) is float and not whole)
        if not known or not math.isfinite(value) or not options["min"] <= value <= options["max"]:
            number = "whole number" if whole else "number"
            raise InvalidRequest(
                f"{name} is {value!r:.60}; a {number} from {options['min']} to {options['max']} is needed.\n\n"
                f"What to do: set {name}, or change what is linked to it."
            )


def limit_bytes(value_gb: float) -> int | None:
    """A limit in bytes; None for 0, which means none. Next to nothing is a limit, too."""
    return max(1, round(value_gb * GIB)) if value_gb else None


def latent_of(name: str, value: Any) -> Tensor:
    """The tensor of a LATENT: floating point, (B, C, H, W) or (B, C, F, H, W), finite, no dimension empty."""
    samples = value.get("samples") if isinstance(value, Mapping) else None
    if not isinstance(samples, Tensor):
        raise InvalidRequest(
            f"{name} is no latent: it has no 'samples'.\n\nWhat to do: connect EmptySD3LatentImage, or a VAE Encode."
        )
    check_latent(name, samples)
    return samples


def check_latent(name: str, samples: Tensor) -> None:
    """Raise InvalidRequest for a tensor that is no latent of an image."""
    if samples.ndim not in (4, 5) or 0 in samples.shape or not samples.is_floating_point():
        raise InvalidRequest(
            f"{name} is a latent of shape {list(samples.shape)} in {samples.dtype}; one or more images of at least one "
            "latent pixel are needed, (B, C, H, W) or (B, C, F, H, W).\n\nWhat to do: check the node that makes it."
        )
    _check_finite(name, samples)


def check_conditioning(name: str, entries: Any) -> None:
    """Raise InvalidRequest for a CONDITIONING without a prompt, or with numbers that are none."""
    pairs = entries if isinstance(entries, Sequence) and not isinstance(entries, str) else ()
    if not pairs or not all(isinstance(pair, Sequence) and len(pair) == 2 for pair in pairs):
        raise InvalidRequest(
            f"{name} holds no prompt.\n\nWhat to do: connect a node that encodes one, such as Encode Prompts."
        )
    for embeds, options in pairs:
        check_embeds(name, embeds)
        for reference in (options or {}).get("reference_latents") or ():
            check_latent(f"A reference latent of {name}", reference)


def check_embeds(name: str, embeds: Any) -> None:
    """Raise InvalidRequest unless these are embeddings of a prompt, (B, L, dim)."""
    if not isinstance(embeds, Tensor) or embeds.ndim != 3 or 0 in embeds.shape:
        shape = list(embeds.shape) if isinstance(embeds, Tensor) else type(embeds).__name__
        raise InvalidRequest(
            f"{name} is {shape}, not the embeddings of a prompt (B, L, dim).\n\nWhat to do: encode the prompt with the "
            "loader's CLIP."
        )
    _check_finite(name, embeds)


def check_image(name: str, image: Any) -> None:
    """Raise InvalidRequest unless this is an IMAGE with pixels, (B, H, W, C)."""
    if not isinstance(image, Tensor) or image.ndim != 4 or 0 in image.shape:
        shape = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise InvalidRequest(f"{name} is {shape}, not images (B, H, W, C).\n\nWhat to do: connect a Load Image.")
    _check_finite(name, image)


def _check_finite(name: str, tensor: Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise InvalidRequest(
            f"{name} holds numbers that are not finite (NaN or infinity).\n\nWhat to do: check the node that makes it; "
            "fp16 overflows in some models, bf16 or fp32 do not."
        )
