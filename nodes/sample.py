"""The node that samples as the reference pipeline does, through ComfyUI's own samplers."""

from numbers import Integral, Real
from typing import Any

import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import latent_preview
from torch import Tensor

from ..engine.errors import InvalidRequest, Unsupported
from ..engine.log import logger
from ..engine.models.qwen_image.schedule import lightning_sigmas
from ..engine.runs.free_memory import check_room
from ..engine.texts import shown
from .adapters.networks import served_model
from .adapters.streamed_model import LowVRAMModel
from .adapters.value_checks import check_conditioning, check_mask, check_prompts, check_widgets, latent_of
from .display_names import CATEGORY

QWEN_SCHEDULER = "qwen_image"
LIGHTNING_SCHEDULER = "lightning"
# preset -> steps and schedule; they take no guidance
PRESETS: dict[str, tuple[int, str] | None] = {
    "as set": None,
    "Lightning, 8 steps": (8, LIGHTNING_SCHEDULER),
    "Lightning, 4 steps": (4, LIGHTNING_SCHEDULER),
    "2.1-Turbo, 8 steps": (8, QWEN_SCHEDULER),
}
REPORT_KEY = "qwen_lowvram_report"
MOST_DOWNSCALE = 64  # of today's models 32
MOST_INDEX = 100_000  # ComfyUI draws the noise of every one before it
_SMALLER = "Use a smaller batch, or a smaller image."


class QwenLowVRAMSample:
    """Sample."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Makes the latent image with Qwen-Image's own noise schedule for the image's size and with true guidance: "
        "each block is brought to the card once per step, for both prompts. Shows the step, the block and the memory "
        "while it runs."
    )
    RETURN_TYPES = ("LATENT",)
    OUTPUT_TOOLTIPS = ("The latent image, for Decode (tiled) or ComfyUI's VAE Decode.",)
    SEARCH_ALIASES = ("ksampler", "sampler", "qwen", "true cfg")
    FUNCTION = "sample"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model, from Load Qwen-Image (low VRAM)."}),
                "positive": ("CONDITIONING", {"tooltip": "What the image should show."}),
                "negative": (
                    "CONDITIONING",
                    {"tooltip": "What the image should not show; not computed if cfg is 1."},
                ),
                "latent_image": (
                    "LATENT",
                    {"tooltip": "Size of the image, and how many: connect EmptySD3LatentImage, or VAE Encode."},
                ),
                "seed": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 0xFFFFFFFFFFFFFFFF,
                        "control_after_generate": True,
                        "tooltip": "The seed of the noise that the image grows from.",
                    },
                ),
                "steps": (
                    "INT",
                    {
                        "default": 20,
                        "min": 1,
                        "max": 1000,
                        "tooltip": "Number of sampling steps. The reference uses 50 (Qwen-Image-2.1: 40); 20 give "
                        "good images. Lightning models use 8 or 4, 2.1-Turbo uses 8.",
                    },
                ),
                "cfg": (
                    "FLOAT",
                    {
                        "default": 4.0,
                        "min": 1.0,
                        "max": 30.0,
                        "step": 0.1,
                        "tooltip": "Guidance strength: how far the image moves away from the negative prompt. 1 "
                        "leaves that prompt out and halves the computing; the reference of Qwen-Image-2.1 uses 1.",
                    },
                ),
                "sampler": (
                    list(comfy.samplers.SAMPLER_NAMES),
                    {
                        "default": "euler",
                        "tooltip": "The sampling method. euler is the reference; all of ComfyUI's samplers work.",
                    },
                ),
                "scheduler": (
                    [QWEN_SCHEDULER, LIGHTNING_SCHEDULER, *comfy.samplers.SCHEDULER_NAMES],
                    {
                        "default": QWEN_SCHEDULER,
                        "tooltip": "The noise schedule. qwen_image is the reference, shifted by image size; "
                        "lightning is that of the Lightning models, with shift 3. The others are ComfyUI's.",
                    },
                ),
                "denoise": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.01,
                        "max": 1.0,
                        "step": 0.01,
                        "tooltip": "Denoising strength. Below 1, sampling starts from the latent image instead of "
                        "pure noise (image to image).",
                    },
                ),
                "norm_rescale": (
                    "BOOLEAN",
                    {
                        "default": True,
                        "advanced": True,
                        "tooltip": "Scales the guided prediction to the norm of the positive one, as the reference "
                        "does. It changes nothing for Qwen-Image-2.1, whose reference does not do this.",
                    },
                ),
            },
            "optional": {
                "preset": (
                    list(PRESETS),
                    {
                        "default": next(iter(PRESETS)),
                        "tooltip": "Lightning uses 8 or 4 steps, cfg 1, euler and the lightning schedule instead of "
                        "what is set above. It needs a Lightning LoRA (Load LoRA), or a model that has it built in. "
                        "2.1-Turbo uses that model's own 8 steps.",
                    },
                )
            },
        }

    def sample(
        self,
        model: Any,
        positive: Any,
        negative: Any,
        latent_image: dict[str, Any],
        seed: int,
        steps: int,
        cfg: float,
        sampler: str,
        scheduler: str,
        denoise: float,
        norm_rescale: bool,
        preset: str = next(iter(PRESETS)),
    ) -> dict[str, Any]:
        check_widgets(
            self.INPUT_TYPES(),
            model=model,
            seed=seed,
            steps=steps,
            cfg=cfg,
            sampler=sampler,
            scheduler=scheduler,
            denoise=denoise,
            norm_rescale=norm_rescale,
            preset=preset,
        )
        given = latent_of("latent_image", latent_image)
        if (chosen := PRESETS[preset]) is not None:
            (steps, scheduler), cfg, sampler = chosen, 1.0, "euler"
        check_conditioning("positive", positive)
        if cfg > 1:
            check_conditioning("negative", negative)
        else:
            check_prompts("negative", negative, least=0)  # not computed, but ComfyUI takes it apart
        latents = comfy.sample.fix_empty_latent_channels(
            model,
            given,
            _downscale(latent_image, "downscale_ratio_spacial"),
            _downscale(latent_image, "downscale_ratio_temporal"),
        )
        served = served_model(model)
        noise_mask = _noise_mask(latent_image.get("noise_mask"), latents)
        # the noise, and what the sampler makes of it: the plan comes after the first of them
        check_room(4 * latents.nbytes, f"Sampling {len(latents)} latents of this size", _SMALLER)
        _check_batch_index(latent_image.get("batch_index"))
        noise = comfy.sample.prepare_noise(latents, seed, latent_image.get("batch_index"))
        guided = model.clone()
        rescale = served.rescaled_guidance if norm_rescale else None
        if rescale is not None and "sampler_cfg_function" in guided.model_options:
            raise Unsupported(
                "Another node sets its own guidance on this model (such as RescaleCFG); norm_rescale would replace "
                "it.\n\nWhat to do: switch norm_rescale off, or remove that node.",
                code="graph.own_guidance",
            )
        if rescale is not None:
            guided.set_model_sampler_cfg_function(rescale)
        sigmas = None
        if scheduler == LIGHTNING_SCHEDULER:
            sigmas = lightning_sigmas(steps, denoise=denoise)
        elif scheduler == QWEN_SCHEDULER:
            sigmas = served.own_sigmas(model, latents, steps, denoise)
        if sigmas is not None and "model_sampling" in model.object_patches:
            logger.warning(
                "A node sets the shift of the schedule (such as ModelSamplingAuraFlow), but the scheduler '%s' has its "
                "own. To use that node's shift, choose the scheduler 'simple'.",
                scheduler,
            )
        samples = comfy.sample.sample(
            guided,
            noise,
            steps,
            cfg,
            sampler,
            scheduler if sigmas is None else comfy.samplers.SCHEDULER_NAMES[0],
            positive,
            negative,
            latents,
            denoise=denoise,
            noise_mask=noise_mask,
            sigmas=sigmas,
            callback=latent_preview.prepare_callback(guided, steps),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
        dropped = ("downscale_ratio_spacial", "downscale_ratio_temporal")
        out = {key: value for key, value in latent_image.items() if key not in dropped}
        ui = {}
        if isinstance(model.model, LowVRAMModel) and model.model.last_report is not None:
            ui[REPORT_KEY] = [model.model.last_report.as_dict()]
        return {"ui": ui, "result": ({**out, "samples": samples},)}


def _downscale(latent: dict[str, Any], key: str) -> Any:
    """How many pixels or frames an empty latent's node gave each latent; ComfyUI resizes by it. None: not said.

    Raises InvalidRequest for what is no such number.
    """
    ratio = latent.get(key)
    # NaN is neither more nor less than anything
    if ratio is None or (isinstance(ratio, Real) and 1 <= float(ratio) <= MOST_DOWNSCALE):
        return ratio
    raise InvalidRequest(
        "latent_image: its {key} is {ratio}; a number from 1 to {most} is needed.\n\nWhat to do: use "
        "EmptySD3LatentImage, or check the node that makes the latent.",
        code="sampling.wrong_ratio",
        key=key,
        ratio=shown(ratio),
        most=MOST_DOWNSCALE,
    )


def _check_batch_index(index: Any) -> None:
    """Raise InvalidRequest for what does not tell which of a seed's noises each latent is given."""
    if index is None:
        return
    numbers = list(index) if isinstance(index, list | tuple) else []
    if not numbers or not all(isinstance(i, Integral) and 0 <= int(i) <= MOST_INDEX for i in numbers):
        raise InvalidRequest(
            "latent_image: its batch_index is not a list of whole numbers from 0 to {most}.\n\nWhat to do: use "
            "ComfyUI's batch nodes (LatentFromBatch, RepeatLatentBatch).",
            code="sampling.wrong_batch_index",
            most=MOST_INDEX,
        )


def _noise_mask(mask: Tensor | None, latents: Tensor) -> Tensor | None:
    """A mask for each image, (N, 1, 1, H, W): ComfyUI mixes several (N, H, W) into one, as frames of a video.

    Raises InvalidRequest for more masks than images, and where nothing is masked: that run would change nothing.
    """
    if mask is None:
        return None
    check_mask("The noise mask", mask)
    masks = mask if mask.ndim == latents.ndim else mask.reshape(-1, 1, 1, *mask.shape[-2:])
    if len(masks) > len(latents):
        raise InvalidRequest(
            "There are {masks} masks for a batch of {count} images.\n\nWhat to do: combine the masks (MaskComposite), "
            "or make as many images (RepeatLatentBatch).",
            code="sampling.wrong_number_of_masks",
            masks=len(masks),
            count=len(latents),
        )
    if not comfy.sampler_helpers.prepare_mask(masks, latents.shape, latents.device).any():
        raise InvalidRequest(
            "The noise mask is empty: nothing in the image would change.\n\nWhat to do: right-click the image in Load "
            "Image, choose 'Open in Mask Editor' and paint over what is to change. Or remove the node that sets the "
            "mask.",
            code="sampling.empty_mask",
        )
    return masks
