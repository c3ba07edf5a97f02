"""What comfy-kitchen fuses of a block, beside what the blocks compute; by its eager way, all that a CPU has."""

import pytest
import torch
from qwenimage_lowvram.engine.models.qwen_image_21.layers import HeadNorm
from torch import Tensor
from torch.nn import functional as F

DIM, HEADS, HEAD_DIM, TOKENS = 384, 3, 128, 50
EPS = 1e-6


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_its_modulated_norm_is_the_same_bits_as_the_blocks(dtype: torch.dtype) -> None:
    import comfy_kitchen

    x, scale, shift = (numbers(1, n, DIM, dtype=dtype, seed=i) for i, n in enumerate((TOKENS, 1, 1)))
    normed = F.layer_norm(x, (DIM,), eps=EPS)
    with comfy_kitchen.use_backend("eager"):
        assert torch.equal(comfy_kitchen.adaln(x, scale, shift, EPS), normed * (1 + scale) + shift)
        # without shifts, as Qwen-Image-2.1 has it
        assert torch.equal(comfy_kitchen.adaln(x, scale, torch.zeros_like(shift), EPS), normed.mul_(1 + scale))


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_its_norm_and_rotation_of_heads_are_near_the_blocks_and_not_the_same_bits(
    dtype: torch.dtype, near: float
) -> None:
    """So they have no place where images are to be the same."""
    import comfy_kitchen

    heads, norm = numbers(1, TOKENS, HEADS, HEAD_DIM, dtype=dtype), HeadNorm(HEAD_DIM).to(dtype)
    norm.weight.data = 1 + numbers(HEAD_DIM, dtype=dtype, seed=1) / 10
    angles = 50 * torch.rand(TOKENS, HEAD_DIM // 2, generator=torch.Generator().manual_seed(2))
    turns = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], -1).unflatten(-1, (2, 2))
    with comfy_kitchen.use_backend("eager"), torch.no_grad():
        own = norm(heads.clone(), torch.polar(torch.ones_like(angles), angles))
        made, _ = comfy_kitchen.rms_rope(heads, heads, turns[None, :, None], norm.weight, None, EPS)
    error = (made.float() - own.float()).norm() / own.float().norm()
    assert 0 < error < near
