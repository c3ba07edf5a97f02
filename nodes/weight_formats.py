"""What `fastest` stands for: the weight format that suits this machine and the person's limits; and when to say so."""

from dataclasses import dataclass
from enum import Enum

import torch

from ..engine.errors import CacheError, InvalidRequest
from ..engine.files.checkpoint import Checkpoint
from ..engine.hardware import Hardware
from ..engine.log import logger
from ..engine.out_of_memory import reason, shortage
from ..engine.planning.format_choice import FormatChoice, choose_format
from ..engine.planning.request import Limits, SamplingRequest
from .adapters.known_speeds import known_speeds
from .adapters.limits import could_be_free
from .adapters.networks import served_of
from .cache_folder import weight_cache_folder
from .weight_cache import AS_STORED, quantized_weights

# what the weights may become, the most faithful first; fp8 is as large as int8 and further from the weights
QUANTIZED = ("int8", "nf4")
# from how many times the speed on another format is worth a sentence
MUCH_FASTER = 1.5
# the image that the reference makes, guided
TYPICAL_REQUEST = SamplingRequest(1328, 1328, branches=2, prompt_tokens=512, timesteps=20)


@dataclass(frozen=True)
class Parts:
    """How a source is opened, whatever its format."""

    variant: Enum
    dtype: torch.dtype
    hardware: Hardware


def fastest_format(source: Checkpoint, parts: Parts, limits: Limits) -> str:
    """What `fastest` stands for: a weight_format of the loader, by the forecasts for a typical image.

    A file that is quantized already stays as it is, and so does one whose quantized weights the disk has no room for.
    It is chosen when the loader runs, and stays until the loader runs again: one image from one session.
    """
    choice = forecast_formats(source, parts, limits)
    if choice is None:
        return AS_STORED
    logger.info("weight_format fastest is %s at %s", choice, TYPICAL_REQUEST)
    return choice.name


def advice_for(source: Checkpoint, parts: Parts, limits: Limits) -> str:
    """A sentence where another format than the stored one would be much faster; else an empty text.

    What cannot be measured costs the advice, not the load.
    """
    try:
        choice = forecast_formats(source, parts, limits)
    except (OSError, RuntimeError, MemoryError) as error:
        if shortage(error) is None and not isinstance(error, OSError):
            raise
        logger.warning("No advice about weight_format: the machine could not be measured (%s).", reason(error))
        return ""
    return "" if choice is None else advice_of(choice)


def advice_of(choice: FormatChoice) -> str:
    """The same of forecasts that are there, with the stored format's among them."""
    stored, best = choice.forecasts.get(AS_STORED), choice.forecasts.get(choice.name)
    if best is None or choice.name == AS_STORED or (stored and stored.seconds < MUCH_FASTER * best.seconds):
        return ""
    instead = f"{stored.seconds:.1f} s as stored" if stored else "weights as stored, which do not fit"
    return (
        f"{choice.name} weights would take {best.seconds:.1f} s per step ({TYPICAL_REQUEST}) instead of {instead}, and "
        "make a slightly different image: for that, set weight_format to fastest."
    )


def forecast_formats(source: Checkpoint, parts: Parts, limits: Limits) -> FormatChoice | None:
    """By this machine's speeds, which are measured where they are not known; None where there is no choice."""
    versions = versions_of(source)
    if len(versions) == 1:
        return None
    footprints = {
        name: served_of(source)
        .family.parts(version, dtype=parts.dtype, hardware=parts.hardware, variant=parts.variant)
        .footprint
        for name, version in versions.items()
    }
    speeds = known_speeds(parts.hardware, parts.dtype, source.largest_file).get()
    return choose_format(footprints, TYPICAL_REQUEST, limits, speeds)


def limits_now(device: torch.device, vram_bytes: int | None, ram_bytes: int | None) -> Limits:
    """Limits of None are what is free now, or could be: the model that this one replaces may still be there."""
    free_vram, free_ram = could_be_free(device)
    return Limits(vram_bytes or free_vram, ram_bytes or free_ram)


def versions_of(source: Checkpoint) -> dict[str, Checkpoint]:
    """What `fastest` chooses from, by weight_format, the most faithful first: the source, and headers of what it can
    become."""
    return {AS_STORED: source, **_quantized(source)}


def _quantized(source: Checkpoint) -> dict[str, Checkpoint]:
    """Headers of what the source can become, or has become."""
    found = {}
    for name in QUANTIZED:
        try:
            weights = quantized_weights(source, name)
            if weights is None or weights.path.parent != weight_cache_folder():  # nothing is made for one session
                continue
            weights.check_room()
        except (InvalidRequest, CacheError):
            continue
        found[name] = weights.checkpoint(data_start=0)
    return found
