"""Prompts and noise to latents, in one call: plans, refuses what does not fit, samples, learns, and reports."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..compute.step_schedules import StepCache
from ..errors import InvalidRequest
from ..models.family import FromPrompts
from ..models.streamed_transformer import StreamedTransformer
from ..out_of_memory import in_words
from ..planning.memory_plan import MemoryPlan
from ..reports.memory_report import MemoryReport
from .branch_keys import BranchKey
from .euler import euler
from .known_speeds import KnownSpeeds
from .limit import Limit
from .sampling_plan import plan_sampling
from .sampling_run import SamplingRun
from .surroundings import Surroundings
from .timeline import Timeline


@dataclass(frozen=True)
class Sampled:
    """latents: in fp32 on the host, as the family's VAE decodes them."""

    latents: Tensor
    report: MemoryReport


@dataclass(frozen=True)
class EulerSampler:
    """What one run of the reference's sampler needs: Euler's method with true guidance, for whole images.

    Guarantees: the limits are kept, and what does not fit is refused before anything is loaded; the latents are those
    of the Sample node with the sampler euler, to the last bit where there is guidance. `step_cache`: which steps are
    computed; None: all. `references`: latents of the images that are shown, as the transformer sees them.
    """

    transformer: StreamedTransformer[Any, Any]
    images: FromPrompts
    speeds: KnownSpeeds
    timeline: Timeline
    surroundings: Surroundings
    limit: Limit
    ram_limit_bytes: int | None = None
    step_cache: StepCache | None = None
    references: Sequence[Tensor] = ()

    def plan(self, prompts: Sequence[Tensor], noise: Tensor, steps: int) -> MemoryPlan:
        """Where each block will live. Raises DoesNotFit, and InvalidRequest for what cannot be sampled."""
        request = self.images.request(self.transformer, prompts, noise, steps, self.references)
        request = replace(request, step_cache=self.step_cache)
        return plan_sampling(
            self.transformer, request, self.limit, self.ram_limit_bytes, self.speeds, self.surroundings
        )

    @in_words("images were sampled")
    def sample(self, prompts: Sequence[Tensor], noise: Tensor, sigmas: Tensor, *, cfg: float = 1.0) -> Sampled:
        """prompts: (1, L, dim) each, the positive one and, where cfg is above 1, the negative one. noise: of the
        family's `noise_shape`, in fp32. sigmas: (steps + 1,), from 1 to 0."""
        _require_prompts(prompts, cfg)
        images = self.images
        images.require_noise(noise)
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
        embeds, shown = ([given.to(device, dtype) for given in several] for several in (prompts, self.references))

        def denoised(x: Tensor, sigma: Tensor, timestep: float) -> Tensor:
            rows = x.to(dtype).split(1)
            branches = [images.branch(image, prompt, timestep, shown) for prompt in embeds for image in rows]
            keys = [BranchKey(image, prompt) for prompt in range(len(embeds)) for image in range(len(x))]
            velocities = images.velocity(run.forward(branches, keys=keys), x).split(len(x))
            # rounded in the order of ComfyUI's samplers, which hand denoised images on
            guesses = [x - velocity * sigma for velocity in velocities]
            if len(guesses) == 1:
                return guesses[0]
            return x - images.guided(x - guesses[0], x - guesses[1], cfg)

        finished = False
        try:
            run.load()
            run.begin(sigmas[sigmas > 0].tolist())
            latents = images.raw(euler(noise.to(device), sigmas, denoised)).cpu()
            finished = True
        finally:
            report = run.end(finished=finished)
        return Sampled(latents, report)


def _require_prompts(prompts: Sequence[Tensor], cfg: float) -> None:
    """Raise InvalidRequest for more or fewer than guidance needs."""
    if len(prompts) != (2 if cfg > 1 else 1):
        raise InvalidRequest(
            "{count} prompts were given with cfg {cfg}. Give two, a positive and a negative one, where cfg is above "
            "1, and otherwise one.",
            code="run.wrong_number_of_prompts",
            count=len(prompts),
            cfg=cfg,
        )
