"""Quantized weights and encoded prompts in models/qwen_lowvram: a node shows and clears them."""

from pathlib import Path
from typing import Any

import comfy.model_management
import torch

from ..engine.caches.prompt_cache import PromptCache
from ..engine.caches.requantized_files import cache_path
from ..engine.caches.requantized_layout import FORMATS
from ..engine.caches.requantized_weights import RequantizedWeights
from ..engine.errors import InvalidRequest
from ..engine.files.atomic_files import may_write
from ..engine.files.checkpoint import Checkpoint
from ..engine.hardware import Hardware
from ..engine.log import logger
from ..engine.out_of_memory import Short, reason, shortage
from ..engine.runs.phases import Phase, PhaseProgress
from ..engine.streaming import require_decodable
from ..engine.texts import printable, shown
from ..engine.told import Told, json_of, text_of
from . import cache_report
from .adapters.in_comfyui import InComfyUI
from .adapters.limits import stage_bytes
from .adapters.progress import tell
from .cache_folder import VARIABLE, folder_until_the_end, weight_cache_folder
from .display_names import AUTO, CATEGORY

AS_STORED, FASTEST = "as stored", "fastest"
WEIGHT_FORMATS = (AUTO, AS_STORED, *FORMATS, FASTEST)  # auto is as stored: the default makes one image everywhere
SHOW = "show"
# older graphs hold these; a value stays in its graph, and would be done again after every restart
OLD_ACTIONS = ("clear unused", "clear all", "clear prompts")


def prompt_cache() -> PromptCache:
    return PromptCache(weight_cache_folder() / "prompts")


def check_weight_format(source: Checkpoint, weight_format: str) -> None:
    """Raise InvalidRequest or CacheError where the source cannot be held in that format. Reads headers only."""
    if weight_format not in WEIGHT_FORMATS:
        raise InvalidRequest(
            "There is no weight_format {weight_format}. Use one of: {weight_formats}.",
            code="choice.no_weight_format",
            weight_format=shown(weight_format),
            weight_formats=WEIGHT_FORMATS,
        )
    weights = _weights(source, weight_format)
    if weights is not None:
        weights.check_room()


def in_weight_format(source: Checkpoint, weight_format: str, hardware: Hardware, limit_bytes: int | None) -> Checkpoint:
    """The source with its blocks in that format (not FASTEST, which is none): as it is, from the cache, or quantized
    now (said, shown, interruptible). Raises Unsupported where `hardware` cannot decode that format."""
    weights = _weights(source, weight_format)
    if weights is None:
        return source
    require_decodable((part for part in weights.checkpoint(0).tensors.values() if part.file == weights.path), hardware)
    held = weights.open()
    if held is None:
        weights = _where_it_can_be_made(weights)  # also instead of a damaged file that cannot be replaced
        held = weights.open() or _make(weights, hardware.device, limit_bytes)
    _lent.add(weights.path)
    return held


def losses(source: Checkpoint, weight_format: str | None) -> int:
    """How often the cache file of that source and format has gone after it was lent.

    A loaded model reads it at every run: as part of the loader's IS_CHANGED this loads the model again.
    """
    formats = [name for name in FORMATS if weight_format in (name, FASTEST)]
    folders = (weight_cache_folder(), folder_until_the_end())
    return sum(_lent.losses(cache_path(source, name, folder)) for name in formats for folder in folders)


def _weights(source: Checkpoint, weight_format: str) -> RequantizedWeights | None:
    if weight_format in (AUTO, AS_STORED, FASTEST):
        return None
    return quantized_weights(source, weight_format)


def quantized_weights(source: Checkpoint, weight_format: str) -> RequantizedWeights | None:
    """In the cache's folder; where nothing can be written there, what it does not have is for ComfyUI's temporary
    folder. None and errors as RequantizedWeights.of has them."""
    weights = RequantizedWeights.of(source, weight_format, weight_cache_folder())
    return weights if weights is None or weights.is_there() else _where_it_can_be_made(weights)


def _where_it_can_be_made(weights: RequantizedWeights) -> RequantizedWeights:
    return weights if may_write(weights.path.parent) else weights.in_folder(folder_until_the_end())


def _make(weights: RequantizedWeights, device: torch.device, limit_bytes: int | None) -> Checkpoint:
    if stage_bytes(device, limit_bytes, weights.working_bytes) < weights.working_bytes:
        device = torch.device("cpu")  # the same file, later
    told = Told(
        "Quantizing {file} to {format}, once: {gb:.1f} GB in {folder}",
        code="weight_cache.quantizing",
        file=printable(weights.source.path.name),
        format=weights.weight_format,
        gb=weights.nbytes / 1e9,
        folder=printable(str(weights.path.parent)),
    )
    logger.info("%s", told)
    tell(told)
    if weights.path.parent == folder_until_the_end():
        logger.warning(
            "%s cannot be written to: quantized weights are lost when ComfyUI restarts. To keep them, set the "
            "environment variable %s, or qwen_lowvram in extra_model_paths.yaml, to a folder that can be written to.",
            printable(str(weight_cache_folder())),
            VARIABLE,
        )
    progress = PhaseProgress(InComfyUI(), Phase.QUANTIZING)

    def on_block(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        progress(done, total)

    try:
        return weights.make(device, on_block)
    except Exception as error:
        if device.type == "cpu" or shortage(error) is not Short.DEVICE:
            raise
        why = reason(error)
    # after the except block: the traceback keeps what lies on the card
    comfy.model_management.soft_empty_cache()
    logger.warning("The card's memory ran out while weights were quantized (%s): doing it again on the CPU.", why)
    return weights.make(torch.device("cpu"), on_block)


class _Lent:
    """The cache files that models of this process read, and how often each has gone meanwhile."""

    def __init__(self) -> None:
        self._paths: set[Path] = set()
        self._losses: dict[Path, int] = {}

    def add(self, path: Path) -> None:
        self._paths.add(path)

    def losses(self, path: Path) -> int:
        if path in self._paths and not path.exists():
            self._paths.remove(path)
            self._losses[path] = self._losses.get(path, 0) + 1
        return self._losses.get(path, 0)


_lent = _Lent()


class QwenLowVRAMWeightCache:
    """Quantized Weights."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Shows the quantized weights and the encoded prompts that are kept in models/qwen_lowvram; its buttons clear "
        "them. What is cleared is made again from its model file when it is needed."
    )
    SEARCH_ALIASES = ("cache", "clear cache", "quantize", "disk space", "nf4", "int8", "prompts", "qwen")
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("report",)
    OUTPUT_TOOLTIPS = ("The list that the node shows.",)
    OUTPUT_NODE = True
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "action": (
                    [SHOW, *OLD_ACTIONS],
                    {
                        "default": SHOW,
                        "tooltip": "show lists the files. The clearing values of older graphs only list them too; to "
                        "clear, use the buttons on the node.",
                    },
                )
            }
        }

    @classmethod
    def IS_CHANGED(cls, action: str) -> float:
        return float("nan")  # the folder may have changed

    def run(self, action: str) -> dict[str, Any]:
        parts = cache_report.shown(weight_cache_folder(), prompt_cache())
        if action != SHOW:
            parts += ["", *_nothing_cleared(action)]
        text = text_of(parts)
        return {"ui": {"text": [text], "parts": json_of(parts)}, "result": (text,)}


def _nothing_cleared(action: str) -> list[Told]:
    return [
        Told(
            "Nothing was cleared: {action} in a graph would clear again after every restart.",
            code="weights_list.nothing_cleared",
            action=shown(action),
        ),
        Told(
            "To clear, use the buttons on the node. A program sends POST /qwen_lowvram/clear with the JSON "
            '{{"clear": "unused"}}, "all" or "prompts".',
            code="weights_list.how_to_clear",
        ),
    ]
