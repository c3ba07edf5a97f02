"""The node that adds a LoRA to our MODEL. Reads the header; the matrices are streamed with their blocks."""

from typing import Any

import folder_paths

from ..engine.errors import QwenLowVRAMError, Unsupported
from ..engine.log import logger
from ..engine.lora.lora_file import LoraFile, LoraMatch, match_model, needs_adapters, open_lora
from ..engine.out_of_memory import in_words
from ..engine.texts import LONGEST, printable
from ..engine.told import Told, text_of
from .adapters.patcher import LowVRAMPatcher
from .adapters.progress import tell
from .adapters.value_checks import check_widgets
from .adapters.whole_lora import match_file
from .display_names import CATEGORY
from .inputs import at_input, before_the_run
from .model_choices import plain_file

MAX_STRENGTH = 100.0
UNSCALED_FP8 = ("fp8_e4m3fn", "fp8_e5m2")


class QwenLowVRAMLoadLora:
    """Load LoRA."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Adds a LoRA to the model, whatever format its weights are in. The LoRA is added in fp32 to each block as it "
        "passes through the card; several can follow each other, and removing one leaves no trace."
    )
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("model", "report")
    OUTPUT_TOOLTIPS = ("The model with the LoRA.", "How many of the file's keys were used, and which were not.")
    SEARCH_ALIASES = ("lora", "lightning", "lora loader", "dora", "lokr", "qwen")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model, from Load Qwen-Image (low VRAM) or another Load LoRA."}),
                "lora_name": (folder_paths.get_filename_list("loras"), {"tooltip": "A LoRA file from models/loras."}),
                "strength": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": -MAX_STRENGTH,
                        "max": MAX_STRENGTH,
                        "step": 0.01,
                        "tooltip": "LoRA strength: how much of it is added. Negative values subtract it from the "
                        "weights, 0 turns it off.",
                    },
                ),
            }
        }

    @classmethod
    async def VALIDATE_INPUTS(cls, lora_name: str | None) -> bool | str:
        """Before the run: is the file there, and whole?"""
        return await before_the_run(lora_file, lora_name)

    @classmethod
    def IS_CHANGED(cls, lora_name: str | None = None, **others: Any) -> str:
        if lora_name is None:
            return ""
        try:
            return lora_file(lora_name).identity
        except (QwenLowVRAMError, OSError) as error:
            return str(error)  # `load` raises it, and another error than this would hide it

    @in_words("the LoRA was loaded")
    def load(self, model: Any, lora_name: str, strength: float) -> dict[str, Any]:
        check_widgets(self.INPUT_TYPES(), strength=strength)
        if not isinstance(model, LowVRAMPatcher):
            raise Unsupported(
                "This node adds LoRAs only to models from Load Qwen-Image (low VRAM).\n\nWhat to do: use "
                "LoraLoaderModelOnly for models from ComfyUI's own loaders.",
                code="graph.lora_of_another_loader",
            )
        transformer = model.model.transformer
        with at_input("lora_name"):
            file = lora_file(lora_name)
            by_comfyui = match_file(file, model.model) if needs_adapters(file) else None
            lora = by_comfyui or match_model(file, transformer)
        parts = [lora.told(), *warnings_of(lora, transformer.weight_format), *_listed(lora)]
        text = text_of(parts)
        logger.info("%s", text)
        tell(*parts)
        patched = model.clone()
        patched.add_lora(lora, strength)
        return {"ui": {"text": [text]}, "result": (patched, text)}


def warnings_of(lora: LoraMatch, weight_format: str) -> list[Told]:
    """What is known to go wrong with this LoRA on these weights, and where other programs make something else of it."""
    warnings = []
    if lora.left_out_scales is not None:
        least, most = lora.left_out_scales
        even = least == most and not any(delta.dora is not None for delta in lora.deltas.values())
        by = f"{most:.3g}: multiply the strength by it" if even else f"{least:.3g} to {most:.3g}, layer by layer"
        warnings.append(
            Told(
                "The file has its scales (lora_alpha) only in its metadata, which neither ComfyUI's LoRA loaders nor "
                "this one read. diffusers would multiply the LoRA by {by}.",
                code="lora_report.left_out_scales",
                by=by,
            )
        )
    if "lightning" in lora.lora.path.name.lower() and weight_format in UNSCALED_FP8:
        warnings.append(
            Told(
                "Lightning on unscaled fp8 weights ({format}) is known to draw a grid over the image. Use an fp8 "
                "scaled, bf16 or GGUF file, or weight_format int8 from a bf16 file.",
                code="lora_report.unscaled_fp8",
                format=weight_format,
            )
        )
    return warnings


def lora_file(name: str) -> LoraFile:
    """Raises MissingFile unless `name` is a file of models/loras, and what `open_lora` raises."""
    return open_lora(plain_file("loras", name))


def _listed(lora: LoraMatch) -> list[Told]:
    if not lora.unmatched:
        return []
    more = "" if len(lora.unmatched) <= 5 else f" and {len(lora.unmatched) - 5} more"
    keys = [printable(key)[:LONGEST] for key in lora.unmatched[:5]]
    return [Told("Not used: {keys}{more}.", code="lora_report.unused", keys=keys, more=more)]
