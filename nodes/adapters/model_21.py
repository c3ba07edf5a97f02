"""Qwen-Image-2.1's transformer as ComfyUI's MODEL, for every ComfyUI: those before 0.37 have no class of their own."""

from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.supported_models_base
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor

from ...engine.compute.step_schedules import StepCache
from ...engine.errors import InvalidRequest
from ...engine.log import logger
from ...engine.models.qwen_image_21.latents import CHANNELS, TOKEN_PX, shape_in_tokens
from ...engine.models.qwen_image_21.schedule import reference_sigmas
from ...engine.models.qwen_image_21.transformer import QwenImage21Transformer
from ...engine.models.qwen_image_21.variants import Variant21
from ...engine.models.qwen_image_21_vae.latent_statistics import normalised_latents, raw_latents
from ...engine.planning.request import SamplingRequest
from ...engine.runs.timeline import Timeline
from .around_runs import as_patcher
from .graph_checks import check_channels_of_call
from .graph_checks_21 import SLOTS_KEY, check_references_21, tell_haloed_edit, tell_other_schedule
from .model_call_21 import Call21, prefix_keys
from .patcher import LowVRAMPatcher
from .run_conditions import Conds, entries_of
from .streamed_model import DiffusionModel, LowVRAMModel

IMAGE_MODEL = "qwen_image21"
CACHE_KEY = "qwen_image21_cache"  # of transformer_options: what ComfyUI's node QwenImage21Cache sets
KSAMPLER_SHIFT = 0.69  # ComfyUI's own for every size; the reference's at 1024x1024


class QwenImage21Format(comfy.latent_formats.LatentFormat):
    """Latents (B, 64, h, w) of a sixteenth of the size."""

    latent_channels = CHANNELS
    latent_dimensions = 2
    spacial_downscale_ratio = TOKEN_PX

    def process_in(self, latent: Tensor) -> Tensor:
        return normalised_latents(latent)

    def process_out(self, latent: Tensor) -> Tensor:
        return raw_latents(latent)


class QwenImage21Config(comfy.supported_models_base.BASE):
    unet_config: ClassVar[dict[str, Any]] = {"image_model": IMAGE_MODEL}
    sampling_settings: ClassVar[dict[str, float]] = {"multiplier": 1.0, "shift": KSAMPLER_SHIFT}
    latent_format = QwenImage21Format
    supported_inference_dtypes = (torch.bfloat16, torch.float16, torch.float32)


def make_model_21(
    transformer: QwenImage21Transformer,
    limit_bytes: int | None,
    ram_limit_bytes: int | None = None,
    timeline: Timeline | None = None,
    advice: str = "",
    step_cache: StepCache | None = None,
    compiling: bool = False,
) -> LowVRAMPatcher:
    """As `model.make_model`."""
    settings = (limit_bytes, ram_limit_bytes, timeline, advice, step_cache, compiling)
    return as_patcher(QwenImage21Model(transformer, *settings))


def own_sigmas_21(model: Any, latents: Tensor, steps: int, denoise: float) -> Tensor:
    """Of the reference's schedule for these latents; Turbo's eight, whatever the size."""
    variant = model.model.transformer.variant if isinstance(model.model, QwenImage21Model) else Variant21.BASE
    return reference_sigmas(variant, steps, prod(shape_in_tokens(latents)), denoise=denoise)


class QwenImage21Diffusion(DiffusionModel):
    """ComfyUI's interface of 2.1's transformer."""

    def __init__(self, calls: Any) -> None:
        super().__init__(calls)
        self.in_channels = CHANNELS
        self.guard()

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        attention_mask: Tensor | None = None,
        ref_latents: list[Tensor] | None = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """x (B, 64, h, w) normalised, timestep (B,) sigma in 0..1, context (B, L, dim) -> velocity like x."""
        options = transformer_options or {}
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        executor = WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timestep, context, attention_mask, ref_latents, options, **kwargs)

    def _forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        attention_mask: Tensor | None,
        ref_latents: list[Tensor] | None,
        transformer_options: dict[str, Any],
        image_slots: Sequence[int] = (),
        prefix_keys: Sequence[tuple[str, str]] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        check_channels_of_call(x, CHANNELS)
        call = Call21(
            x,
            timestep,
            context,
            mask=attention_mask,
            references=ref_latents or [],
            slots=image_slots,
            keys=prefix_keys,
            dtype=self.dtype,
        )
        return self.answer(call, x, transformer_options)


class _QwenImage21(comfy.model_base.BaseModel):
    """What ComfyUI's own class of the model would be: its sigmas, and its conditions as arguments of each call."""

    def __init__(self, config: Any, device: Any = None) -> None:
        super().__init__(config, comfy.model_base.ModelType.FLUX, device=device)  # sigmas shifted by mu

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        out = super().extra_conds(**kwargs)
        prompt, mask = kwargs["cross_attn"], kwargs.get("attention_mask")
        if mask is not None and bool(mask.all()):
            mask = None  # looked at once, before the run
        references = [self.process_latent_in(latent) for latent in kwargs.get("reference_latents") or ()]
        slots = tuple(kwargs.get(SLOTS_KEY) or ())
        out["c_crossattn"] = comfy.conds.CONDRegular(prompt)
        if mask is not None:
            out["attention_mask"] = comfy.conds.CONDRegular(mask)
        if references:
            out["ref_latents"] = comfy.conds.CONDList(references)
            out["image_slots"] = comfy.conds.CONDConstant(slots)
        # read once for the run: the calls of each step get copies
        out["prefix_keys"] = comfy.conds.CONDConstant(prefix_keys(prompt, mask, references, slots))
        return out


class QwenImage21Model(LowVRAMModel, _QwenImage21):
    """A model of ComfyUI's with 2.1's transformer of ours."""

    DIFFUSION_MODEL = QwenImage21Diffusion

    transformer: QwenImage21Transformer

    def __init__(self, transformer: QwenImage21Transformer, *settings: Any) -> None:
        """`settings`: as LowVRAMModel has them behind the transformer."""
        config = QwenImage21Config({"image_model": IMAGE_MODEL, "disable_unet_model_creation": True})
        super().__init__(config, transformer, *settings)

    def check_run(self, conds: dict[str, list[dict[str, Any]]], noise: Tensor) -> None:
        if noise.ndim != 4:
            raise InvalidRequest(
                "A latent of shape {shape} does not belong to Qwen-Image-2.1, whose latents have four dimensions, "
                "[batch, {channels}, height / {px}, width / {px}].\n\nWhat to do: use EmptyLatentImage, or encode "
                "images with this model's VAE.",
                code="graph_21.wrong_latent",
                shape=list(noise.shape),
                channels=CHANNELS,
                px=TOKEN_PX,
            )
        for entry in (entry for entries in conds.values() for entry in entries or ()):
            check_references_21(entry, noise)

    def check_beside(self, conds: dict[str, list[dict[str, Any]]], options: dict[str, Any]) -> None:
        super().check_beside(conds, options)
        cache = options.get(CACHE_KEY)
        if cache:
            logger.warning(
                "QwenImage21Cache (%s) is not followed: keys and values of prompt and references are kept as the plan "
                "says, on the card or in RAM, as they are.",
                ", ".join(f"{name} {value}" for name, value in cache.items()) if isinstance(cache, dict) else cache,
            )

    def request_of(self, conds: Conds, noise: Tensor, sigmas: Tensor) -> SamplingRequest:
        if self.transformer.variant.is_turbo:
            tell_other_schedule(sigmas)
        entries = entries_of(conds)
        needed = self.transformer.config.prompt_dim
        for entry in entries:
            found = entry["cross_attn"].shape[-1]
            if found != needed:
                raise InvalidRequest(
                    "The prompt's embeddings have {dimensions} dimensions, but {needed} are needed.\n\nWhat to do: "
                    "encode the prompt with Qwen-Image-2.1's own text encoder, Qwen3-VL-8B.",
                    code="conditioning_21.other_dimensions",
                    dimensions=found,
                    needed=needed,
                )
        references = [
            sum(prod(shape_in_tokens(latent)) for latent in entry.get("reference_latents") or ()) for entry in entries
        ]
        high, wide = shape_in_tokens(noise)
        tell_haloed_edit((wide * TOKEN_PX, high * TOKEN_PX), max(references, default=0))
        return SamplingRequest(
            width=wide * TOKEN_PX,
            height=high * TOKEN_PX,
            branches=max(1, len(entries)) * noise.shape[0],
            prompt_tokens=max((entry["cross_attn"].shape[1] for entry in entries), default=0),
            reference_tokens=max(references, default=0),
            timesteps=max(1, len(sigmas) - 1),
            token_px=TOKEN_PX,
            prompts=sum(entry["cross_attn"].shape[0] for entry in entries),
        )
