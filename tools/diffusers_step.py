"""A guided step by diffusers' transformer, and what its group offloading moves: the peer of the benchmarks."""

from dataclasses import dataclass

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.hooks.group_offloading import ModuleGroup
from torch import Tensor, nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16
SCALE = 4.0


@dataclass(frozen=True)
class StepInputs:
    """tokens (1, height * width, 64), grid (1, height, width) in patches, prompts (1, L, dim): positive, negative."""

    tokens: Tensor
    grid: tuple[int, int, int]
    prompts: tuple[Tensor, ...]

    @classmethod
    def random(cls, height: int, width: int, text_dim: int, prompt_tokens: tuple[int, ...]) -> "StepInputs":
        generator = torch.Generator().manual_seed(1)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(DEVICE, DTYPE)

        prompts = tuple(random(1, count, text_dim) for count in prompt_tokens)
        return cls(random(1, height * width, 64), (1, height, width), prompts)


def guide(positive: Tensor, negative: Tensor) -> Tensor:
    """True guidance with norm rescale, as the pipeline does it."""
    combined = negative + SCALE * (positive - negative)
    return combined * (positive.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))


def guided_step(model: QwenImageTransformer2DModel, inputs: StepInputs, sigma: float) -> Tensor:
    predictions = [
        model(
            hidden_states=inputs.tokens,
            encoder_hidden_states=prompt,
            timestep=torch.full((1,), sigma, device=DEVICE, dtype=DTYPE),
            img_shapes=[[inputs.grid]],
            return_dict=False,
        )[0]
        for prompt in inputs.prompts
    ]
    return guide(*predictions)


def parameters_of(group: ModuleGroup) -> set[nn.Parameter]:
    """What a group moves. That of what is outside the blocks lists its parameters twice, and moves them once."""
    return {p for module in group.modules for p in module.parameters()} | set(group.parameters)
