"""Attention as ComfyUI asks for it: by its switches, by a file, and by nodes that set an override on the model.

An override is called as ComfyUI's own attention calls it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...engine.compute.attention import Attention, Operands, kernel_of, torchs_own
from ...engine.compute.attention_choice import AUTO, TRIAL_BYTES, choose_attention
from ...engine.compute.attention_kernels import AttentionKernel
from ...engine.compute.attention_packages import FUNCTIONS, KernelFunction
from ...engine.files.checkpoint import Checkpoint
from ...engine.hardware import Hardware
from ...engine.models.attention_wish import wished_kernel
from ...engine.models.streamed_transformer import StreamedTransformer
from ...engine.texts import shown
from ..display_names import LOADER
from . import switches
from .graph_checks import refuse
from .known_speeds import known_trials

_OTHER_NAMES = {"sub_quad": "split"}  # ComfyUI's other way to save memory

OVERRIDE_KEY = "optimized_attention_override"  # of transformer_options; ModelAttentionBackend, SageAttention nodes
# as of those whose way is known: of what a node's function does nothing is
_COPY_BYTES = 3


@dataclass(frozen=True)
class NodeAttention:
    """A node's function (attention, query, key, value, heads, ...) around ComfyUI's attention functions."""

    override: Callable[..., Tensor]

    def lacks(self, operands: Operands) -> str:
        return ""

    def __call__(self, operands: Operands) -> Tensor:
        query = operands.query
        options: dict[str, Any] = {"mask": operands.mask, "skip_reshape": True, "transformer_options": {}}
        if operands.scale is not None:
            options["scale"] = operands.scale
        out = self.override(_comfyuis_way, query, operands.key, operands.value, query.shape[1], **options)
        return out.unflatten(-1, (query.shape[1], -1)).transpose(1, 2)


def _comfyuis_way(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: Any = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    scale: float | None = None,
    **kwargs: Any,
) -> Tensor:
    """torch's attention with the interface of ComfyUI's: (B, H, L, D) where skip_reshape, else (B, L, H * D)."""
    if not skip_reshape:
        query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    out = torchs_own(Operands(query, key, value, mask, scale=scale))
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def attention_of_loader(
    choice: str, file: Checkpoint, hardware: Sequence[Hardware], dtype: torch.dtype
) -> tuple[Attention, str]:
    """What a person chose, on these devices; for `auto` what ComfyUI was started with, else what the file asks for, if
    that does not quantize. And what a person is told of it. Raises Unsupported for a kernel that does not work here."""
    wished, asked = _wished(choice, file)
    told, function = "", _function(asked)
    if asked and wished == AUTO:
        why = "is not known here" if function is None else "quantizes and would change the image"
        told = f"The file asks for the attention kernel '{shown(asked)}', which {why}: PyTorch's is used."
        told += "" if function is None else f" To follow the file, choose it in '{LOADER}' (attention)."
    for device in (place.device for place in hardware):
        comfy.model_management.free_memory(TRIAL_BYTES, device)
    return choose_attention(choice, hardware, dtype, wished=wished, tried=known_trials()), told


def planned_attention(choice: str, file: Checkpoint, card: Hardware, dtype: torch.dtype) -> Attention | None:
    """The same for a plan, as if it worked: nothing is tried. None: torch's."""
    wished, _ = _wished(choice, file)
    function = _function(choice if choice != AUTO else wished)
    native = kernel_of(card, dtype)
    if function is None or function.kernel.name == native.name:
        return None
    return Attention(replace(function.kernel, otherwise=native))


def _wished(choice: str, file: Checkpoint) -> tuple[str, str]:
    """What `auto` is, by ComfyUI's switches or the file; and what the file asks for, where that is looked at."""
    wished = switches.attention()
    asked = wished_kernel(file) if choice == wished == AUTO else ""
    function = _function(asked)
    return function.kernel.name if function is not None and function.kernel.exact else wished, asked


def _function(name: str) -> KernelFunction | None:
    """By our name, or ComfyUI's."""
    return FUNCTIONS.get(_OTHER_NAMES.get(name, name))


def attention_of_run(
    transformer: StreamedTransformer[Any, Any], chosen: Attention | None, override: Callable[..., Tensor] | None
) -> Attention | None:
    """What a run attends by: a node's override comes before what the loader chose."""
    if override is None:
        return chosen
    name = getattr(override, "__qualname__", type(override).__name__)
    native = transformer.native_attention
    kernel = AttentionKernel(f"a node's {name}", exact=False, copy_bytes=_COPY_BYTES, otherwise=native)
    return Attention(kernel, NodeAttention(override))


def check_override(options: dict[str, Any], of_run: Any) -> None:
    """Raise Unsupported where a call asks for another override than the run's."""
    if options.get(OVERRIDE_KEY) is not of_run:
        refuse(
            "An attention override for part of the run",
            "set it on the model, without a hook.",
            code="graph.attention_override",
        )
