"""Whether a tensor holds NaN or infinity."""

import math

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Without a second tensor of its size, which a large image would feel."""
    if not tensor.is_floating_point():
        return True
    parts = tensor if tensor.ndim > 1 else (tensor,)  # one after another: of a view a copy is made
    return all(math.isfinite(bound) for part in parts for bound in torch.aminmax(part))  # of which NaN is both
