"""What a way to run a model hands over to be measured, the same inputs for all, and the measuring."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .cases import Case, Sizes
from .deadline import Deadline

SIGMA = 0.5
GUIDANCE = 4.0
TURNS = 3  # of steps that are measured, at most; the first step is like no other


@dataclass(frozen=True)
class Ready:
    """step: whether another follows -> what the model answers, (1, N, 64) for each prompt. blocks: how many ran, of a
    model's; what they take is told for the whole model. facts: of the row."""

    step: Callable[[bool], list[Tensor]]
    blocks: int
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Inputs:
    """tokens (1, N, 64) of an image of `grid` patches; prompts (1, L, dim): the positive and the negative one."""

    tokens: Tensor
    grid: tuple[int, int, int]
    prompts: tuple[Tensor, ...]

    @classmethod
    def of(cls, case: Case, sizes: Sizes, device: torch.device) -> "Inputs":
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(1, *shape, generator=generator).to(device, torch.bfloat16)

        side = case.side // 16
        prompts = tuple(draw(count, sizes.text_dim) for count in sizes.prompt_tokens)
        return cls(draw(side * side, 64), (1, side, side), prompts[: 2 if case.guided else 1])


def guided(velocities: list[Tensor]) -> Tensor:
    """In fp32 on the host: without guidance that of the one prompt."""
    first, *others = [velocity.detach().float().cpu() for velocity in velocities]
    return others[0] + GUIDANCE * (first - others[0]) if others else first


def measured(ready: Ready, sizes: Sizes, device: torch.device, deadline: Deadline) -> tuple[dict[str, Any], Tensor]:
    """The row's numbers, and what the last step answered."""
    seconds: list[float] = []
    while True:
        # another step is begun where there is time for two more, as it fetches ahead for the one behind it
        last = len(seconds) >= TURNS or (len(seconds) >= 1 and deadline.left < 3 * seconds[-1])
        start = time.perf_counter()
        velocities = ready.step(not last)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        if last:
            break
    times = sizes.blocks / ready.blocks
    taken = statistics.median(seconds[1:]) * times
    row: dict[str, Any] = {"seconds": taken, "first_seconds": seconds[0] * times, "steps": len(seconds)}
    forecast = ready.facts.get("forecast_seconds")
    if forecast:
        row["of_forecast"] = taken / forecast
    if ready.blocks != sizes.blocks:
        row["blocks_run"] = ready.blocks
    if device.type == "cuda":
        row["allocated_bytes"] = torch.cuda.max_memory_allocated(device)
    return row | ready.facts, guided(velocities)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compared(made: Tensor, wanted: Tensor) -> dict[str, Any]:
    """Whether all bits are the same, and the largest difference over the largest number."""
    if not bool(torch.isfinite(made).all()):
        return {"equal": False, "difference": None, "why": "the answer is not finite"}
    largest = float(wanted.abs().max())
    return {"equal": torch.equal(made, wanted), "difference": float((made - wanted).abs().max()) / largest}
