"""Qwen-Image's transformer as ComfyUI's MODEL: what native samplers call, translated to branches."""

import math
from collections.abc import Sequence
from typing import Any

import comfy.model_base
import comfy.supported_models
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor

from ...engine.compute.step_schedules import StepCache
from ...engine.models.qwen_image.latents import PATCH, patches_of
from ...engine.models.qwen_image.schedule import layered_sigmas, qwen_sigmas, true_cfg
from ...engine.models.qwen_image.transformer import QwenImageTransformer
from ...engine.planning.request import Controls, SamplingRequest
from ...engine.runs.timeline import Timeline
from .around_runs import as_patcher
from .block_patches import BlockPatches, check_patches, has_patches
from .control_memory import controls_of
from .controlnets import check_controls
from .graph_checks import check_channels_of_call, check_latents, check_layers, check_references, check_size, refuse
from .model_call import Call
from .patcher import LowVRAMPatcher
from .references import check_methods
from .run_conditions import Conds
from .sampling_request import check_positions, request_of
from .streamed_model import DiffusionModel, LowVRAMModel, ModelCalls

# of ComfyUI's model configuration: it alone tells Layered from the other members
ADDITIONAL_KEY = "use_additional_t_cond"


def make_model(
    transformer: QwenImageTransformer,
    limit_bytes: int | None,
    ram_limit_bytes: int | None = None,
    timeline: Timeline | None = None,
    advice: str = "",
    step_cache: StepCache | None = None,
    compiling: bool = False,
) -> LowVRAMPatcher:
    """A MODEL around `transformer`; a limit of None uses what is free. `timeline`: where its stages are measured,
    shared with the CLIP and VAE of the same loader. `advice`: what a person is told beside each plan.
    `step_cache`: which steps are computed; None: all. `compiling`: blocks by code of torch.compile's."""
    settings = (limit_bytes, ram_limit_bytes, timeline, advice, step_cache, compiling)
    return as_patcher(QwenImageModel(transformer, *settings))


def own_sigmas(model: Any, latents: Tensor, steps: int, denoise: float) -> Tensor:
    """Of the reference's schedule for these latents, from a MODEL: Layered's has another."""
    layered = bool(model.model.model_config.unet_config.get(ADDITIONAL_KEY))
    sigmas = layered_sigmas if layered else qwen_sigmas
    return sigmas(steps, math.prod(patches_of(latents)), denoise=denoise)


def rescaled_guidance(args: dict[str, Any]) -> Tensor:
    """As ComfyUI's sampler_cfg_function: true guidance with the norm of the positive prediction."""
    # cond and uncond are sigma times the velocities, which changes no ratio of norms
    return true_cfg(args["cond"], args["uncond"], args["cond_scale"], rescale=True)


class QwenImageDiffusion(DiffusionModel):
    """ComfyUI's interface of Qwen-Image's transformer."""

    def __init__(self, calls: ModelCalls) -> None:
        super().__init__(calls)
        config = calls.transformer.config
        self.in_channels = config.in_channels  # RenormCFG asks for it
        self.inner_dim, self.patch_size = config.inner_dim, PATCH
        self.guard()

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        attention_mask: Tensor | None = None,
        ref_latents: list[Tensor] | None = None,
        additional_t_cond: Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """x (B, 16, F, H, W) normalised, timestep (B,) sigma in 0..1, context (B, L, dim), additional_t_cond (B,) of 0
        and 1 -> velocity like x."""
        options = transformer_options or {}
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        executor = WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timestep, context, attention_mask, ref_latents, additional_t_cond, options, **kwargs)

    def _forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        attention_mask: Tensor | None,
        ref_latents: list[Tensor] | None,
        additional_t_cond: Tensor | None,
        transformer_options: dict[str, Any],
        control: Any = None,
        ref_latents_method: str | None = None,
        **kwargs: Any,
    ) -> Tensor:
        calls = self._calls
        check_patches(transformer_options)
        config = calls.transformer.config
        check_channels_of_call(x, config.in_channels // PATCH**2)
        if additional_t_cond is not None and not config.use_additional_t_cond:
            refuse(
                "Additional time conditioning",
                "use a Qwen-Image-Layered model, or remove the node that sets it.",
                code="graph.additional_time",
            )
        method = None if config.use_layer3d_rope else ref_latents_method  # which has but one
        call = Call(
            x,
            timestep,
            context,
            attention_mask=attention_mask,
            references=ref_latents or [],
            method=method,
            additional_t_cond=additional_t_cond,
            residuals=control or (),
            dtype=self.dtype,
        )
        if has_patches(transformer_options):
            assert calls.images is not None
            given = x.to(self.dtype)
            call.patches = BlockPatches(
                transformer_options, given, config.num_layers, call.reference_tokens, calls.images
            )
        return self.answer(call, x, transformer_options)


class QwenImageModel(LowVRAMModel, comfy.model_base.QwenImage):
    """ComfyUI's Qwen-Image with our transformer in the place of its own."""

    DIFFUSION_MODEL = QwenImageDiffusion

    transformer: QwenImageTransformer

    def __init__(self, transformer: QwenImageTransformer, *settings: Any) -> None:
        """`settings`: as LowVRAMModel has them behind the transformer."""
        additional = {ADDITIONAL_KEY: True} if transformer.config.use_additional_t_cond else {}
        config = comfy.supported_models.QwenImage(
            {"image_model": "qwen_image", "disable_unet_model_creation": True, **additional}
        )
        super().__init__(config, transformer, *settings)

    def check_run(self, conds: dict[str, list[dict[str, Any]]], noise: Tensor) -> None:
        transformer = self.transformer
        check_references(transformer.variant, conds)
        check_methods(conds, transformer.config)
        check_latents(noise)
        check_size(noise)
        check_layers(transformer.variant, noise.shape[2])
        check_controls(conds, transformer.config.inner_dim, noise.shape[2])

    def check_beside(self, conds: dict[str, list[dict[str, Any]]], options: dict[str, Any]) -> None:
        """Its ControlNets are checked with the run; patches are called around its blocks."""

    def request_of(self, conds: Conds, noise: Tensor, sigmas: Tensor) -> SamplingRequest:
        check_positions(conds, noise.shape, self.transformer)
        return request_of(conds, noise.shape, sigmas, self.transformer.config.joint_attention_dim)

    def controls_of(
        self, conds: Conds, guider: Any, noise: Tensor, request: SamplingRequest, beside: Sequence[ModelPatcher]
    ) -> Controls:
        return controls_of(conds, guider, noise.shape, request, self.transformer.footprint, beside)
