"""Node: the plan of an image for cards of every size side by side, before anything is loaded."""

from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import torch

from ..engine.caches.requantized_weights import RequantizedWeights
from ..engine.errors import DoesNotFit, InvalidRequest, QwenLowVRAMError
from ..engine.files.checkpoint import Checkpoint
from ..engine.hardware import Hardware
from ..engine.planning.draft import least_ram_bytes
from ..engine.planning.footprint import TextEncoderFootprint, TransformerFootprint, VAEFootprint
from ..engine.planning.forecast import TYPICAL, Speeds
from ..engine.planning.format_choice import choose_format
from ..engine.planning.request import GIB, Limits, PromptTokens
from ..engine.planning.stages import ImageModels, ImageRequest, plan_image
from ..engine.reports.charts import Card, draw_cards
from ..engine.reports.plan_table import plan_table
from . import model_choices
from .adapters.known_speeds import known_speeds
from .adapters.limits import free_ram, headroom_bytes
from .adapters.networks import SERVED
from .adapters.value_checks import check_widgets, limit_bytes
from .cache_folder import weight_cache_folder
from .display_names import AUTO, CATEGORY
from .inputs import at_input, before_the_run
from .previews import as_image, preview
from .sources import Sources, require_transformer
from .weight_cache import AS_STORED, FASTEST, WEIGHT_FORMATS, check_weight_format
from .weight_formats import TYPICAL_REQUEST, advice_of, versions_of

MOST_IMAGES = max(served.family.most_images for served in SERVED)
CARDS_GB = (4, 6, 8, 12, 16, 24)
# of a card, before the first tensor: the CUDA context with its kernels, and the image on the screen
CONTEXT_BYTES = 600_000_000
# a card with memory of its own: what it is asked for does not depend on the machine that plans
CARD = Hardware(torch.device("cpu"), streams=False, pinned=False, prefetch=False, host_device=False)


class QwenLowVRAMMemoryPlan:
    """Memory Plan."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Shows what an image would take on cards of 4 to 24 GB, stage by stage, and how long a step would be. Reads "
        "the headers of the files and loads nothing."
    )
    RETURN_TYPES = ("STRING", "IMAGE")
    RETURN_NAMES = ("plan", "chart")
    OUTPUT_TOOLTIPS = ("The plan as a table.", "The plan as an image: each stage's memory under each card's limit.")
    SEARCH_ALIASES = ("vram", "memory", "plan", "estimate", "low vram", "requirements")
    FUNCTION = "plan"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        limit = {"default": 0.0, "min": 0.0, "max": 1024.0, "step": 0.1}
        return {
            "required": {
                "transformer": (
                    model_choices.transformer_choices(),
                    {"tooltip": "The file or pipeline folder to plan for, as in Load Qwen-Image (low VRAM)."},
                ),
                "text_encoder": (
                    model_choices.component_choices("text_encoders"),
                    {"tooltip": "The text encoder from models/text_encoders, or the pipeline folder's own."},
                ),
                "vae": (
                    model_choices.component_choices("vae"),
                    {"tooltip": "The VAE from models/vae, or the pipeline folder's own."},
                ),
                "weight_format": (
                    list(WEIGHT_FORMATS),
                    {"default": AUTO, "tooltip": "As in the loader. fastest: what it would choose on each card."},
                ),
                "width": (
                    "INT",
                    {"default": 1328, "min": 16, "max": 16384, "step": 16, "tooltip": "Of the image, in pixels."},
                ),
                "height": (
                    "INT",
                    {"default": 1328, "min": 16, "max": 16384, "step": 16, "tooltip": "Of the image, in pixels."},
                ),
                "batch_size": (
                    "INT",
                    {"default": 1, "min": 1, "max": 64, "tooltip": "Images made at a time."},
                ),
                "steps": ("INT", {"default": 20, "min": 1, "max": 1000, "tooltip": "As in the sampler."}),
                "cfg": (
                    "FLOAT",
                    {
                        "default": 4.0,
                        "min": 1.0,
                        "max": 30.0,
                        "step": 0.1,
                        "tooltip": "As in the sampler: 1 leaves the negative prompt out.",
                    },
                ),
                "prompt_tokens": (
                    "INT",
                    {"default": 60, "min": 1, "max": 4000, "tooltip": "Of each prompt; a word has one or two."},
                ),
                "vram_limit_gb": (
                    "FLOAT",
                    {**limit, "tooltip": "A limit to show beside the cards, as in the loader. 0: the cards alone."},
                ),
                "ram_limit_gb": (
                    "FLOAT",
                    {**limit, "tooltip": "What all weights may hold in RAM, in GiB. 0: what is free on this machine."},
                ),
            },
            "optional": {
                "reference_pictures": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": MOST_IMAGES,
                        "tooltip": "Editing models and Qwen-Image-2.1: how many images of a megapixel they are shown, "
                        "up to three and up to twelve.",
                    },
                ),
                "layers": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 64,
                        "tooltip": "That Qwen-Image-Layered takes an image apart into. 0 for the other models.",
                    },
                ),
            },
        }

    @classmethod
    async def VALIDATE_INPUTS(cls, transformer: str | None) -> bool | str:
        """Before the run: is the transformer there, whole, and one? `plan` looks at the other inputs."""
        return await before_the_run(require_transformer, transformer)

    @classmethod
    def IS_CHANGED(cls, transformer: str, text_encoder: str, vae: str, **settings: Any) -> str:
        if None in (transformer, text_encoder, vae):
            return ""
        try:
            opened = Sources.of(transformer, text_encoder, vae).open(AUTO)
            speeds = _speeds(opened[0])
        except (QwenLowVRAMError, OSError) as error:
            return str(error)  # `plan` raises it, and another error than this would hide it
        free = 0 if settings.get("ram_limit_gb") else free_ram() // GIB  # which counts where no limit is set
        return "/".join([*(checkpoint.identity for checkpoint in opened), str(speeds), str(free)])

    def plan(
        self,
        transformer: str,
        text_encoder: str,
        vae: str,
        weight_format: str,
        width: int,
        height: int,
        batch_size: int,
        steps: int,
        cfg: float,
        prompt_tokens: int,
        vram_limit_gb: float,
        ram_limit_gb: float,
        reference_pictures: int = 0,
        layers: int = 0,
    ) -> dict[str, Any]:
        check_widgets(
            self.INPUT_TYPES(),
            width=width,
            height=height,
            batch_size=batch_size,
            steps=steps,
            cfg=cfg,
            prompt_tokens=prompt_tokens,
            vram_limit_gb=vram_limit_gb,
            ram_limit_gb=ram_limit_gb,
            reference_pictures=reference_pictures,
            layers=layers,
        )
        models = _Models.open(transformer, text_encoder, vae, weight_format, layers, reference_pictures)
        request = ImageRequest(
            width,
            height,
            batch_size,
            cfg > 1,
            steps,
            prompt_tokens,
            references=reference_pictures,
            layers=layers,
            prompts=models.prompts,
        )
        ram_bytes = limit_bytes(ram_limit_gb) or models.free_ram_bytes(request)
        capacities = [(f"{gb} GB", gb * GIB, gb * GIB - CONTEXT_BYTES - models.headroom_bytes) for gb in CARDS_GB]
        if vram_limit_gb > 0:
            limit = max(1, round(vram_limit_gb * GIB))
            capacities.append((f"limit {vram_limit_gb:g} GB", limit, limit))
        cards = [models.card(request, *capacity, ram_bytes) for capacity in capacities]
        prompts = f"prompts of {prompt_tokens} token{'s' if prompt_tokens != 1 else ''}"
        title, subtitle = f"Memory plan: {request}", f"{transformer}, {prompts}, {models.speeds_text}"
        advice = [line for name, _, limit in capacities for line in models.advice(name, limit, ram_bytes)]
        lines = [title, subtitle, f"RAM limit {ram_bytes / GIB:.1f} GiB", "", *plan_table(cards)]
        text = "\n".join([*lines, *([""] if advice else []), *advice])
        image = draw_cards(title, subtitle, cards)
        return {"ui": {"images": preview(image), "text": [text]}, "result": (text, as_image(image))}


@dataclass(frozen=True)
class _Models:
    """The sizes of three models, read from headers; the transformer's in each format that may be chosen."""

    text_encoder: TextEncoderFootprint
    transformers: dict[str, TransformerFootprint]
    others: dict[str, TransformerFootprint]  # what it could be in, where it stays as stored
    vae: VAEFootprint
    prompts: PromptTokens
    speeds: Speeds
    speeds_text: str

    @classmethod
    def open(
        cls, transformer: str, text_encoder: str, vae: str, weight_format: str, layers: int, images: int
    ) -> "_Models":
        sources = Sources.of(transformer, text_encoder, vae)
        transformer_file, text_file, vae_file = sources.open(AUTO)
        family = sources.family
        with at_input("weight_format"):
            check_weight_format(transformer_file, weight_format)
        with at_input("layers"):
            _check_layers(transformer_file, sources.member(transformer_file, AUTO).makes_layers, layers)
        with at_input("reference_pictures"):
            _check_images(transformer_file, family.most_images, images)
        remembered = _speeds(transformer_file)

        def footprints(versions: dict[str, Checkpoint]) -> dict[str, TransformerFootprint]:
            dtype = _dtype(transformer_file)
            return {
                name: family.parts(version, dtype=dtype, hardware=CARD).footprint for name, version in versions.items()
            }

        stored = weight_format in (AUTO, AS_STORED)
        return cls(
            family.encoder(text_file, dtype=_dtype(text_file), hardware=CARD).footprint,
            footprints(_versions(transformer_file, weight_format)),
            footprints(versions_of(transformer_file)) if stored else {},
            family.empty_vae(vae_file, dtype=_dtype(vae_file)).footprint,
            family.prompts,
            remembered or TYPICAL,
            "speeds of this machine" if remembered else "typical speeds: no run has told this machine's yet",
        )

    @property
    def headroom_bytes(self) -> int:
        """What stays free of a card; as when it runs, that follows the largest block."""
        blocks = [footprint.slot_bytes for footprint in self.transformers.values()]
        return headroom_bytes(max(*blocks, self.text_encoder.slot_bytes))

    def free_ram_bytes(self, request: ImageRequest) -> int:
        """What is free now; the least that is needed is granted, as when it runs."""
        least = max(least_ram_bytes(footprint, request.sampling) for footprint in self.transformers.values())
        return max(free_ram(), least)

    def card(self, request: ImageRequest, name: str, capacity_bytes: int, limit_bytes: int, ram_bytes: int) -> Card:
        limits = Limits(limit_bytes, ram_bytes)
        weight_format = choose_format(self.transformers, TYPICAL_REQUEST, limits, self.speeds).name
        models = ImageModels(self.text_encoder, self.transformers[weight_format], self.vae)
        try:
            plan = plan_image(models, request, limits, self.speeds)
        except DoesNotFit as error:
            return Card(name, capacity_bytes, limit_bytes, None, weight_format, str(error))
        return Card(name, capacity_bytes, limit_bytes, plan, weight_format)

    def advice(self, name: str, limit_bytes: int, ram_bytes: int) -> list[str]:
        """A line for the card where another format would be much faster."""
        if len(self.others) < 2:
            return []
        choice = choose_format(self.others, TYPICAL_REQUEST, Limits(limit_bytes, ram_bytes), self.speeds)
        advice = advice_of(choice)
        return [f"On {name}: {advice}"] if advice else []


def _check_layers(transformer: Checkpoint, layered: bool, layers: int) -> None:
    """Raise InvalidRequest where the model makes layers and none are asked for, or the other way round."""
    if layered != (layers > 0):
        makes, ask = ("layers", "1 or more") if layered else ("whole images", "0")
        raise InvalidRequest(
            "{file} makes {makes}, and {layers} layers are asked for.\n\nWhat to do: set layers to {needed}.",
            code="plan.wrong_layers",
            file=transformer.path,
            makes=makes,
            layers=layers,
            needed=ask,
        )


def _check_images(transformer: Checkpoint, most: int, images: int) -> None:
    """Raise InvalidRequest for more images than the model is shown."""
    if images > most:
        raise InvalidRequest(
            "{file} is shown {most} images at the most, and {images} are asked for.\n\nWhat to do: set "
            "reference_pictures to {most} or less.",
            code="plan.too_many_images",
            file=transformer.path,
            most=most,
            images=images,
        )


def _versions(source: Checkpoint, weight_format: str) -> dict[str, Checkpoint]:
    if weight_format == FASTEST:
        return versions_of(source)
    if weight_format in (AUTO, AS_STORED):
        return {AS_STORED: source}
    weights = RequantizedWeights.of(source, weight_format, weight_cache_folder())
    return {weight_format: source if weights is None else weights.checkpoint(data_start=0)}


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What the loader's auto computes in on a card of today."""
    return torch.float32 if checkpoint.full_precision else torch.bfloat16


def _speeds(transformer: Checkpoint) -> Speeds | None:
    """What this machine is known to do; None where it has no card, or nothing has been measured yet."""
    device = comfy.model_management.get_torch_device()
    if device.type == "cpu":
        return None
    return known_speeds(replace(CARD, device=device), _dtype(transformer), transformer.largest_file).remembered()
