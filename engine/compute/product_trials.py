"""Small products with stored weights, tried before a model is: whether comfy-kitchen has them, on which backend, and
whether they are right there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..formats.nunchaku_codecs import SHIFT
from ..formats.rotation import hadamard_bytes, take_hadamard
from ..formats.scratch import Scratch
from ..hardware import Hardware
from ..out_of_memory import shortage
from .block_scaled_products import Mxfp8Product, Nvfp4Product, load_mxfp8, load_nvfp4
from .eight_bit_products import Fp8Product, Int8Product, load_fp8, load_int8
from .four_bit_products import W4a4Product, W4a8Product, load_w4a4, load_w4a8
from .relative_error import relative_error
from .stored_products import FOR_ANY_DEVICE
from .svdquant_products import SvdquantProduct, load_svdquant

_MOST_ERROR = 0.05  # of a small product, relative to the decoded weight's
_GROUP = 256  # that ComfyUI's files are rotated in

# a small product's result and what it should be, and the backend of comfy-kitchen's that computes it
Tried = tuple[Tensor, Tensor, str]


@dataclass(frozen=True)
class Trial:
    """name: of the product. dtypes: of its weights, as described tensors have them begin. run: raises what that raises.
    comfyui_does: whether ComfyUI multiplies such weights as they are stored on a device."""

    name: str
    dtypes: tuple[str, ...]
    run: Callable[[torch.device, torch.dtype], Tried]
    comfyui_does: Callable[[torch.device], bool] = lambda device: True


def backend_of(trial: Trial, hardware: Sequence[Hardware], dtype: torch.dtype) -> tuple[str, str]:
    """The backend that memory is planned for, or why there is none."""
    backends = set()
    for device in (place.device for place in hardware):
        try:
            result, expected, backend = trial.run(device, dtype)
        except (ImportError, AttributeError) as error:
            return "", f"the package comfy-kitchen is missing or too old for {trial.name} products ({error!s:.200})"
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
def _try_int8(device: torch.device, dtype: torch.dtype) -> Tried:
    load_int8()
    x = torch.linspace(-1, 1, 64, device=device).to(dtype).repeat(32, 1)
    weight = torch.arange(-64, 64, 2, device=device).to(torch.int8).repeat(32, 1)
    scale = torch.full((32, 1), 1 / 64, device=device)
    arguments = {"x": x, "weight": weight, "weight_scale": scale, "bias": None, "out_dtype": dtype}
    arguments |= {"convrot": False, "convrot_groupsize": 256, "input_act": None}
    backend = _implementation("int8_linear", arguments)
    return Int8Product(backend)(x, (weight, scale), None), x.float() @ (weight.float() * scale).T, backend


@torch.no_grad()
def _try_fp8(device: torch.device, dtype: torch.dtype) -> Tried:
    load_fp8()
    _require_16_bits(dtype)
    x = torch.linspace(-1, 1, 64, device=device).to(dtype).repeat(32, 1)
    scale = torch.full((), 1 / 64, device=device)
    weight = torch.linspace(-64, 64, 64, device=device).to(torch.float8_e4m3fn).repeat(32, 1)
    arguments = {"x": x, "scale": scale, "output_type": torch.float8_e4m3fn}
    backend = _implementation("quantize_per_tensor_fp8", arguments)
    result = Fp8Product(backend)(x, (weight, scale), None)
    return result, x.float() @ (weight.float() * scale).T, backend


@torch.no_grad()
def _try_w4a4(device: torch.device, dtype: torch.dtype) -> Tried:
    load_w4a4()
    rotated, x = _whole_numbers(device, dtype)
    codes = torch.arange(32 * _GROUP // 2, device=device).view(32, -1).to(torch.int8)
    scale = torch.full((32,), 1 / 64, device=device)
    arguments = {"x": x, "qweight": codes, "wscales": scale, "bias": None, "convrot_groupsize": _GROUP}
    backend = _implementation("convrot_w4a4_linear", arguments | {"quant_group_size": 64, "linear_dtype": "int4"})
    weight = torch.stack([codes << 4 >> 4, codes >> 4], 2).view(32, -1).float() * scale[:, None]
    return W4a4Product(backend, _GROUP)(x, (codes, scale), None), rotated @ weight.T, backend


@torch.no_grad()
def _try_w4a8(device: torch.device, dtype: torch.dtype) -> Tried:
    load_w4a8()
    rotated, x = _whole_numbers(device, dtype)
    codes = torch.arange(32 * _GROUP // 2, device=device).view(32, -1).to(torch.int8)
    by_group = torch.full((32, _GROUP // 16), 2.0, device=device).to(torch.float8_e4m3fn)
    by_row, codebook = torch.full((32,), 1 / 64, device=device), torch.arange(-32.0, 32, 4, device=device)
    arguments = {"x": x, "qdata": codes, "s_rel": by_group, "s_channel": by_row, "codebook": codebook}
    arguments |= {"correction": None, "bias": None, "group_size": 16, "convrot_groupsize": _GROUP, "out_dtype": dtype}
    backend = _implementation("w4a8_int8_linear", arguments)
    weight = codebook[torch.stack([codes & 15, codes >> 4 & 15], 2).view(32, -1).int()] * 2 / 64
    result = W4a8Product(backend, _GROUP)(x, (codes, by_group, by_row, codebook), None)
    return result, rotated @ weight.T, backend


@torch.no_grad()
def _try_nvfp4(device: torch.device, dtype: torch.dtype) -> Tried:
    load_nvfp4()
    _require_16_bits(dtype)
    # numbers that it holds, up to the largest; the scale of x is one
    numbers = torch.tensor([0.5, 1, 1.5, 2, 3, 4, 6, 0], device=device).repeat(128, 16)
    arguments = {"x": numbers.to(dtype), "per_tensor_scale": torch.ones((), device=device)}
    backend = _implementation("quantize_nvfp4", arguments | {"epsilon": 0.0, "pad_16x": False, "hi_first": True})
    product = Nvfp4Product(backend, scaled=True)
    data, scales, one, x_scale = product.some_parts(128, 128, device)
    data[::2] = 0x4A  # 2 and -1
    weight = torch.ones(128, 128, device=device)
    weight[::2, ::2], weight[::2, 1::2] = 2, -1
    result = product(numbers.to(dtype), (data, scales, one, x_scale), None)
    return result, numbers @ weight.T, backend


@torch.no_grad()
def _try_mxfp8(device: torch.device, dtype: torch.dtype) -> Tried:
    load_mxfp8()
    _require_16_bits(dtype)
    x = torch.linspace(-1, 1, 128, device=device).to(dtype).repeat(128, 1)
    backend = _implementation("quantize_mxfp8", {"x": x, "pad_32x": False})
    product = Mxfp8Product(backend)
    data, scales = product.some_parts(128, 128, device)
    weight = torch.linspace(-64, 64, 128, device=device).to(data.dtype).repeat(128, 1)
    return product(x, (weight, scales), None), x.float() @ weight.float().T, backend


@torch.no_grad()
def _try_svdquant(device: torch.device, dtype: torch.dtype) -> Tried:
    load_svdquant()
    if device.type != "cpu":
        _require_16_bits(dtype)
    # numbers that four bits hold, with the largest in each group; shifted, eighths from 0 to 15
    signed = (torch.arange(128 * 128, device=device).view(128, -1) * 5 % 15 - 7).to(dtype)
    positive = ((torch.arange(128 * 128, device=device).view(128, -1) * 5 % 16) / 8 - SHIFT).to(dtype)
    backend = FOR_ANY_DEVICE
    results, expected = [], []
    for x, shift in ((signed, 0.0), (positive, SHIFT)):
        codes, scales, up, down, smooth = (
            part if part.dtype == torch.int8 else part.to(dtype)
            for part in SvdquantProduct("", 16).some_parts(128, 128, device)
        )
        codes.copy_((torch.arange(128 * 64, device=device) * 7).view(128, 64))
        up, scales, smooth = up / 256, scales / 64, 2 * smooth
        arguments = {"x": x, "smooth": smooth, "lora_down": down, "pad_size": 256, "act_unsigned": shift > 0}
        backend = _implementation("quantize_svdquant_w4a4", arguments | {"lora_x": x})
        results.append(SvdquantProduct(backend, 16, shift > 0)(x, (codes, scales, up, down, smooth), None).float())
        weight = torch.stack([codes << 4 >> 4, codes >> 4], 2).view(128, 128).float() / 64
        thin = (x.float() @ down.float()) @ up.float().T
        expected.append((x.float() + shift) / 2 @ weight.T + thin)
    if backend == FOR_ANY_DEVICE and device.type != "cpu":
        raise RuntimeError(
            "it has no kernel for them there: they need an NVIDIA card from RTX 30 on, and a PyTorch for CUDA 13"
        )
    return torch.cat(results), torch.cat(expected), backend


def _whole_numbers(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of numbers that four bits hold, in fp32, and what these are once they have been rotated."""
    rotated = (torch.arange(32 * _GROUP, device=device).view(32, -1) * 5 % 15 - 7).float()
    scratch = Scratch(torch.empty(hadamard_bytes(_GROUP), dtype=torch.uint8, device=device))
    return rotated, (rotated @ take_hadamard(_GROUP, torch.float32, scratch).T).to(dtype)


def _require_16_bits(dtype: torch.dtype) -> None:
    if dtype not in (torch.bfloat16, torch.float16):
        raise RuntimeError("they answer in 16 bits")


def _implementation(function: str, arguments: Mapping[str, Any]) -> str:
    from comfy_kitchen.registry import registry

    return str(registry.get_implementation(function, kwargs=arguments).__module__.split(".")[2])


def _comfyui_multiplies_fp8(device: torch.device) -> bool:
    """As ComfyUI asks (comfy/model_management.py supports_fp8_compute): NVIDIA's cards from 8.9 on."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


def _has_block_scales(device: torch.device) -> bool:
    """As ComfyUI asks for nvfp4 (comfy/model_management.py supports_nvfp4_compute): NVIDIA's cards from 10.0 on."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) >= (10, 0)


def _comfyui_multiplies_mxfp8(device: torch.device) -> bool:
    """The same, with torch 2.10 or newer."""
    version = tuple(int(number) for number in torch.__version__.split(".")[:2])
    return version >= (2, 10) and _has_block_scales(device)


INT8 = Trial("int8", ("I8", "INT8"), _try_int8)
FP8 = Trial("fp8", ("F8_E4M3",), _try_fp8, _comfyui_multiplies_fp8)
W4A4 = Trial("w4a4", ("CONVROT_W4A4",), _try_w4a4)
W4A8 = Trial("w4a8", ("ASYM_W4A8",), _try_w4a8)
NVFP4 = Trial("nvfp4", ("NVFP4",), _try_nvfp4, _has_block_scales)
MXFP8 = Trial("mxfp8", ("MXFP8",), _try_mxfp8, _comfyui_multiplies_mxfp8)
# files that ComfyUI does not read
SVDQUANT = Trial("svdquant", ("SVDQ_INT4",), _try_svdquant, lambda device: False)
TRIALS = (INT8, FP8, W4A4, W4A8, NVFP4, MXFP8, SVDQUANT)
