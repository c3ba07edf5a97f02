"""What other packs have put in the place of ComfyUI's own Qwen-Image code for the whole process: named, not followed.

No graph asks for it, so a run is not refused over it. ComfyUI's own loader would follow it; ours calls none of it.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import comfy.ldm.modules.attention
import comfy.ldm.qwen_image.model
from torch import nn

from ...engine.told import Told
from ..display_names import LOADER
from .progress import warn

_MODEL = comfy.ldm.qwen_image.model
_ATTENTION = comfy.ldm.modules.attention


def patched_in_process() -> list[str]:
    """The names of ComfyUI's functions for Qwen-Image that are not ComfyUI's any more."""
    classes = [kind for kind in vars(_MODEL).values() if isinstance(kind, type) and issubclass(kind, nn.Module)]
    methods = {
        f"{kind.__name__}.{name}": value
        for kind in classes
        if kind.__module__ == _MODEL.__name__
        for name, value in vars(kind).items()
        if isinstance(value, FunctionType)
    }
    attention = {
        f"{module.__name__}.{name}": value
        for module in (_MODEL, _ATTENTION)
        for name, value in vars(module).items()
        if name.startswith("optimized_attention") and callable(value)
    }
    return [name for name, value in (methods | attention).items() if not _is_comfyuis(value)]


def _is_comfyuis(function: Callable[..., Any]) -> bool:
    """By where the function itself was written: a wrapper takes its inner function's name and module."""
    written_in = str(getattr(function, "__globals__", {}).get("__name__", ""))
    return written_in.startswith("comfy.")


def tell_patched_process() -> None:
    """One line in the log and on the node, where there is anything to say."""
    names = patched_in_process()
    if names:
        told = Told(
            "Another pack has replaced {functions} of ComfyUI for all models. Models from '{loader}' do not use that "
            "code: they run without it.",
            code="told.patched_process",
            functions=names,
            loader=LOADER,
        )
        warn(told)
