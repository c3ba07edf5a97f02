"""One sampling run: what it asks for, the plan for it, its passes, and the report of it."""

import logging
import math
import time
from contextlib import ExitStack
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from ..engine.errors import InvalidRequest, Unsupported
from ..engine.latents import LATENT_PX
from ..engine.plan import MemoryPlan, SamplingRequest, most_bytes, plan_memory
from ..engine.report import MemoryReport
from ..engine.transformer import Branch, QwenImageTransformer, TransformerSession
from .limits import stage_bytes
from .patcher import LowVRAMPatcher
from .progress import MemoryWatch, RunProgress

logger = logging.getLogger(__name__)


def request_of(guider: Any, noise_shape: torch.Size, joint_attention_dim: int) -> SamplingRequest:
    """What ComfyUI is about to sample: `noise_shape` is (B, 16, 1, H, W), the guider holds the conditions.

    Raises Unsupported or InvalidRequest for latents and prompts of other models.
    """
    if len(noise_shape) != 5 or noise_shape[2] != 1:
        raise Unsupported(
            f"A latent of shape {list(noise_shape)} is not one picture per sample. Use EmptySD3LatentImage, or "
            "encode pictures with this pack's VAE."
        )
    entries = [(name, entry) for name, conds in guider.conds.items() for entry in conds or ()]
    # only this guider leaves the negative prompt out; others decide for themselves
    plain = type(guider) is comfy.samplers.CFGGuider
    if plain and math.isclose(guider.cfg, 1.0) and not guider.model_options.get("disable_cfg1_optimization"):
        entries = [(name, entry) for name, entry in entries if name != "negative"]
    prompts = [entry["cross_attn"] for _, entry in entries if entry.get("cross_attn") is not None]
    for prompt in prompts:
        if prompt.shape[-1] != joint_attention_dim:
            raise InvalidRequest(
                f"The prompt's embeddings have {prompt.shape[-1]} dimensions, {joint_attention_dim} are needed.\n\n"
                "What to do: encode the prompt with Qwen-Image's own text encoder, Qwen2.5-VL-7B."
            )
    references = [
        sum(math.prod(latent.shape[-2:]) // 4 for latent in entry.get("reference_latents") or ())
        for _, entry in entries
    ]
    return SamplingRequest(
        width=noise_shape[4] * LATENT_PX,
        height=noise_shape[3] * LATENT_PX,
        branches=max(1, len(entries)) * noise_shape[0],
        prompt_tokens=max((prompt.shape[1] for prompt in prompts), default=0),
        reference_tokens=max(references, default=0),
    )


def plan_run(
    transformer: QwenImageTransformer, request: SamplingRequest, limit_bytes: int | None, patcher: LowVRAMPatcher
) -> MemoryPlan:
    """Raises DoesNotFit before anything is loaded."""
    wanted = most_bytes(transformer.footprint, request)
    budget = stage_bytes(transformer.hardware.device, limit_bytes, wanted, reused=patcher)
    return plan_memory(transformer.footprint, request, budget)


class SamplingRun:
    """Owns what one run holds on the device, from `begin` to `end`."""

    def __init__(self, transformer: QwenImageTransformer, plan: MemoryPlan, sigmas: Tensor, one_by_one: str) -> None:
        self._transformer = transformer
        self._plan = plan
        self._sigmas = sigmas
        self._one_by_one = one_by_one
        self._watch = MemoryWatch(transformer.hardware.device)
        self._stack = ExitStack()
        self._session: TransformerSession | None = None
        self._last_timestep = 0.0
        self._seen: set[float] = set()
        self._passes = 0
        self._start = time.perf_counter()
        store, table = transformer.store, transformer.modulation
        self._before = (store.fetched_blocks, store.fetched_bytes, table.fetched_bytes)
        self._progress = RunProgress(
            self._watch,
            blocks=plan.blocks,
            steps=len(sigmas) - 1,
            limit_bytes=plan.limit_bytes,
            plan=str(plan),
        )

    def begin(self, model_sampling: Any) -> None:
        """The resident weights are on the device: compute the modulation table, then open the slots."""
        self._watch.start()
        logger.info("%s", self._plan)
        timesteps = [float(t) for t in model_sampling.timestep(self._sigmas[self._sigmas > 0]).float()]
        self._last_timestep = min(timesteps, default=0.0)
        self._transformer.modulation.announce(timesteps, on_block=self._progress.modulation)
        self._session = self._stack.enter_context(
            self._transformer.session(slots=self._plan.slots, mlp_chunk_tokens=self._plan.mlp_chunk_tokens)
        )

    def forward(self, branches: list[Branch]) -> list[Tensor]:
        """One pass over the blocks for all branches."""
        if self._session is None:
            raise RuntimeError("forward() before begin()")
        timestep = min(branch.timestep for branch in branches)
        if timestep not in self._seen:
            self._seen.add(timestep)
            self._progress.step = len(self._seen) - 1
        result = self._session.forward(branches, more=timestep > self._last_timestep, on_block=self._progress.sampling)
        self._passes += 1
        return result

    def end(self, *, finished: bool) -> MemoryReport:
        """Give back what the run held on the device; not `finished`: after an error or an interruption."""
        waited = self._session.waited_seconds if self._session is not None else 0.0
        self._session = None
        self._stack.close()
        self._watch.ram()
        store, table = self._transformer.store, self._transformer.modulation
        report = MemoryReport(
            plan=self._plan,
            device=str(self._transformer.hardware.device),
            weight_format=self._transformer.weight_format,
            steps=len(self._sigmas) - 1,
            passes=self._passes,
            seconds=time.perf_counter() - self._start,
            fetched_blocks=store.fetched_blocks - self._before[0],
            fetched_bytes=store.fetched_bytes - self._before[1],
            modulation_bytes=table.fetched_bytes - self._before[2],
            waited_seconds=waited,
            peak_vram_bytes=self._watch.peak_vram(),
            peak_ram_bytes=self._watch.peak_ram,
            one_by_one=self._one_by_one,
        )
        if finished:
            self._progress.done()
        logger.info("%s", report)
        return report
