"""Own a training run with a wall-clock budget: learning rate by time, moving average, checkpoint, resume."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

log = logging.getLogger("miniature")

CHECKPOINT_SECONDS = 60
LOG_SECONDS = 20


def has_bf16() -> bool:
    """Whether this CPU multiplies in bf16: where it does not, such products are several times slower than in fp32."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16", False) or has.get("amx_bf16", False))


def lower_precision() -> torch.autocast:
    """A context of products in bf16 on CPUs that have them."""
    return torch.autocast("cpu", torch.bfloat16, enabled=has_bf16())


class TimedRun:
    """Train `model` for `seconds`, at `path` on disk; a second run with the same path goes on where the first ended.

    The learning rate warms up over `warmup_steps`, then falls to 2 % on a cosine of the *time* used, so that the run
    ends well on any machine. `matrices` are trained by Muon, the rest by AdamW. `average` holds the moving average of
    the weights, which is what a stage hands on.
    """

    def __init__(
        self,
        model: nn.Module,
        path: Path,
        *,
        seconds: float,
        lr: float,
        warmup_steps: int = 200,
        decay: float = 0.999,
        weight_decay: float = 0.01,
        matrices: Iterable[nn.Parameter] = (),
    ) -> None:
        self.model, self.path, self.seconds, self.lr = model, path, seconds, lr
        self.warmup_steps, self.decay = warmup_steps, decay
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters]
        muon = list(matrices)
        rest = [p for p in self.parameters if all(p is not m for m in muon)]
        self.optimizers = [torch.optim.AdamW(rest, lr, (0.9, 0.98), weight_decay=weight_decay, fused=True)]
        if muon:
            self.optimizers.append(
                torch.optim.Muon(muon, lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            )
        self.step, self.used_seconds = 0, 0.0
        self.recent: dict[str, float] = {}
        if path.exists():
            self._restore()

    def steps(self) -> Iterator[int]:
        """Yield step numbers until the time is used; logs and saves on the way and at the end."""
        last = logged = saved = time.monotonic()
        logged_step = self.step
        while self.used_seconds < self.seconds:
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self._learning_rate()
            yield self.step
            self.step += 1
            now = time.monotonic()
            self.used_seconds, last = self.used_seconds + now - last, now
            if now - logged > LOG_SECONDS:
                values = " ".join(f"{name} {value:.4f}" for name, value in self.recent.items())
                rate = (self.step - logged_step) / (now - logged)
                log.info("%s %5.0f s step %d (%.2f/s) %s", self.path.stem, self.used_seconds, self.step, rate, values)
                logged, logged_step = now, self.step
            if now - saved > CHECKPOINT_SECONDS:
                self._save()
                saved = now
        self._save()

    def update(self, loss: torch.Tensor, **values: torch.Tensor) -> None:
        """Take one optimizer step down `loss`; `values` are averaged for the log."""
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        for name, value in {"loss": loss, **values}.items():
            self.recent[name] = 0.98 * self.recent.get(name, value.item()) + 0.02 * value.item()

    def use_average(self) -> None:
        """Replace the model's weights by their moving average: the end of the stage."""
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.average)

    def _learning_rate(self) -> float:
        warm = min(1.0, (self.step + 1) / self.warmup_steps)
        return self.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.used_seconds / self.seconds)))

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "parameters": self.parameters,
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "used_seconds": self.used_seconds,
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.path)

    def _restore(self) -> None:
        state = torch.load(self.path, weights_only=True)
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, state["parameters"])
            torch._foreach_copy_(self.average, state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.used_seconds = state["step"], state["used_seconds"]
        log.info("%s: resumed at step %d, %.0f s", self.path.stem, self.step, self.used_seconds)
