"""Which device to use where nobody says, what it can compute in, and what it is called."""

import torch


def best_device() -> torch.device:
    """The first accelerator, by its number; the CPU where there is none."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    device = torch.accelerator.current_accelerator()
    assert device is not None
    return device if device.type == "mps" else torch.device(device.type, 0)


def computes_bf16(device: torch.device) -> bool:
    """By itself, not step by step through fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0) or torch.version.hip is not None
    return device.type in ("xpu", "mps")


def device_name(device: torch.device) -> str:
    """By which it is known from run to run."""
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    if device.type == "xpu":
        return f"{device} {torch.xpu.get_device_name(device)}"
    return device.type
