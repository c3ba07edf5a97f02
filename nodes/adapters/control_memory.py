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
from .block_patches import control_patches, has_patches
from .control_sizes import NetSizes, patch_controls
from .controlnets import chain, width_of
from .run_conditions import Conds, entries_of, size_of


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
    controlled = [
        (sizes_of(net), _tokens(entry, shape)) for entry in entries_of(conds) for net in chain(entry.get("control"))
    ]
    held = sum(net.held_bytes(batch * tokens) for net, tokens in controlled)
    working = max((net.working_bytes(batch * (n + request.prompt_tokens)) for net, n in controlled), default=0)
    _, asked = comfy.sampler_helpers.get_additional_models(guider.conds, guider.model_patcher.model_dtype())
    cast = max((net.cast_bytes for net, _ in controlled), default=0) + int(asked)
    sizes = len({size_of(entry, shape) for entry in entries_of(conds)})
    options = guider.model_options.get("transformer_options", {})
    images = sizes * sum(patch.image.shape[0] for patch in control_patches(options))
    patches = patch_controls(request, footprint, batch, images) if has_patches(options) else Controls()
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


def sizes_of(net: Any) -> NetSizes:
    """Of a ControlNet that ComfyUI has loaded."""
    model = net.control_model
    if isinstance(model, QwenImageControlNetModel):
        blocks, hint = len(model.controlnet_blocks), model.controlnet_x_embedder.weight.shape[1]
    else:  # views of one tensor, which has the last block's states as well
        blocks, hint = len(model.control_blocks) + 1, model.control_img_in.weight.shape[1]
    dtype: torch.dtype = net.manual_cast_dtype or model.dtype
    return NetSizes(blocks, hint, width_of(net), dtype.itemsize, cast=net.manual_cast_dtype is not None)
