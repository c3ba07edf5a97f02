"""Which linear layers compute on their weights as stored: what a person chose, what the format and the device can."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from math import prod

import torch

from ..errors import WrongModel
from ..files.checkpoint import Checkpoint, TensorEntry
from ..formats import FORMATS, StoredParam
from ..formats.int8 import Int8Codec
from ..formats.int8_convrot import Int8ConvrotCodec
from ..formats.kitchen import CONVROT_W4A4, MXFP8, NVFP4
from ..formats.kitchen_w4a8 import W4a8Codec
from ..formats.nunchaku_codecs import SvdqCodec
from ..formats.scaled_fp8 import ScaledFp8Codec
from ..hardware import Hardware
from .block_scaled_products import Mxfp8Product, Nvfp4Product
from .eight_bit_products import Fp8Product, Int8Product
from .four_bit_products import W4a4Product, W4a8Product
from .half_products import activations_dtype
from .product_trials import TRIALS, Trial, backend_of
from .stored_products import StoredProduct
from .svdquant_products import SvdquantProduct

_FP8 = "F8_E4M3"  # of the data that products take
_Product = Int8Product | Fp8Product | W4a4Product | W4a8Product | Nvfp4Product | Mxfp8Product | SvdquantProduct


class Computing(Enum):
    """EXACT: on decoded weights. FAST: on stored ones wherever that can be done. AS_COMFYUI: on those on which ComfyUI
    itself computes for the same file on the same card; exact elsewhere."""

    EXACT = "exact"
    AS_COMFYUI = "auto"
    FAST = "fast"


@dataclass(frozen=True)
class LinearChoice:
    """For each parameter that a file stores, how its layer computes. backends: comfy-kitchen's, by the names of their
    products. why_not: why some of the weights that products were asked for are decoded."""

    computing: Computing
    backends: Mapping[str, str] = field(default_factory=dict)
    why_not: str = ""

    def product_of(self, param: StoredParam) -> StoredProduct | None:
        """None: the weight is decoded."""
        product = _wished(param, self.computing)
        backend = self.backends.get(product.name) if product is not None else None
        return replace(product, backend=backend) if product is not None and backend else None


DECODED = LinearChoice(Computing.EXACT)


def linear_of(computing: Computing, file: Checkpoint, hardware: Sequence[Hardware], dtype: torch.dtype) -> LinearChoice:
    """What can be done for a file on all of these devices. On a CPU, where decoded weights are faster, nothing but FAST
    computes on stored ones. Each kind of numbers that weights of the file would be multiplied in is tried with a small
    product on each device; comfy-kitchen is imported where there is any. Raises what FORMATS.described_tensors does."""
    if computing is Computing.EXACT:
        return DECODED
    as_comfyui = computing is Computing.AS_COMFYUI
    if as_comfyui and any(place.host_device for place in hardware):
        return DECODED
    tensors = FORMATS.described_tensors(file)
    trials = [trial for trial in TRIALS if _is_wished(trial, tensors, computing)]
    if as_comfyui:
        trials = [trial for trial in trials if all(trial.comfyui_does(place.device) for place in hardware)]
    if not trials and as_comfyui:
        return DECODED
    if not trials:
        kinds = ", ".join(trial.name for trial in TRIALS)
        return LinearChoice(computing, why_not=f"no weights in the file can be multiplied as stored ({kinds})")
    return choose_linear(computing, hardware, activations_dtype(dtype), trials)


def choose_linear(
    computing: Computing, hardware: Sequence[Hardware], dtype: torch.dtype, trials: Sequence[Trial] = TRIALS
) -> LinearChoice:
    """The same for activations in `dtype`, and for all kinds of numbers unless `trials` names some."""
    backends, reasons = {}, []
    for trial in trials:
        found, why_not = backend_of(trial, hardware, dtype)
        if found:
            backends[trial.name] = found
        else:
            reasons.append(why_not)
    return LinearChoice(computing, backends, "; ".join(dict.fromkeys(reasons)))


def _is_wished(trial: Trial, tensors: Mapping[str, TensorEntry], computing: Computing) -> bool:
    """Whether a weight of a file's would be multiplied so; there may be other models beside it."""
    for name, entry in tensors.items():
        if not name.endswith(".weight") or not entry.dtype.startswith(trial.dtypes):
            continue
        with suppress(WrongModel):  # of a weight that nothing here reads
            product = _wished(FORMATS.stored_param(name, tensors, ""), computing)
            if product is not None and product.name == trial.name:
                return True
    return False


def _wished(param: StoredParam, computing: Computing) -> _Product | None:
    """By a backend that is not known yet; None for a weight that is decoded in any case."""
    fast = computing is Computing.FAST
    if computing is Computing.EXACT or len(param.shape) != 2 or (param.full_products and not fast):
        return None
    return _product_of(param, as_comfyui=not fast)


def _product_of(param: StoredParam, *, as_comfyui: bool) -> _Product | None:
    """By a backend that is not known yet. as_comfyui: of ComfyUI's formats alone."""
    codec = param.decoder
    if isinstance(codec, ScaledFp8Codec):
        data, scale = param.parts
        return Fp8Product("") if data.dtype == _FP8 and prod(scale.shape) == 1 else None
    if isinstance(codec, Int8ConvrotCodec):
        return Int8Product("", codec.group)
    if isinstance(codec, Int8Codec) and (codec.factor == 1 or not as_comfyui):
        return Int8Product("", factor=codec.factor)
    if isinstance(codec, W4a8Codec):
        return W4a8Product("", codec.group)
    if isinstance(codec, SvdqCodec) and param.held and not as_comfyui:
        return SvdquantProduct("", codec.rank, param.shifted_operands)
    if codec is NVFP4:
        return Nvfp4Product("", scaled=param.operand_scale is not None)
    if codec is MXFP8:
        return Mxfp8Product("")
    for group, rotated in CONVROT_W4A4.items():
        if codec is rotated:
            return W4a4Product("", group, eight_bits=param.eight_bit_operands)
    return None
