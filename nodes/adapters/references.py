"""What "Edit Model Reference Method" asks for: where references lie beside the image, and at which timestep."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...engine.models.qwen_image.latents import PATCH
from ...engine.models.qwen_image.positions import Place
from ...engine.models.qwen_image.tensors import TransformerConfig
from ...engine.models.qwen_image.variants import Variant
from .graph_checks import refuse

INDEX, INDEX_AT_ZERO = "index", "index_timestep_zero"
_BESIDE = ("offset", "uxo")
_BEFORE = "negative_index"  # of layered images


def check_methods(conds: dict[str, list[dict[str, Any]]], config: TransformerConfig) -> None:
    """Raise Unsupported for methods that ComfyUI's own model, or this one, does not have."""
    entries = [entry for named in conds.values() for entry in named or () if entry.get("reference_latents")]
    known = (_BEFORE,) if config.use_layer3d_rope else (INDEX, INDEX_AT_ZERO, *_BESIDE)
    for method in {entry.get("reference_latents_method") for entry in entries} - {None}:
        if method not in known:
            instead = "" if config.use_layer3d_rope else f"set it to '{INDEX}', or "
            refuse(
                "The reference method '{method}' of 'Edit Model Reference Method'",
                "{other_way}remove that node.",
                code="graph.reference_method",
                method=method,
                other_way=instead,
            )
        if method == INDEX_AT_ZERO and not config.zero_cond_t:
            refuse(
                "Using {variant}'s reference method '{method}' with another model",
                "set the method to '{index}', or, if the file is that model, choose it as variant in '{loader}'.",
                code="graph.index_at_zero",
                method=INDEX_AT_ZERO,
                variant=Variant.EDIT_2511.value,
                index=INDEX,
            )


def at_zero(method: str | None) -> bool:
    """Whether a model that can computes references at timestep zero; such a model's own method does."""
    return method in (None, INDEX_AT_ZERO)


def places_of(method: str | None, references: Sequence[Tensor]) -> tuple[Place, ...]:
    """Of the image and of each reference (B, 16, 1, h, w); none where each has a frame of its own, in order.

    "offset" and "uxo" lay all references into one frame, each below or to the right of those before it.
    """
    if method not in _BESIDE:
        return ()
    places = [(0, 0, 0)]
    height = width = 0  # of what lies there already, in latents
    for reference in references:
        h, w = reference.shape[-2:]
        down, right = (0, width) if h + height > w + width else (height, 0)
        height, width = max(height, h + down), max(width, w + right)
        places.append((1, -(-down // PATCH), -(-right // PATCH)))
    return tuple(places)
