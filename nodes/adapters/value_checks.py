"""Values that no widget gives and graphs send all the same: numbers, latents, conditionings and masks, refused by name.

ComfyUI checks what is typed into a widget, not what is linked to it, and lets NaN pass.
"""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...engine.compute.finite import is_finite
from ...engine.errors import InvalidRequest
from ...engine.planning.request import GIB
from ...engine.texts import half_character, shown

_MOST = sys.float_info.max
_NUMBERS: Any = (Integral, float, np.floating)  # that tensors compute with: fractions are none of them


def check_widgets(inputs: Mapping[str, Mapping[str, Any]], **values: Any) -> None:
    """Raise InvalidRequest for a value that the widget or socket of its name would not give: a number, switch, text or
    choice, or a model; `inputs`: as INPUT_TYPES."""
    specs = {name: spec for group in inputs.values() for name, spec in group.items()}
    for name, value in values.items():
        kind, options = specs[name]
        needed = _CHECKS["CHOICE" if isinstance(kind, list) else kind](value, kind, options)
        if needed:
            raise InvalidRequest(
                "{name} is {value}; it must be {needed}.\n\nWhat to do: set {name}, or change what is connected to it.",
                code="value.wrong",
                name=name,
                value=shown(value),
                needed=needed,
            )


def limit_bytes(value_gb: float) -> int | None:
    """A limit in bytes; None for 0, which means none. Next to nothing is a limit, too."""
    return max(1, round(value_gb * GIB)) if value_gb else None


def latent_of(name: str, value: Any) -> Tensor:
    """The tensor of a LATENT: floating point, (B, C, H, W) or (B, C, F, H, W), finite, no dimension empty."""
    samples = value.get("samples") if isinstance(value, Mapping) else None
    if not isinstance(samples, Tensor):
        raise InvalidRequest(
            "{name} is not a latent: it has no 'samples'.\n\nWhat to do: connect EmptySD3LatentImage, or VAE Encode.",
            code="value.no_samples",
            name=name,
        )
    check_latent(name, samples)
    return samples


def check_latent(name: str, samples: Any) -> None:
    """Raise InvalidRequest for what is no latent of an image."""
    if not isinstance(samples, Tensor):
        raise InvalidRequest(
            "{name} is {value}, not a latent.\n\nWhat to do: check the node that makes it.",
            code="value.no_latent",
            name=name,
            value=shown(samples),
        )
    if samples.ndim not in (4, 5) or 0 in samples.shape or not _is_wide(samples):
        raise InvalidRequest(
            "{name} is a latent of shape {shape} in {dtype}; one or more images of at least one latent pixel are "
            "needed, (B, C, H, W) or (B, C, F, H, W).\n\nWhat to do: check the node that makes it.",
            code="value.wrong_latent_shape",
            name=name,
            shape=list(samples.shape),
            dtype=samples.dtype,
        )
    _check_finite(name, samples)


def check_channels(name: str, latent: Tensor, channels: int) -> None:
    """Raise InvalidRequest for another model's latent."""
    if latent.shape[1] != channels:
        raise InvalidRequest(
            "{name} is a latent of {channels} channels, but {needed} are needed: it belongs to another model.\n\nWhat "
            "to do: use EmptySD3LatentImage, or encode images with this model's VAE.",
            code="value.other_latent_channels",
            name=name,
            channels=latent.shape[1],
            needed=channels,
        )


def check_conditioning(name: str, entries: Any) -> None:
    """Raise InvalidRequest for a CONDITIONING without a prompt, or with numbers that are none."""
    check_prompts(name, entries)
    for embeds, options in entries:
        check_embeds(name, embeds)
        check_references(name, options.get("reference_latents"))


def check_prompts(name: str, entries: Any, *, least: int = 1) -> None:
    """Raise InvalidRequest for what is no CONDITIONING of at least so many prompts. Looks at none of them."""
    pairs = entries if isinstance(entries, list | tuple) else None
    if (
        pairs is None
        or len(pairs) < least
        or not all(isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[1], dict) for pair in pairs)
    ):
        raise InvalidRequest(
            "{name} holds no prompt.\n\nWhat to do: connect a node that encodes one, such as Encode Prompts.",
            code="value.no_prompt",
            name=name,
        )


def check_references(name: str, references: Any, channels: int | None = None) -> None:
    """Raise InvalidRequest unless these are a list of latents, of as many channels (None: any), or None."""
    if references is None:
        return
    if not isinstance(references, list | tuple):
        raise InvalidRequest(
            "The reference latents of {name} are {kind}, not a list of latents.\n\nWhat to do: use ReferenceLatent.",
            code="value.wrong_references",
            name=name,
            kind=shown(type(references).__name__),
        )
    for reference in references:
        check_latent(f"A reference latent of {name}", reference)
        if channels is not None:
            check_channels(f"A reference latent of {name}", reference, channels)


def check_embeds(name: str, embeds: Any) -> None:
    """Raise InvalidRequest unless these are embeddings of a prompt, (B, L, dim)."""
    if not isinstance(embeds, Tensor) or embeds.ndim != 3 or 0 in embeds.shape or not _is_wide(embeds):
        shape = f"{list(embeds.shape)} in {embeds.dtype}" if isinstance(embeds, Tensor) else type(embeds).__name__
        raise InvalidRequest(
            "{name} is {shape}, not the embeddings of a prompt (B, L, dim).\n\nWhat to do: encode the prompt with the "
            "loader's CLIP.",
            code="value.no_embeddings",
            name=name,
            shape=shape,
        )
    _check_finite(name, embeds)


def check_image(name: str, image: Any) -> None:
    """Raise InvalidRequest unless this is an IMAGE with pixels, (B, H, W, C)."""
    if not isinstance(image, Tensor) or image.ndim != 4 or 0 in image.shape or not _is_wide(image):
        shape = f"{list(image.shape)} in {image.dtype}" if isinstance(image, Tensor) else type(image).__name__
        raise InvalidRequest(
            "{name} is {shape}, not images (B, H, W, C).\n\nWhat to do: connect a Load Image node.",
            code="value.no_images",
            name=name,
            shape=shape,
        )
    _check_finite(name, image)


def check_mask(name: str, mask: Any) -> None:
    """Raise InvalidRequest unless this is a MASK with pixels, (..., H, W)."""
    if not isinstance(mask, Tensor) or mask.ndim < 2 or 0 in mask.shape or not _is_wide(mask):
        shape = f"{list(mask.shape)} in {mask.dtype}" if isinstance(mask, Tensor) else shown(mask)
        raise InvalidRequest(
            "{name} is {shape}, not masks (..., H, W) of numbers between 0 and 1.\n\nWhat to do: check the node that "
            "makes it.",
            code="value.no_masks",
            name=name,
            shape=shape,
        )
    _check_finite(name, mask)


def check_number(name: str, value: Any, *, least: float = -_MOST) -> None:
    """Raise InvalidRequest for what is no number, NaN and infinity included, or less than `least`."""
    # NaN is neither more nor less than anything
    if not isinstance(value, _NUMBERS) or not least <= value <= _MOST:
        bound = "" if least == -_MOST else f" of {least} or more"
        raise InvalidRequest(
            "{name} is {value}; a number{bound} is needed.\n\nWhat to do: check what sets it.",
            code="value.no_number",
            name=name,
            value=shown(value),
            bound=bound,
        )


def _check_finite(name: str, tensor: Tensor) -> None:
    if tensor.is_meta or tensor.layout is not torch.strided:
        raise InvalidRequest(
            "{name} is a tensor whose numbers cannot be read ({layout}, on {device}).\n\nWhat to do: check the node "
            "that makes it.",
            code="value.unreadable_tensor",
            name=name,
            layout=tensor.layout,
            device=tensor.device,
        )
    if not is_finite(tensor):
        raise InvalidRequest(
            "{name} holds numbers that are not finite (NaN or infinity).\n\nWhat to do: check the node that makes it; "
            "fp16 overflows in some models, bf16 and fp32 do not.",
            code="value.not_finite",
            name=name,
        )


def _is_wide(tensor: Tensor) -> bool:
    """Whether it holds floating-point numbers that can be computed with, which fp8's cannot."""
    return tensor.is_floating_point() and tensor.itemsize > 1


def _wrong_number(value: Any, kind: str, options: Mapping[str, Any], *, of: Any, words: str) -> str:
    least, most = options["min"], options["max"]
    # NaN is neither more nor less than anything
    if isinstance(value, of) and not isinstance(value, bool) and least <= value <= most:
        return ""
    return f"{words} from {least} to {most}"


def _wrong_switch(value: Any, kind: str, options: Mapping[str, Any]) -> str:
    return "" if isinstance(value, bool) else "true or false"


def _wrong_text(value: Any, kind: str, options: Mapping[str, Any]) -> str:
    if not isinstance(value, str):
        return "text"
    half = half_character(value)
    return "" if half is None else f"text of whole characters (number {half + 1} is one half of one)"


def _wrong_choice(value: Any, kind: Sequence[str], options: Mapping[str, Any]) -> str:
    return "" if isinstance(value, str) and value in kind else f"one of: {', '.join(kind)}"


def _wrong_model(value: Any, kind: str, options: Mapping[str, Any], *, methods: Sequence[str], words: str) -> str:
    """By what it can do: other packs' models are none of ComfyUI's classes."""
    return "" if all(callable(getattr(value, method, None)) for method in methods) else f"{words} of a loader"


_CHECKS: Mapping[str, Any] = {
    "INT": partial(_wrong_number, of=Integral, words="a whole number"),
    "FLOAT": partial(_wrong_number, of=_NUMBERS, words="a number"),
    "BOOLEAN": _wrong_switch,
    "STRING": _wrong_text,
    "CHOICE": _wrong_choice,
    "MODEL": partial(_wrong_model, methods=("clone", "get_model_object"), words="the model"),
    "CLIP": partial(_wrong_model, methods=("tokenize", "encode_from_tokens_scheduled"), words="the text encoder"),
    "VAE": partial(_wrong_model, methods=("decode", "encode"), words="the VAE"),
}
