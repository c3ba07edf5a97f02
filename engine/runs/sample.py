"""Prompts and noise to latents, in one call: plans, refuses what does not fit, samples, learns, and reports."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidRequest
from ..models.qwen_image.branch import Branch
from ..models.qwen_image.latents import LATENT_PX, pack, shape_in_patches, unpack
from ..models.qwen_image.positions import require_text_positions
from ..models.qwen_image.schedule import true_cfg
from ..models.qwen_image.transformer import QwenImageTransformer
from ..models.qwen_image_vae.latent_statistics import raw_latents
from ..out_of_memory import in_words
from ..planning.memory import MemoryPlan
from ..planning.request import SamplingRequest
from ..reports.memory_report import MemoryReport
from .euler import euler
from .known_speeds import KnownSpeeds
from .limit import Limit
from .sampling_plan import plan_sampling
from .sampling_run import SamplingRun
from .surroundings import Surroundings
from .timeline import Timeline


@dataclass(frozen=True)
class Sampled:
    """latents: (B, 16, 1, h, w) in fp32 on the host, as the VAE decodes them."""

    latents: Tensor
    report: MemoryReport


@dataclass(frozen=True)
class EulerSampler:
    """What one run of the reference's sampler needs: Euler's method with true guidance, for whole images.

    Guarantees: the limits are kept, and what does not fit is refused before anything is loaded; the latents are those
    of the Sample node with the sampler euler, to the last bit where there is guidance.
    """

    transformer: QwenImageTransformer
    speeds: KnownSpeeds
    timeline: Timeline
    surroundings: Surroundings
    limit: Limit
    ram_limit_bytes: int | None = None

    def plan(self, prompts: Sequence[Tensor], noise: Tensor, steps: int) -> MemoryPlan:
        """Where each block will live. Raises DoesNotFit, and InvalidRequest for what cannot be sampled."""
        shape = shape_in_patches(noise)
        for prompt in prompts:
            require_text_positions([shape], prompt.shape[1], self.transformer.positions, layered=False)
        request = SamplingRequest(
            width=noise.shape[-1] * LATENT_PX,
            height=noise.shape[-2] * LATENT_PX,
            branches=len(prompts) * len(noise),
            prompt_tokens=max(prompt.shape[1] for prompt in prompts),
            timesteps=steps,
        )
        return plan_sampling(
            self.transformer, request, self.limit, self.ram_limit_bytes, self.speeds, self.surroundings
        )

    @in_words("images were sampled")
    def sample(self, prompts: Sequence[Tensor], noise: Tensor, sigmas: Tensor, *, cfg: float = 1.0) -> Sampled:
        """prompts: (1, L, dim) each, the positive one and, where cfg is above 1, the negative one. noise: (B, 16, 1, h,
        w) in fp32, h and w even. sigmas: (steps + 1,), from 1 to 0."""
        _require(prompts, noise, cfg)
        transformer, steps = self.transformer, len(sigmas) - 1
        run = SamplingRun(
            transformer,
            self.plan(prompts, noise, steps),
            steps=steps,
            speeds=self.speeds,
            timeline=self.timeline,
            surroundings=self.surroundings,
        )
        device, dtype = transformer.hardware.device, transformer.dtype
        embeds = [prompt.to(device, dtype) for prompt in prompts]

        def denoised(x: Tensor, sigma: Tensor) -> Tensor:
            branches = [
                Branch(pack(image), (shape_in_patches(image),), prompt, None, float(sigma))
                for prompt in embeds
                for image in x.to(dtype).split(1)
            ]
            tokens = torch.cat(run.forward(branches)).float()
            velocities = unpack(tokens, *x.shape[-2:]).split(len(x))
            # rounded in the order of ComfyUI's samplers, which hand denoised images on
            guesses = [x - velocity * sigma for velocity in velocities]
            if len(guesses) == 1:
                return guesses[0]
            return x - true_cfg(x - guesses[0], x - guesses[1], cfg, rescale=True)

        finished = False
        try:
            run.load()
            run.begin(sigmas[sigmas > 0].tolist())
            latents = raw_latents(euler(noise.to(device), sigmas.to(device), denoised)).cpu()
            finished = True
        finally:
            report = run.end(finished=finished)
        return Sampled(latents, report)


def _require(prompts: Sequence[Tensor], noise: Tensor, cfg: float) -> None:
    """Raise InvalidRequest for what is no request of whole images."""
    if len(prompts) != (2 if cfg > 1 else 1):
        raise InvalidRequest(
            "{count} prompts were given with cfg {cfg}. Give two, the positive and the negative one, where cfg is "
            "above 1, and else one.",
            code="run.wrong_number_of_prompts",
            count=len(prompts),
            cfg=cfg,
        )
    if noise.ndim != 5 or noise.shape[2] != 1 or 0 in noise.shape or noise.shape[-1] % 2 or noise.shape[-2] % 2:
        raise InvalidRequest(
            "The noise has the shape {shape}; (B, 16, 1, h, w) is needed, h and w even: the image's sides are "
            "multiples of 16 px.",
            code="run.wrong_noise",
            shape=list(noise.shape),
        )
