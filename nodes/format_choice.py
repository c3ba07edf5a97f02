"""What `auto` stands for: the weight format that suits this machine and the person's limits."""

import logging

import torch

from ..engine.checkpoints.checkpoint import Checkpoint
from ..engine.errors import CacheError, InvalidRequest
from ..engine.families.variants import Variant
from ..engine.hardware import Hardware
from ..engine.plan.choice import choose_format
from ..engine.plan.request import Limits, SamplingRequest
from ..engine.quantized.weights import QuantizedWeights
from ..engine.transformer.parts import TransformerParts
from .adapters.limits import could_be_free
from .adapters.speeds import KnownSpeeds
from .weight_cache import AS_STORED, weight_cache_folder

logger = logging.getLogger(__name__)

# what the weights may become, the most faithful first; fp8 is as large as int8 and further from the weights
QUANTIZED = ("int8", "nf4")
# the picture that the reference makes, guided
TYPICAL_REQUEST = SamplingRequest(1328, 1328, branches=2, prompt_tokens=512, timesteps=20)


def suitable_format(
    source: Checkpoint,
    variant: Variant,
    *,
    dtype: torch.dtype,
    hardware: Hardware,
    vram_bytes: int | None,
    ram_bytes: int | None,
) -> str:
    """A weight_format of the loader, by the forecasts for a typical picture; limits of None are what is free now.

    A file that is quantized already stays as it is, and so does one whose quantized weights the disk has no room for.
    """
    versions = versions_of(source)
    if len(versions) == 1:
        return AS_STORED
    footprints = {
        name: TransformerParts(version, dtype=dtype, hardware=hardware, variant=variant).footprint
        for name, version in versions.items()
    }
    free_vram, free_ram = could_be_free(hardware.device)  # the model that this one replaces may still be there
    limits = Limits(vram_bytes or free_vram, ram_bytes or free_ram)
    choice = choose_format(footprints, TYPICAL_REQUEST, limits, KnownSpeeds(hardware, dtype, source.largest_file).get())
    logger.info("weight_format auto is %s at %s", choice, TYPICAL_REQUEST)
    return choice.name


def versions_of(source: Checkpoint) -> dict[str, Checkpoint]:
    """What `auto` chooses from, by weight_format, the most faithful first: the source, and headers of what it can
    become."""
    return {AS_STORED: source, **_quantized(source)}


def _quantized(source: Checkpoint) -> dict[str, Checkpoint]:
    """Headers of what the source can become, or has become."""
    found = {}
    for name in QUANTIZED:
        try:
            weights = QuantizedWeights.of(source, name, weight_cache_folder())
            if weights is None:
                continue
            weights.check_room()
        except (InvalidRequest, CacheError):
            continue
        found[name] = weights.checkpoint(data_start=0)
    return found
