"""What models compute in where a person leaves that open. A card without bf16 is measured once."""

from collections.abc import Callable, MutableMapping

import torch
from torch.nn import functional as F

from ..compute.half_products import half_linear
from ..compute.relative_error import WRONG, relative_error
from ..files.checkpoint import Checkpoint
from ..hardware import Hardware
from ..log import logger
from ..out_of_memory import shortage
from .machine_speeds import MEASURING_BYTES, measure_flops

_MOST_ERROR = 5e-3  # of a product in fp16, relative to fp32: ten times what rounding makes
_SPEED, _ERROR = "speed of fp16 products, relative to fp32's", "error of fp16 products"


def half_is_faster(
    hardware: Hardware,
    card: str,
    tried: MutableMapping[str, float],
    make_room: Callable[[int], None] = lambda nbytes: None,
) -> bool:
    """Whether products in fp16, with activations in fp32, are right on this card and faster than fp32: measured once,
    which takes a second.

    card: by which it is known from run to run. tried: what outlives the process. make_room is called before anything is
    measured, with the bytes that this takes on the device.
    """
    of_card = f"torch {torch.__version__}, {card}"
    keys = [f"{what}, {of_card}" for what in (_ERROR, _SPEED)]
    if not all(key in tried for key in keys):
        make_room(MEASURING_BYTES)
        error = product_error(hardware.device)
        half = measure_flops(hardware, torch.float16) if error <= _MOST_ERROR else 0.0
        tried[keys[0]] = error
        tried[keys[1]] = half / measure_flops(hardware, torch.float32) if half else 0.0
    error, speed = (tried[key] for key in keys)
    logger.info(
        "%s does not support bf16. Products in fp16 were %.1f times as fast as in fp32, with an error of %.1e.",
        card,
        speed,
        error,
    )
    return error <= _MOST_ERROR and speed > 1


def auto_dtype(
    file: Checkpoint, *, has_bf16: bool, device: torch.device, half_is_faster: Callable[[], bool]
) -> torch.dtype:
    """Of a transformer: bf16 where the device has it, fp32 for files in that. On cards without bf16 fp16 with
    activations in fp32, where it is faster."""
    if file.full_precision:
        return torch.float32
    if has_bf16:
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" and half_is_faster() else torch.float32


def encoder_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of a text encoder, where `dtype` was chosen for all: in fp16 its sums overflow."""
    return torch.float32 if dtype == torch.float16 else dtype


@torch.no_grad()
def product_error(device: torch.device) -> float:
    """Of a product whose numbers are as large as the model's become."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, generator=generator) for size in ((64, 1024), (256, 1024)))
    x, weight = (x * 1e6).to(device), weight.to(device, torch.float16)
    try:
        made = half_linear(x, weight)
    except RuntimeError as error:
        if shortage(error) is not None:
            raise  # which tells nothing of the card
        logger.debug("Products in fp16: %s", error)
        return WRONG
    return relative_error(made, F.linear(x, weight.float()))
