"""Which kernel computes attention: what a person chose, or what the device does best without quantizing. Each kernel
is tried once against torch's own on this machine before it is used."""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..drivers import driver_of
from ..errors import Unsupported
from ..hardware import Hardware
from ..log import logger
from ..out_of_memory import shortage
from .attention import Attention, Operands, kernel_of_all, torchs_own
from .attention_kernels import FLASH, KITCHEN_INT8, SAGE, SPLIT, XFORMERS
from .attention_packages import FUNCTIONS, KernelFunction
from .relative_error import relative_error

AUTO = "auto"
# what a person can choose, whether it is installed or not
CHOICES = (AUTO, "pytorch", *(kernel.name for kernel in (SPLIT, FLASH, XFORMERS, SAGE, KITCHEN_INT8)))
# tried in this order where torch's own choice is wrong: without its fused kernels last
_VARIANTS = ("pytorch", "pytorch flash", "pytorch efficient", "split")
# errors relative to fp32: of kernels that only round, by dtype, and of those that quantize to 8 bits
_ROUNDING = {torch.float32: 2e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}
_QUANTIZING = 0.1
HEAD_DIM = 128  # of the models' heads, and of a trial's
TRIAL_BYTES = 32 * 1024**2  # of a trial
_FAILED = -1.0  # remembered of a kernel that ended in an error


@dataclass(frozen=True)
class _Imported:
    """A kernel's function with its module."""

    function: KernelFunction
    module: ModuleType

    def lacks(self, operands: Operands) -> str:
        return self.function.lacks(operands)

    def __call__(self, operands: Operands) -> Tensor:
        return self.function.attend(self.module, operands)


def choose_attention(
    name: str,
    hardware: Sequence[Hardware],
    dtype: torch.dtype,
    *,
    wished: str = AUTO,
    tried: MutableMapping[str, float],
    functions: Mapping[str, KernelFunction] = FUNCTIONS,
) -> Attention:
    """The kernel of that name, of CHOICES, on all of these devices; `auto`: `wished`, where that works, else torch's.

    wished: what ComfyUI's switches or the file ask for. tried: errors of kernels by machine, which outlive the process.
    Takes TRIAL_BYTES of a device where a kernel is tried. Raises Unsupported for a kernel that was chosen and does not
    work here.
    """
    if name == AUTO and wished != AUTO:
        why = _why_not(functions[wished], hardware, dtype, tried)
        if not why:
            return _with(functions[wished], hardware, dtype)
        asked = "which ComfyUI's switches or the file ask for"
        logger.warning("The attention kernel '%s', %s, is not used: %s.", wished, asked, why)
    if name == AUTO:
        return _torchs(hardware, dtype, tried, functions)
    why = _why_not(functions[name], hardware, dtype, tried)
    if why:
        raise Unsupported(
            "The attention kernel '{kernel}' cannot be used: {why}.\n\nWhat to do: choose 'auto'.",
            code="attention.unavailable",
            kernel=name,
            why=why,
        )
    return _with(functions[name], hardware, dtype)


def _torchs(
    hardware: Sequence[Hardware],
    dtype: torch.dtype,
    tried: MutableMapping[str, float],
    functions: Mapping[str, KernelFunction],
) -> Attention:
    """torch's own choice, or where that is wrong on this machine the first of its kernels that is not."""
    first, *others = _VARIANTS
    why = _why_not(functions[first], hardware, dtype, tried)
    for name in others if why else ():
        if not _why_not(functions[name], hardware, dtype, tried):
            logger.warning("torch's attention is not used as it is: %s. Its kernel '%s' is.", why, name)
            return _with(functions[name], hardware, dtype)
    return Attention(kernel_of_all(hardware, dtype))


def _with(function: KernelFunction, hardware: Sequence[Hardware], dtype: torch.dtype) -> Attention:
    native = kernel_of_all(hardware, dtype)
    if function.kernel.name == native.name:
        return Attention(native)
    return Attention(replace(function.kernel, otherwise=native), _Imported(function, function.imported()))


def _why_not(
    function: KernelFunction,
    hardware: Sequence[Hardware],
    dtype: torch.dtype,
    tried: MutableMapping[str, float],
) -> str:
    """Why a kernel does not work on all of these devices; empty where it does."""
    for device in (place.device for place in hardware):
        if device.type not in function.devices:
            return f"it runs on {', '.join(sorted(function.devices)).upper()} devices, and this one is '{device}'"
    try:
        module = function.imported()
    except ImportError as error:
        missing = error.name is not None and function.module.startswith(error.name)
        reason = "is not installed" if missing else f"cannot be imported ({error!s:.300})"
        return f"the package {function.package} {reason}"
    except Exception as error:  # code of others: it may fail in any way
        return f"the package {function.package} cannot be imported ({type(error).__name__}: {error!s:.300})"
    for device in (place.device for place in hardware):
        if not function.works_on(module, device):
            return f"{function.package} {function.version} has no such kernel for '{device}'"
        key = trial_key(function, device, dtype)
        if key not in tried:
            tried[key] = trial_error(function, device, dtype)
        if why := _judged(function, tried[key], dtype):
            return why
    return ""


def _judged(function: KernelFunction, error: float, dtype: torch.dtype) -> str:
    if error == _FAILED:
        return "it ended with an error when it was tried"
    most = _ROUNDING[dtype] if function.kernel.exact else _QUANTIZING
    return "" if error <= most else f"its results were wrong when it was tried (error {error:.2g}, at most {most:.2g})"


def trial_key(function: KernelFunction, device: torch.device, dtype: torch.dtype) -> str:
    """What a trial's result depends on: package, torch with its runtime, driver, device, dtype."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    numbers = str(dtype).removeprefix("torch.")
    runtime = torch.version.cuda or torch.version.hip or ""
    return (
        f"{function.kernel.name} of {function.package} {function.version}, torch {torch.__version__} {runtime}, "
        f"driver {driver_of(device) or ''}, {card}, {numbers}"
    )


@torch.no_grad()
def trial_error(function: KernelFunction, device: torch.device, dtype: torch.dtype) -> float:
    """The largest error of a few products, relative to torch's without a fused kernel in fp32; below 0 where the kernel
    failed. Keys lie aside from zero and some of their numbers are large, as those of the model are.

    Takes TRIAL_BYTES; where memory runs out, that error is raised.
    """
    module = function.imported()
    worst = 0.0
    for queries, keys in ((300, 300), (64, 1037)):
        generator = torch.Generator().manual_seed(queries)
        sizes = [(1, 2, tokens, HEAD_DIM) for tokens in (queries, keys, keys)]
        query, key, value = (torch.randn(size, generator=generator) for size in sizes)
        key[..., :: HEAD_DIM // 4] += 6.0
        operands = Operands(*(part.to(device, dtype) for part in (query, key, value)))
        try:
            out = function.attend(module, operands)
        except Exception as error:  # code of others, on a card that it may not know
            if shortage(error) is not None:
                raise  # which tells nothing of the kernel
            logger.debug("Attention kernel %s: %s", function.kernel.name, error)
            return _FAILED
        worst = max(worst, relative_error(out, _reference(operands)))
    return worst


def _reference(operands: Operands) -> Tensor:
    wide = replace(operands, query=operands.query.float(), key=operands.key.float(), value=operands.value.float())
    with sdpa_kernel(SDPBackend.MATH):
        return torchs_own(wide)
