"""The node that opens a model: files and settings in, MODEL, CLIP and VAE out. Reads headers and small weights."""

from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch

from ..engine.errors import QwenLowVRAMError
from ..engine.files.checkpoint import Checkpoint
from ..engine.models.qwen_image.positions import Positions
from ..engine.models.qwen_image.transformer import TimestepRounding
from ..engine.models.qwen_vl.vision_files import mmproj_identity
from ..engine.out_of_memory import in_words
from ..engine.runs.timeline import Timeline
from . import devices, model_choices
from .adapters import switches
from .adapters.limit_names import RAM_LIMIT, VRAM_LIMIT
from .adapters.networks import served_of
from .adapters.progress import executing_prompt_id, warn
from .adapters.vae import make_vae
from .adapters.value_checks import check_widgets, limit_bytes
from .display_names import AUTO, CATEGORY
from .inputs import at_input, before_the_run
from .sources import VARIANTS, Sources, chosen_variant, require_transformer, tokenizer_identity
from .weight_cache import (
    AS_STORED,
    FASTEST,
    WEIGHT_FORMATS,
    check_weight_format,
    in_weight_format,
    losses,
    prompt_cache,
)
from .weight_formats import Parts, advice_for, fastest_format, limits_now

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class QwenLowVRAMLoader:
    """Load Qwen-Image."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Opens Qwen-Image for a small card: the weights stay in their files and pass through the card block by "
        "block, each once per step, within the VRAM limit. The image is the one a large card would make."
    )
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    OUTPUT_TOOLTIPS = (
        "The transformer. Works with this pack's Sample and with ComfyUI's own samplers.",
        "The text encoder. Reads its layers from the file for each prompt and leaves the card at once.",
        "The image decoder and encoder.",
    )
    SEARCH_ALIASES = ("qwen image", "low vram", "load diffusion model", "offload")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "transformer": (
                    model_choices.transformer_choices(),
                    {
                        "tooltip": "A file of models/diffusion_models (bf16, fp16, fp32, fp8, fp8 scaled, GGUF), a "
                        "pipeline folder of models/diffusers (bitsandbytes nf4, fp4 and int8 too), or an all-in-one "
                        "file of models/checkpoints. Qwen-Image-2.1 and 2.1-Turbo are for non-commercial use (Qwen "
                        "Research License)."
                    },
                ),
                "text_encoder": (
                    model_choices.component_choices("text_encoders"),
                    {
                        "tooltip": "From models/text_encoders: Qwen2.5-VL-7B, for Qwen-Image-2.1 Qwen3-VL-8B; 'from "
                        "the folder': that of the pipeline folder, or of the all-in-one file, that is chosen above."
                    },
                ),
                "vae": (
                    model_choices.component_choices("vae"),
                    {
                        "tooltip": "From models/vae: qwen_image_vae (qwen_image_layered_vae for Qwen-Image-Layered, "
                        "qwen_image_2.1_vae for Qwen-Image-2.1); 'from the folder' as above."
                    },
                ),
                "dtype": (
                    ["auto", *DTYPES],
                    {
                        "default": "auto",
                        "tooltip": "What is computed in. auto: bf16 where the card has it, else fp32; fp32 for fp32 "
                        "files. fp16 can overflow to black images.",
                    },
                ),
                "weight_format": (
                    list(WEIGHT_FORMATS),
                    {
                        "default": AUTO,
                        "tooltip": "How weights are held and streamed. auto: as stored. fp8, int8, nf4 and fp4 "
                        "quantize the blocks of a bf16, fp16 or fp32 file at the first load and keep them on the disk "
                        "(27.2 GB become 13.6 in fp8 or int8, 7.6 in nf4 or fp4). fastest: int8 or nf4 where that "
                        "makes a step over 10 % faster on this machine, so the image depends on the machine. Chosen "
                        "when this node runs, and kept until an input or a file of it changes.",
                    },
                ),
                "vram_limit_gb": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 1024.0,
                        "step": 0.1,
                        "tooltip": "The most memory on the card that encoding, sampling and decoding may use, in "
                        "GB as cards are sold (GiB). 0: what is free when it runs.",
                    },
                ),
                "timesteps": (
                    [rounding.value for rounding in TimestepRounding],
                    {
                        "default": TimestepRounding.FP32.value,
                        "advanced": True,
                        "tooltip": "fp32: exact timesteps, as ComfyUI has them. diffusers: rounded as the diffusers "
                        "pipeline rounds them in bf16, to compare images with it.",
                    },
                ),
            },
            "optional": {
                "variant": (
                    list(VARIANTS),
                    {
                        "default": AUTO,
                        "advanced": True,
                        "tooltip": "Which member of the family the transformer is. auto: by its mark, its folder or "
                        "its name. Choose it for a renamed file, and for Edit-2511 in GGUF files without its mark.",
                    },
                ),
                "ram_limit_gb": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 4096.0,
                        "step": 0.1,
                        "tooltip": "The most RAM that the model's blocks and buffers may take, in GB (GiB); the other "
                        "blocks are read from the file at every step. 0: what is free, but for a reserve.",
                    },
                ),
                "transformer_device": (
                    devices.choices_for_blocks(),
                    {
                        "default": AUTO,
                        "advanced": True,
                        "tooltip": "Where images are sampled. auto: ComfyUI's device. all cards: blocks stay on all "
                        "of them, within the VRAM limit of each, and activations are handed on.",
                    },
                ),
                "text_encoder_device": (
                    devices.choices(),
                    {
                        "default": AUTO,
                        "advanced": True,
                        "tooltip": "Where prompts are encoded. auto: ComfyUI's device for text encoders.",
                    },
                ),
                "vae_device": (
                    devices.choices(),
                    {
                        "default": AUTO,
                        "advanced": True,
                        "tooltip": "Where images are decoded. auto: ComfyUI's device for VAEs.",
                    },
                ),
                "positions": (
                    [positions.value for positions in Positions],
                    {
                        "default": Positions.COMFYUI.value,
                        "advanced": True,
                        "tooltip": "How image positions are counted where a side has an odd number of 16 px patches "
                        "(1328 has 83) or a reference is longer than the image. comfyui: the same image as ComfyUI's "
                        "own loader makes. diffusers: the same as the diffusers pipeline.",
                    },
                ),
            },
        }

    @classmethod
    async def VALIDATE_INPUTS(cls, transformer: str | None) -> bool | str:
        """Before the run: is the transformer there, whole, and one? ComfyUI says the answer once for every input that
        is named here, so this names one; `load` looks at the others before it loads anything."""
        return await before_the_run(require_transformer, transformer)

    @classmethod
    def IS_CHANGED(cls, transformer: str, text_encoder: str, vae: str, **settings: Any) -> str:
        if None in (transformer, text_encoder, vae):
            return ""  # linked: not known yet, and what is linked is in the cache's key
        try:
            sources = Sources.of(transformer, text_encoder, vae)
            opened = sources.open(settings.get("variant") or AUTO)
            tokenizer = tokenizer_identity(sources.tokenizer)
            lost = losses(opened[0], settings.get("weight_format"))
            vision = mmproj_identity(opened[1])
        except (QwenLowVRAMError, OSError) as error:
            return str(error)  # `load` raises it, and another error than this would hide it
        return "/".join([*(checkpoint.identity for checkpoint in opened), vision, *tokenizer, str(lost)])

    @in_words("the model was loaded")
    def load(
        self,
        transformer: str,
        text_encoder: str,
        vae: str,
        dtype: str,
        weight_format: str,
        vram_limit_gb: float,
        timesteps: str,
        variant: str = AUTO,
        ram_limit_gb: float = 0.0,
        transformer_device: str = AUTO,
        text_encoder_device: str = AUTO,
        vae_device: str = AUTO,
        positions: str = Positions.COMFYUI.value,
    ) -> tuple[Any, Any, Any]:
        check_widgets(
            self.INPUT_TYPES(),
            dtype=dtype,
            vram_limit_gb=vram_limit_gb,
            timesteps=timesteps,
            ram_limit_gb=ram_limit_gb,
            transformer_device=transformer_device,
            text_encoder_device=text_encoder_device,
            vae_device=vae_device,
            positions=positions,
        )
        sources = Sources.of(transformer, text_encoder, vae)
        transformer_file, text_file, vae_file = sources.open(variant)
        tokenizer = sources.prompt_tokenizer()
        with at_input("weight_format"):
            check_weight_format(transformer_file, weight_format)
        management = comfy.model_management
        switches.tell_unfollowed()
        hardware = devices.hardware_of(devices.device_of(transformer_device, management.get_torch_device()))
        text_default = switches.text_encoder_device(hardware.device)
        text_hardware = devices.hardware_of(devices.device_of(text_encoder_device, text_default))
        vae_on = devices.device_of(vae_device, management.vae_device())
        limits = _Limits(limit_bytes(vram_limit_gb), limit_bytes(ram_limit_gb))
        compute = _compute_dtype(dtype, transformer_file, hardware.device)
        member = sources.member(transformer_file, variant)
        doubt = sources.doubt_about(transformer_file, member) if chosen_variant(variant) is None else ""
        if doubt:
            warn(doubt)
        weight_format, advice = _format_of(transformer_file, weight_format, Parts(member, compute, hardware), limits)
        family, served = sources.family, served_of(transformer_file)
        model = family.open(
            in_weight_format(transformer_file, weight_format, hardware, limits.on(hardware.device)),
            dtype=compute,
            hardware=hardware,
            others=[devices.hardware_of(other) for other in devices.others_of(transformer_device, hardware.device)],
            rounding=TimestepRounding(timesteps),
            positions=Positions(positions),
            variant=member,
        )
        encoder = family.encoder(
            text_file, dtype=_compute_dtype(dtype, text_file, text_hardware.device), hardware=text_hardware
        )
        timeline = Timeline(executing_prompt_id)
        image_vae = make_vae(
            vae_file,
            dtype=_vae_dtype(dtype, vae_file, vae_on),
            limit_bytes=limits.on(vae_on),
            limit_name=limits.name_on(vae_on),
            device=vae_on,
            timeline=timeline,
            read=family.read_vae,
        )
        clip = served.clip(
            encoder,
            tokenizer,
            limits.on(text_hardware.device),
            timeline,
            prompt_cache(),
            member,
            limits.name_on(text_hardware.device),
        )
        told = " ".join(text for text in (doubt, advice) if text)
        return served.make_model(model, limits.vram_bytes, limits.ram_bytes, timeline, told), clip, image_vae


@dataclass(frozen=True)
class _Limits:
    """The person's limits; None: what is free."""

    vram_bytes: int | None
    ram_bytes: int | None

    def on(self, device: torch.device) -> int | None:
        """Of the memory of `device`."""
        given = [limit for limit in (self.vram_bytes, self.ram_bytes) if limit is not None]
        return min(given, default=None) if device.type == "cpu" else self.vram_bytes

    def name_on(self, device: torch.device) -> str:
        """Of the input that sets it."""
        return RAM_LIMIT if self.on(device) != self.vram_bytes else VRAM_LIMIT


def _format_of(source: Checkpoint, weight_format: str, parts: Parts, limits: _Limits) -> tuple[str, str]:
    """The format that is held, and a sentence where another one would be much faster."""
    if weight_format not in (AUTO, AS_STORED, FASTEST):
        return weight_format, ""
    now = limits_now(parts.hardware.device, limits.vram_bytes, limits.ram_bytes)
    if weight_format == FASTEST:
        return fastest_format(source, parts, now), ""
    return AS_STORED, advice_for(source, parts, now)


def _compute_dtype(choice: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    if choice != "auto":
        return DTYPES[choice]
    can_bf16 = comfy.model_management.should_use_bf16(device, prioritize_performance=False)
    if checkpoint.full_precision or not can_bf16:
        return torch.float32
    return torch.bfloat16


def _vae_dtype(choice: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """A dtype that a person chose in the node comes before ComfyUI's switches."""
    by_switch = switches.vae_dtype() if choice == "auto" else None
    return by_switch or _compute_dtype(choice, checkpoint, device)
