"""What no run of our MODEL could use of a graph's latents, conditions and schedule, said in words before anything is
loaded, whichever sampler brings it."""

from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ...engine.errors import InvalidRequest
from ...engine.models.qwen_image.schedule import MOST_STEPS
from ...engine.texts import shown
from .run_conditions import Conds, size_of
from .value_checks import check_channels, check_embeds, check_latent, check_mask, check_number, check_references


def check_values(
    guider: Any, noise: Tensor, latent_image: Tensor, sigmas: Tensor, denoise_mask: Tensor | None, channels: int
) -> None:
    """Raise InvalidRequest for latents, masks, prompts and schedules that are none, and for another model's latents;
    `channels`: of this one's."""
    for name, latents in (("The noise", noise), ("The latent image", latent_image)):
        check_latent(name, latents)
    check_channels("The latent image", noise, channels)
    for name, entries in guider.conds.items():
        for entry in entries or ():
            _check_entry(f"The {name} conditioning", entry, channels)
    for name in ("cfg", "cfg1", "cfg2"):  # DualCFGGuider has two more
        check_number(name, getattr(guider, name, 1.0))
    if denoise_mask is not None:
        check_mask("The noise mask", denoise_mask)
    # each step takes 4.4 MB of the modulation's table
    most = MOST_STEPS + 1
    if sigmas.ndim != 1 or not 2 <= len(sigmas) <= most or not torch.isfinite(sigmas).all():
        raise InvalidRequest(
            "The schedule has shape {shape}, or numbers that are not finite; 2 to {most} sigmas are needed.\n\nWhat "
            "to do: check the scheduler's steps and denoise.",
            code="sampling.wrong_sigmas",
            shape=list(sigmas.shape),
            most=most,
        )


def check_computed(conds: Conds, shape: Sequence[int]) -> None:
    """Of the conditions that will be computed, for latents of this shape: raise InvalidRequest where a prompt has none
    (its half of the guidance would be zero), and for areas that are not within the latent."""
    for name, entries in conds.items():
        if not entries:
            raise InvalidRequest(
                "The {name} conditioning holds no prompt.\n\nWhat to do: connect a node that encodes one.",
                code="conditioning.no_prompt",
                name=name,
            )
        for entry in entries:
            area = entry.get("area") or ()
            if min(size_of(entry, shape)) < 1 or any(side < 0 for side in area):
                raise InvalidRequest(
                    "The {name} conditioning has an area without pixels, or outside the image: {area} in latent "
                    "pixels (height, width, from the top, from the left).\n\nWhat to do: set an area inside the image.",
                    code="conditioning.area_without_pixels",
                    name=name,
                    area=list(area),
                )


def check_result(latents: Tensor) -> None:
    """Raise InvalidRequest for what would be a black image. Guidance, samplers and patches of others may make it."""
    if not torch.isfinite(latents).all():
        raise InvalidRequest(
            "The sampled latents hold numbers that are not finite (NaN or infinity): the image would be "
            "black.\n\nWhat to do: check the values in the nodes that change guidance, sampler or model, and the "
            "strength of each LoRA.",
            code="sampling.latents_not_finite",
        )


def _check_entry(name: str, entry: dict[str, Any], channels: int) -> None:
    check_embeds(name, entry.get("cross_attn"))
    tokens, mask = entry["cross_attn"].shape[1], entry.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape[-1:] != (tokens,)):
        given = list(mask.shape) if isinstance(mask, Tensor) else shown(mask)
        raise InvalidRequest(
            "{name}: the attention mask is {given}, but the prompt has {tokens} tokens.\n\nWhat to do: connect the "
            "conditioning from a text encode node directly.",
            code="conditioning.wrong_mask",
            name=name,
            given=given,
            tokens=tokens,
        )
    of = f"t{name[1:]}"  # within a sentence
    if entry.get("mask") is not None:
        check_mask(f"The mask of {of}", entry["mask"])
    if not _is_area(entry.get("area")):
        raise InvalidRequest(
            "{name}: its area is {area}, not in whole latent pixels or percentages (height, width, from the top, from "
            "the left).\n\nWhat to do: use ComfyUI's area nodes.",
            code="conditioning.wrong_area",
            name=name,
            area=shown(entry["area"]),
        )
    for what, value in _numbers_of(entry):
        check_number(f"{name}: its {what}", value)
    check_references(of, entry.get("reference_latents"), channels)


def _is_area(area: Any) -> bool:
    """None is one: the whole image. Of latents with frames there are six numbers."""
    if not isinstance(area, list | tuple) or not area:
        return area is None
    in_percent = isinstance(area[0], str) and area[0] == "percentage"
    sides = area[1:] if in_percent else area
    kind: Any = (Integral, float) if in_percent else Integral
    return len(sides) in (4, 6) and all(isinstance(side, kind) and not isinstance(side, bool) for side in sides)


def _numbers_of(entry: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in ("strength", "mask_strength", "start_percent", "end_percent"):
        if name in entry:
            yield name, entry[name]
    yield from (("area", side) for side in entry.get("area") or () if side != "percentage")
