"""Which linear layers compute on their weights as stored: what a person chose, what the format and the device can."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..files.checkpoint import Checkpoint
from ..formats import StoredParam
from ..formats.int8 import Int8Codec
from ..formats.int8_convrot import Int8ConvrotCodec
from ..formats.scaled_fp8 import ScaledFp8Codec
from ..hardware import Hardware
from ..out_of_memory import shortage
from .half_products import activations_dtype
from .relative_error import relative_error
from .stored_products import FOR_ANY_DEVICE, Fp8Product, Int8Product, StoredProduct, load_fp8, load_int8

_FP8 = "F8_E4M3"  # of the data that products take
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
    that was asked for."""

    computing: Computing
    int8_backend: str = ""
    fp8_backend: str = ""
    why_not: str = ""

    def product_of(self, param: StoredParam) -> StoredProduct | None:
        """None: the weight is decoded."""
        codec = param.decoder
        fast = self.computing is Computing.FAST
        if self.computing is Computing.EXACT or len(param.shape) != 2 or (param.full_products and not fast):
            return None
        if isinstance(codec, ScaledFp8Codec):
            data, scale = param.parts
            one = data.dtype == _FP8 and prod(scale.shape) == 1
            return Fp8Product(self.fp8_backend) if self.fp8_backend and one else None
        if not self.int8_backend:
            return None
        if isinstance(codec, Int8ConvrotCodec):
            return Int8Product(self.int8_backend, codec.group)
        if isinstance(codec, Int8Codec) and (codec.factor == 1 or fast):
            return Int8Product(self.int8_backend, factor=codec.factor)
        return None


DECODED = LinearChoice(Computing.EXACT)


def linear_of(computing: Computing, file: Checkpoint, hardware: Sequence[Hardware], dtype: torch.dtype) -> LinearChoice:
    """What can be done for a file on all of these devices. On a CPU, where decoded weights are faster, nothing but FAST
    computes on stored ones. Each kind of numbers that the file holds is tried with a small product on each device;
    comfy-kitchen is imported where there is any."""
    if computing is Computing.EXACT:
        return DECODED
    if computing is Computing.AS_COMFYUI and any(place.host_device for place in hardware):
        return DECODED
    stored = {entry.dtype for entry in file.tensors.values()}
    trials = [trial for kind, trial in (("I8", _INT8), ("F8_E4M3", _FP8_TRIAL)) if kind in stored]
    if computing is Computing.AS_COMFYUI and not all(_comfyui_multiplies_fp8(place.device) for place in hardware):
        trials = [trial for trial in trials if trial is not _FP8_TRIAL]
    if not trials and computing is Computing.AS_COMFYUI:
        return DECODED
    if not trials:
        return LinearChoice(computing, why_not="the file holds no weights in int8 or fp8")
    return choose_linear(computing, hardware, activations_dtype(dtype), trials)


def choose_linear(
    computing: Computing, hardware: Sequence[Hardware], dtype: torch.dtype, trials: "Sequence[_Trial] | None" = None
) -> LinearChoice:
    """The same for activations in `dtype`, and for all kinds of numbers unless `trials` names some."""
    backends = {trial.field: "" for trial in _TRIALS}
    reasons = []
    for trial in _TRIALS if trials is None else trials:
        found, why_not = _backend(trial, hardware, dtype)
        backends[trial.field] = found
        reasons += [why_not] if why_not else []
    why_not = "" if any(backends.values()) else "; ".join(reasons)
    return LinearChoice(computing, backends["int8_backend"], backends["fp8_backend"], why_not)


@dataclass(frozen=True)
class _Trial:
    """name: of the numbers. field: of LinearChoice. run: a small product's result and what it should be, and the
    backend of comfy-kitchen's that computes it; raises what that raises."""

    name: str
    field: str
    run: Callable[[torch.device, torch.dtype], tuple[Tensor, Tensor, str]]


def _backend(trial: _Trial, hardware: Sequence[Hardware], dtype: torch.dtype) -> tuple[str, str]:
    """The backend that memory is planned for, or why there is none."""
    backends = set()
    for device in (place.device for place in hardware):
        try:
            result, expected, backend = trial.run(device, dtype)
        except (ImportError, AttributeError) as error:
            return "", f"the package comfy-kitchen is missing or too old ({error!s:.200})"
        except Exception as error:  # code of others, on a card that it may not know
            if shortage(error) is not None:
                raise  # which tells nothing of the card
            return "", f"comfy-kitchen's {trial.name} products do not work on '{device}' ({error!s:.200})"
        off = relative_error(result, expected)
        if off >= _MOST_ERROR:
            return "", f"comfy-kitchen's {trial.name} products are wrong on '{device}': error {off:.2g} when tried"
        backends.add(backend)
    return FOR_ANY_DEVICE if FOR_ANY_DEVICE in backends else min(backends), ""


@torch.no_grad()
def _try_int8(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, str]:
    load_int8()
    x = torch.linspace(-1, 1, 64, device=device).to(dtype).repeat(32, 1)
    weight = torch.arange(-64, 64, 2, device=device).to(torch.int8).repeat(32, 1)
    scale = torch.full((32, 1), 1 / 64, device=device)
    arguments = {"x": x, "weight": weight, "weight_scale": scale, "bias": None, "out_dtype": dtype}
    arguments |= {"convrot": False, "convrot_groupsize": 256, "input_act": None}
    backend = _implementation("int8_linear", arguments)
    return Int8Product(backend)(x, (weight, scale), None), x.float() @ (weight.float() * scale).T, backend


@torch.no_grad()
def _try_fp8(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, str]:
    load_fp8()
    if dtype not in (torch.bfloat16, torch.float16):
        raise RuntimeError("they answer in 16 bits")
    x = torch.linspace(-1, 1, 64, device=device).to(dtype).repeat(32, 1)
    scale = torch.full((), 1 / 64, device=device)
    weight = torch.linspace(-64, 64, 64, device=device).to(torch.float8_e4m3fn).repeat(32, 1)
    arguments = {"x": x, "scale": scale, "output_type": torch.float8_e4m3fn}
    backend = _implementation("quantize_per_tensor_fp8", arguments)
    result = Fp8Product(backend)(x, (weight, scale), None)
    return result, x.float() @ (weight.float() * scale).T, backend


def _implementation(function: str, arguments: Mapping[str, Any]) -> str:
    from comfy_kitchen.registry import registry

    return str(registry.get_implementation(function, kwargs=arguments).__module__.split(".")[2])


def _comfyui_multiplies_fp8(device: torch.device) -> bool:
    """As ComfyUI asks (comfy/model_management.py supports_fp8_compute): NVIDIA's cards from 8.9 on."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


_INT8, _FP8_TRIAL = _Trial("int8", "int8_backend", _try_int8), _Trial("fp8", "fp8_backend", _try_fp8)
_TRIALS = (_INT8, _FP8_TRIAL)
