"""The node that opens a model: files and settings in, MODEL, CLIP and VAE out. Reads headers and small weights."""

from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch

from ..engine.compute.linear_choice import Computing
from ..engine.compute.step_schedules import OFF, step_cache_of
from ..engine.errors import QwenLowVRAMError
from ..engine.files.checkpoint import Checkpoint
from ..engine.models.qwen_image.positions import Positions
from ..engine.models.qwen_image.transformer import TimestepRounding
from ..engine.models.qwen_vl.vision_files import mmproj_identity
from ..engine.out_of_memory import in_words
from ..engine.runs.dtype_choice import encoder_dtype
from ..engine.runs.phases import Phase, PhaseProgress
from ..engine.runs.timeline import Timeline
from . import devices
from .adapters import switches
from .adapters.attention import attention_of_loader
from .adapters.in_comfyui import InComfyUI
from .adapters.limit_names import RAM_LIMIT, VRAM_LIMIT
from .adapters.linear_layers import linear_of_loader, nothing_as_stored
from .adapters.networks import served_of
from .adapters.progress import executing_prompt_id, warn
from .adapters.vae import make_vae
from .adapters.value_checks import check_widgets, limit_bytes
from .display_names import AUTO, CATEGORY
from .dtypes import compute_dtype, products_text, transformer_dtype, vae_dtype
from .inputs import at_input, before_the_run
from .loader_inputs import loader_inputs
from .sources import Sources, chosen_variant, require_transformer, tokenizer_identity
from .weight_cache import (
    AS_STORED,
    FASTEST,
    check_weight_format,
    in_weight_format,
    losses,
    prompt_cache,
)
from .weight_formats import Parts, advice_for, fastest_format, limits_now


class QwenLowVRAMLoader:
    """Load Qwen-Image."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Opens Qwen-Image for a small card: the weights stay in their files and pass through the card block by "
        "block, each once per step, within the VRAM limit. The image is the one a large card would make."
    )
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    OUTPUT_TOOLTIPS = (
        "The transformer. It works with this pack's Sample and with ComfyUI's own samplers.",
        "The text encoder. Its layers are read from the file for each prompt and leave the card at once.",
        "The image decoder and encoder.",
    )
    SEARCH_ALIASES = ("qwen image", "low vram", "load diffusion model", "offload")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return loader_inputs()

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
        attention: str = AUTO,
        step_cache: str = OFF,
        compute: str = Computing.AS_COMFYUI.value,
        compile: bool = False,
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
            attention=attention,
            step_cache=step_cache,
            compute=compute,
            compile=compile,
        )
        opening = PhaseProgress(InComfyUI(), Phase.OPENING)
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
        products = transformer_dtype(dtype, transformer_file, hardware)
        member = sources.member(transformer_file, variant)
        doubt = sources.doubt_about(transformer_file, member) if chosen_variant(variant) is None else None
        if doubt:
            warn(doubt)
        weight_format, advice = _format_of(transformer_file, weight_format, Parts(member, products, hardware), limits)
        family, served = sources.family, served_of(transformer_file)
        others = [devices.hardware_of(other) for other in devices.others_of(transformer_device, hardware.device)]
        devices_of_blocks = [hardware, *others]
        with at_input("attention"):
            attending, asked = attention_of_loader(attention, transformer_file, devices_of_blocks, products)
        opened = in_weight_format(transformer_file, weight_format, hardware, limits.on(hardware.device))
        linear, slower = linear_of_loader(
            Computing(compute), opened, devices_of_blocks, products, as_stored=opened is transformer_file
        )
        model = family.open(
            opened,
            dtype=products,
            hardware=hardware,
            others=others,
            rounding=TimestepRounding(timesteps),
            positions=Positions(positions),
            variant=member,
            linear=linear,
        )
        model.attend_by(attending)
        slower = slower or nothing_as_stored(linear, model)
        encoder = family.encoder(
            text_file,
            dtype=encoder_dtype(compute_dtype(dtype, text_file, text_hardware.device)),
            hardware=text_hardware,
        )
        timeline = Timeline(executing_prompt_id)
        image_vae = make_vae(
            vae_file,
            dtype=vae_dtype(dtype, vae_file, vae_on),
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
        told = " ".join(str(text) for text in (doubt, asked, products_text(dtype, products), slower, advice) if text)
        settings = (limits.vram_bytes, limits.ram_bytes, timeline, told, step_cache_of(step_cache), compile)
        opening(1, 1)
        return served.make_model(model, *settings), clip, image_vae


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
