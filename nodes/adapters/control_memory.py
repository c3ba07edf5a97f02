"""What ControlNets and model patches take on the device beside our transformer."""

from collections.abc import Sequence
from math import prod
from typing import Any

import comfy.model_patcher
import comfy.sampler_helpers
import torch
from comfy.ldm.qwen_image.controlnet import QwenImageControlNetModel

from ...engine.models.qwen_image.latents import PATCH
from ...engine.planning.footprint import TransformerFootprint
from ...engine.planning.request import Controls, SamplingRequest
from .block_patches import patched_bytes
from .controlnets import chain, width_of
from .run_conditions import Conds, entries_of, size_of

# tensors of one token's width that are alive at once in ComfyUI's QwenImageTransformerBlock: the joint attention's
# q, k and v, before and after they are joined and turned, and around the MLP its four times wider states
BLOCK_WIDTHS = 12


def controls_of(
    conds: Conds,
    guider: Any,
    shape: Sequence[int],
    request: SamplingRequest,
    footprint: TransformerFootprint,
    beside: Sequence[comfy.model_patcher.ModelPatcher],
) -> Controls:
    """Of a run's conditions, for latents of this shape (B, 16, F, H, W); `beside`: the models that are loaded too."""
    batch = shape[0]
    controlled = [(net, _tokens(entry, shape)) for entry in entries_of(conds) for net in chain(entry.get("control"))]
    held = sum(held_bytes(net, batch * tokens) for net, tokens in controlled)
    working = max((working_bytes(net, batch * (n + request.prompt_tokens)) for net, n in controlled), default=0)
    _, asked = comfy.sampler_helpers.get_additional_models(guider.conds, guider.model_patcher.model_dtype())
    cast = max((cast_bytes(net) for net, _ in controlled), default=0) + int(asked)
    sizes = len({size_of(entry, shape) for entry in entries_of(conds)})
    patches = patched_bytes(guider.model_options.get("transformer_options", {}), request, footprint, batch, sizes)
    return Controls(
        weights_bytes=sum(int(model.model_size()) for model in beside),
        held_bytes=held + patches.held_bytes,
        working_bytes=max(working + cast, patches.working_bytes),
        fixed_bytes=max(cast, patches.fixed_bytes),
        images=batch,
    )


def _tokens(entry: dict[str, Any], shape: Sequence[int]) -> int:
    """Of one image of a condition; references are not shown to ControlNets."""
    return prod(-(-side // PATCH) for side in size_of(entry, shape))


def _dtype(net: Any) -> torch.dtype:
    dtype: torch.dtype = net.manual_cast_dtype or net.control_model.dtype
    return dtype


def held_bytes(net: Any, tokens: int) -> int:
    """Residuals and the hint, of one condition's images."""
    model = net.control_model
    if isinstance(model, QwenImageControlNetModel):
        widths = len(model.controlnet_blocks) * model.inner_dim + model.controlnet_x_embedder.weight.shape[1]
    else:  # views of one tensor, which has the last block's states as well
        width, hint = model.control_img_in.weight.shape
        widths = (len(model.control_blocks) + 1) * width + hint
    return int(tokens * widths * _dtype(net).itemsize)


def working_bytes(net: Any, tokens: int) -> int:
    """One pass of a net over so many tokens, the prompt's included, beyond its weights and what it hands over."""
    return int(BLOCK_WIDTHS * tokens * width_of(net) * _dtype(net).itemsize)


def cast_bytes(net: Any) -> int:
    """Its widest weight in another dtype, for a moment."""
    return 0 if net.manual_cast_dtype is None else int(4 * width_of(net) ** 2 * _dtype(net).itemsize)
