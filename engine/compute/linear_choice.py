"""Which linear layers compute on their weights as stored: what a person chose, what the format and the device can."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from ..files.checkpoint import Checkpoint
from ..formats import StoredParam
from ..formats.int8 import Int8Codec
from ..formats.int8_convrot import Int8ConvrotCodec
from ..hardware import Hardware
from ..out_of_memory import shortage
from .half_products import activations_dtype
from .stored_products import FOR_ANY_DEVICE, Int8Product, StoredProduct, load_int8

_INT8 = "I8"  # of tensors that may hold such weights
_MOST_ERROR = 0.05  # of a small product, relative to the decoded weight's


class Computing(Enum):
    """EXACT: on decoded weights. FAST: on stored ones wherever that can be done. AS_COMFYUI: on those on which ComfyUI
    itself computes for the same file on the same card; exact elsewhere."""

    EXACT = "exact"
    AS_COMFYUI = "auto"
    FAST = "fast"


@dataclass(frozen=True)
class LinearChoice:
    """For each parameter that a file stores, how its layer computes. why_not: why nothing is computed as stored though
    that was asked for. could: whether the file may have weights that could be."""

    computing: Computing
    int8_backend: str = ""
    why_not: str = ""
    could: bool = True

    def product_of(self, param: StoredParam) -> StoredProduct | None:
        """None: the weight is decoded."""
        codec = param.decoder
        if self.computing is Computing.EXACT or not self.int8_backend or len(param.shape) != 2:
            return None
        if isinstance(codec, Int8ConvrotCodec):
            return Int8Product(self.int8_backend, codec.group)
        if isinstance(codec, Int8Codec) and (codec.factor == 1 or self.computing is Computing.FAST):
            return Int8Product(self.int8_backend, factor=codec.factor)
        return None


DECODED = LinearChoice(Computing.EXACT)


def linear_of(computing: Computing, file: Checkpoint, hardware: Sequence[Hardware], dtype: torch.dtype) -> LinearChoice:
    """As `choose_linear`, for what a file stores: for one without int8 nothing is tried, and on a CPU, where decoded
    weights are faster, nothing but FAST computes on stored ones."""
    if computing is Computing.AS_COMFYUI and any(place.host_device for place in hardware):
        return DECODED
    if all(entry.dtype != _INT8 for entry in file.tensors.values()):
        return LinearChoice(computing, why_not="the file holds no weights in int8", could=False)
    return choose_linear(computing, hardware, activations_dtype(dtype))


def choose_linear(computing: Computing, hardware: Sequence[Hardware], dtype: torch.dtype) -> LinearChoice:
    """What can be done on all of these devices with activations in that dtype: each is tried with a small product.
    Imports comfy-kitchen unless nothing is to be computed as stored."""
    if computing is Computing.EXACT:
        return DECODED
    try:
        load_int8()
    except (ImportError, AttributeError) as error:
        return LinearChoice(computing, why_not=f"the package comfy-kitchen is missing or too old ({error!s:.200})")
    backends = set()
    for device in (place.device for place in hardware):
        try:
            backends.add(_try_int8(device, dtype))
        except Exception as error:  # code of others, on a card that it may not know
            if shortage(error) is not None:
                raise  # which tells nothing of the card
            why_not = f"comfy-kitchen's int8 products do not work on '{device}' ({error!s:.200})"
            return LinearChoice(computing, why_not=why_not)
    # memory is planned for the one that takes the most
    return LinearChoice(computing, FOR_ANY_DEVICE if FOR_ANY_DEVICE in backends else min(backends))


@torch.no_grad()
def _try_int8(device: torch.device, dtype: torch.dtype) -> str:
    """The one of comfy-kitchen's backends that computes there; raises where none does, or a wrong result."""
    from comfy_kitchen.registry import registry

    x = torch.linspace(-1, 1, 64, device=device).to(dtype).repeat(32, 1)
    weight = torch.arange(-64, 64, 2, device=device).to(torch.int8).repeat(32, 1)
    scale = torch.full((32, 1), 1 / 64, device=device)
    arguments = {"x": x, "weight": weight, "weight_scale": scale, "bias": None, "out_dtype": dtype}
    arguments |= {"convrot": False, "convrot_groupsize": 256, "input_act": None}
    backend = registry.get_implementation("int8_linear", kwargs=arguments).__module__.split(".")[2]
    result = Int8Product(backend)(x, (weight, scale), None)
    expected = x.float() @ (weight.float() * scale).T
    error = ((result.float() - expected).norm() / expected.norm()).item()
    if not error < _MOST_ERROR:
        raise RuntimeError(f"their results were wrong when they were tried: error {error:.2g}")
    return str(backend)
