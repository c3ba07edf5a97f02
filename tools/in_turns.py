"""Time several things against each other on a machine whose speed drifts."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def seconds_in_turns(actions: Sequence[Callable[[], object]], rounds: int, device: torch.device) -> list[float]:
    """Median seconds of each; all take turns, so that a machine whose speed drifts is fair to all."""
    seconds: list[list[float]] = [[] for _ in actions]
    for _ in range(rounds):
        for action, taken in zip(actions, seconds, strict=True):
            start = time.perf_counter()
            action()
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]
