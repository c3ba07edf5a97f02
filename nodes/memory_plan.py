"""Node: the plan of an image for cards of every size side by side, before anything is loaded."""

from typing import Any

from ..engine.compute.attention_choice import CHOICES
from ..engine.compute.linear_choice import Computing
from ..engine.compute.step_schedules import OFF, STEP_CACHES, step_cache_of
from ..engine.errors import QwenLowVRAMError
from ..engine.planning.cards import CARDS
from ..engine.planning.cards import limit_bytes as card_limit_bytes
from ..engine.planning.forecast import TYPICAL, Speeds
from ..engine.planning.request import GIB
from ..engine.planning.stages import ImageRequest
from ..engine.reports.charts import draw_cards
from ..engine.reports.plan_table import plan_table, several_cards_table
from ..engine.told import Told, json_of, text_of
from . import model_choices
from .adapters.known_speeds import speeds_stamp
from .adapters.limits import free_ram
from .adapters.networks import SERVED
from .adapters.value_checks import check_widgets, limit_bytes
from .display_names import AUTO, CATEGORY
from .dtypes import DTYPES
from .inputs import at_input, before_the_run
from .machine_cards import cards_of_machine, only_card
from .planned_models import PlannedModels, PlanSettings
from .previews import as_image, preview
from .sources import Sources, require_transformer
from .weight_cache import WEIGHT_FORMATS

MOST_IMAGES = max(served.family.most_images for served in SERVED)


class QwenLowVRAMMemoryPlan:
    """Memory Plan."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Shows what an image would take on cards of 4 to 24 GB, stage by stage, and how long a step would take. It "
        "reads only the headers of the files and loads nothing."
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
                    {
                        "default": AUTO,
                        "tooltip": "How weights are held, as in the loader. fastest shows what it "
                        "would choose on each card.",
                    },
                ),
                "width": (
                    "INT",
                    {"default": 1328, "min": 16, "max": 16384, "step": 16, "tooltip": "Width of the image in pixels."},
                ),
                "height": (
                    "INT",
                    {"default": 1328, "min": 16, "max": 16384, "step": 16, "tooltip": "Height of the image in pixels."},
                ),
                "batch_size": (
                    "INT",
                    {"default": 1, "min": 1, "max": 64, "tooltip": "How many images are made at a time."},
                ),
                "steps": (
                    "INT",
                    {"default": 20, "min": 1, "max": 1000, "tooltip": "Number of sampling steps, as in the sampler."},
                ),
                "cfg": (
                    "FLOAT",
                    {
                        "default": 4.0,
                        "min": 1.0,
                        "max": 30.0,
                        "step": 0.1,
                        "tooltip": "Guidance strength, as in the sampler. 1 leaves the negative prompt out.",
                    },
                ),
                "prompt_tokens": (
                    "INT",
                    {
                        "default": 60,
                        "min": 1,
                        "max": 4000,
                        "tooltip": "Number of tokens in each prompt; a word is one or two tokens.",
                    },
                ),
                "vram_limit_gb": (
                    "FLOAT",
                    {
                        **limit,
                        "tooltip": "A VRAM limit in GB (GiB) to show beside the cards, as in the loader. 0 shows this "
                        "machine's card.",
                    },
                ),
                "ram_limit_gb": (
                    "FLOAT",
                    {
                        **limit,
                        "tooltip": "The most RAM that all weights may take, in GB (GiB). 0 uses what is free "
                        "on this machine.",
                    },
                ),
            },
            "optional": {
                "reference_pictures": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": MOST_IMAGES,
                        "tooltip": "How many images of one megapixel the model is shown: up to three for editing "
                        "models, up to twelve for Qwen-Image-2.1.",
                    },
                ),
                "layers": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 64,
                        "tooltip": "How many layers Qwen-Image-Layered takes an image apart into. 0 for the other "
                        "models.",
                    },
                ),
                "dtype": (
                    [AUTO, *DTYPES],
                    {
                        "default": AUTO,
                        "tooltip": "Compute precision, as in the loader. auto shows what this machine's card uses; "
                        "fp16 shows cards without bf16 (GTX 16, RTX 20).",
                    },
                ),
                "step_cache": (
                    list(STEP_CACHES),
                    {"default": OFF, "tooltip": "Skips computing some steps, as in the loader."},
                ),
                "compute": (
                    [computing.value for computing in Computing],
                    {
                        "default": Computing.AS_COMFYUI.value,
                        "tooltip": "How linear layers compute, as in the loader, with this machine's comfy-kitchen.",
                    },
                ),
                "compile": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": "Compiles the blocks, as in the loader; compiled blocks hold a whole MLP at once.",
                    },
                ),
                "attention": (
                    list(CHOICES),
                    {
                        "default": AUTO,
                        "tooltip": "The attention kernel, as in the loader. The plan assumes that it works; the "
                        "loader tries it.",
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
        except (QwenLowVRAMError, OSError) as error:
            return str(error)  # `plan` raises it, and another error than this would hide it
        free = 0 if settings.get("ram_limit_gb") else free_ram() // GIB  # which counts where no limit is set
        return "/".join([*(checkpoint.identity for checkpoint in opened), speeds_stamp(), str(free)])

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
        dtype: str = AUTO,
        step_cache: str = OFF,
        compute: str = Computing.AS_COMFYUI.value,
        compile: bool = False,
        attention: str = AUTO,
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
            dtype=dtype,
            step_cache=step_cache,
            compute=compute,
            compile=compile,
            attention=attention,
        )
        settings = PlanSettings(weight_format, dtype, Computing(compute), compile, attention=attention)
        models = PlannedModels.open(Sources.of(transformer, text_encoder, vae), settings, layers, reference_pictures)
        cache = step_cache_of(step_cache)
        if cache is not None:
            with at_input("step_cache"):
                cache.require_steps(steps)
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
            step_cache=cache,
        )
        ram_bytes = limit_bytes(ram_limit_gb) or models.free_ram_bytes(request)
        headroom = models.headroom_bytes
        disk_bytes = (models.speeds or TYPICAL).disk_bytes
        sizes: list[tuple[str, int, int, Speeds | None]] = [
            (card.title, card.gb * GIB, card_limit_bytes(card.gb, headroom), card.speeds(disk_bytes)) for card in CARDS
        ]
        limit = limit_bytes(vram_limit_gb)
        if limit is not None:
            sizes.append((f"limit {vram_limit_gb:g} GB", limit, limit, None))
        elif (own := only_card(headroom)) is not None:
            sizes.append(("this machine", *own, None))
        cards = [
            models.card(request, name, capacity, most, ram_bytes, speeds=speeds)
            for name, capacity, most, speeds in sizes
        ]
        names, here = cards_of_machine(models, request, limit, ram_bytes)
        title = Told("Memory plan: {request}", code="memory_plan.title", request=str(request))
        subtitle = Told(
            "{file}, prompts of {tokens} token{plural}; seconds are forecasts: for named cards from their data "
            "sheets, otherwise at {speeds}",
            code="memory_plan.subtitle",
            file=transformer,
            tokens=prompt_tokens,
            plural="" if prompt_tokens == 1 else "s",
            speeds=models.speeds_text,
        )
        advice = [
            Told("On {card}: {advice}", code="memory_plan.advice", card=name, advice=faster)
            for name, _, most, speeds in sizes
            if (faster := models.faster_format(most, ram_bytes, speeds))
        ]
        ram = Told("RAM limit {limit:.1f} GiB", code="memory_plan.ram_limit", limit=ram_bytes / GIB)
        computed = models.computed(request, cards)
        several = ["", *several_cards_table(names, here)] if here else []
        parts = [title, subtitle, *computed, ram, "", *plan_table(cards), *several, *([""] if advice else []), *advice]
        text = text_of(parts)
        image = draw_cards(str(title), str(subtitle), [*cards, *here])
        ui = {"images": preview(image), "text": [text], "parts": json_of(parts)}
        return {"ui": ui, "result": (text, as_image(image))}
