"""What a model's parts compute in: what a person chose in the loader, or what ComfyUI and the device do best."""

import comfy.model_management
import torch

from ..engine.files.checkpoint import Checkpoint
from ..engine.hardware import Hardware
from ..engine.runs.dtype_choice import auto_dtype
from .adapters import switches
from .adapters.known_speeds import half_products_are_faster
from .display_names import AUTO

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compute_dtype(choice: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """Of a text encoder or a VAE."""
    if choice != AUTO:
        return DTYPES[choice]
    return torch.float32 if checkpoint.full_precision or not has_bf16(device) else torch.bfloat16


def transformer_dtype(choice: str, checkpoint: Checkpoint, hardware: Hardware) -> torch.dtype:
    """Of a transformer's products. A card without bf16 is measured once, which takes a second."""
    if choice != AUTO:
        return DTYPES[choice]
    if comfy.model_management.FORCE_FP32:
        return torch.float32
    return auto_dtype(
        checkpoint,
        has_bf16=has_bf16(hardware.device),
        device=hardware.device,
        half_is_faster=lambda: half_products_are_faster(hardware),
    )


def vae_dtype(choice: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """A dtype that a person chose in the node comes before ComfyUI's switches."""
    by_switch = switches.vae_dtype() if choice == AUTO else None
    return by_switch or compute_dtype(choice, checkpoint, device)


def has_bf16(device: torch.device) -> bool:
    """By itself, not step by step through fp32."""
    return bool(comfy.model_management.should_use_bf16(device, prioritize_performance=False))


def products_text(choice: str, compute: torch.dtype) -> str:
    """What a person is told of a card without bf16."""
    if choice != AUTO or compute != torch.float16:
        return ""
    return (
        "This card does not support bf16: products are in fp16, with activations in fp32, which was measured to be "
        "faster here than fp32. The image differs from the one in fp32."
    )
