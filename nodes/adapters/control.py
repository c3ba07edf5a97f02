"""ControlNets that ComfyUI runs beside our transformer: which ones work, what they take, and what they hand over.

Their weights and their computing are ComfyUI's. What they add behind our blocks are residuals: for each net of a chain,
a tensor or None for each block.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import comfy.controlnet
import comfy.ldm.flux.layers
import comfy.ldm.qwen_image.model
import comfy.model_patcher
import comfy.sampler_helpers
import torch
from comfy.ldm.qwen_image.controlnet import QwenImageControlNetModel, QwenImageFunControlNetModel
from diffusers import QwenImageTransformer2DModel
from torch import Tensor

from ...engine.plan.footprint import TransformerFootprint
from ...engine.plan.request import Controls, SamplingRequest
from ...engine.transformer.model import QwenImageTransformer
from ..words import LOADER
from .patches import patched_bytes
from .unsupported import refuse

Conds = dict[str, list[dict[str, Any]]]
# one sequence of residuals (B, n, dim) for each net
Residuals = tuple[Sequence[Tensor | None], ...]

# tensors of one token's width that are alive at once in ComfyUI's QwenImageTransformerBlock: the joint attention's
# q, k and v, before and after they are joined and turned, and around the MLP its four times wider states
BLOCK_WIDTHS = 12


def chain(control: Any) -> list[Any]:
    """A condition's ControlNets, the first that was applied first."""
    nets = []
    while control is not None:
        nets.append(control)
        control = control.previous_controlnet
    return nets[::-1]


def _nets(conds: Iterable[Any]) -> Iterator[Any]:
    """Each ControlNet of these conditions once."""
    nets = [net for entry in conds for net in chain(entry.get("control"))]
    yield from dict.fromkeys(nets)


def _all_nets(conds: Conds) -> Iterator[Any]:
    return _nets(entry for entries in conds.values() for entry in entries or ())


def check_controls(conds: Conds, inner_dim: int, frames: int) -> None:
    """Raise Unsupported for ControlNets that were made for other models, or beside latents of several `frames`."""
    for net in _all_nets(conds):
        if frames > 1:
            refuse("A ControlNet beside layers", "remove the ControlNet, or use a Qwen-Image or Edit model.")
        model = getattr(net, "control_model", None)
        known = isinstance(model, (QwenImageControlNetModel, QwenImageFunControlNetModel))
        width = _width(net) if known and isinstance(net, comfy.controlnet.ControlNet) else None
        if width != inner_dim:
            kind = type(net if model is None else model).__name__
            of = "" if width is None else f", {width} wide where the model is {inner_dim},"
            refuse(f"A ControlNet for another model ({kind}){of}", "choose a ControlNet made for Qwen-Image.")


def other_models(guider: Any) -> list[comfy.model_patcher.ModelPatcher]:
    """What ComfyUI will load on the device beside our model for this run."""
    patcher = guider.model_patcher
    models, _ = comfy.sampler_helpers.get_additional_models(guider.conds, patcher.model_dtype())
    models = models + comfy.sampler_helpers.get_additional_models_from_model_options(guider.model_options)
    return list(dict.fromkeys([*models, *patcher.get_nested_additional_models(), *patcher.model_patches_models()]))


def check_devices(models: Iterable[comfy.model_patcher.ModelPatcher], device: torch.device) -> None:
    """Raise Unsupported for models beside the transformer on another device than its own."""
    for other in models:
        if other.load_device != device:
            what = f"A {type(other.model).__name__} on {other.load_device} beside a transformer on {device}"
            refuse(what, f"set transformer_device to auto in '{LOADER}'.")


def with_controls(
    request: SamplingRequest, guider: Any, batch: int, footprint: TransformerFootprint
) -> SamplingRequest:
    """The request with what runs beside the transformer; `batch` pictures are made at a time."""
    entries = [entry for entries in guider.conds.values() for entry in entries or ()]
    controls = [entry["control"] for entry in entries if entry.get("control") is not None]
    if any(entry.get("control_apply_to_uncond") for entry in entries):
        controls = controls * 2  # the sampler gives the negative conditions the same one
    picture = replace(request, reference_tokens=0)  # which a ControlNet is not shown
    held = sum(held_bytes(net, picture, batch) for control in controls for net in chain(control))
    working = max((working_bytes(net, picture, batch) for net in _nets(entries)), default=0)
    _, asked = comfy.sampler_helpers.get_additional_models(guider.conds, guider.model_patcher.model_dtype())
    weights = sum(model.model_size() for model in other_models(guider))
    options = guider.model_options.get("transformer_options", {})
    patches = patched_bytes(options, request, footprint, batch)
    return replace(
        request,
        controls=Controls(int(weights), held + patches.held_bytes, max(working + int(asked), patches.working_bytes)),
    )


def _dtype(net: Any) -> torch.dtype:
    dtype: torch.dtype = net.manual_cast_dtype or net.control_model.dtype
    return dtype


def held_bytes(net: Any, request: SamplingRequest, batch: int) -> int:
    """Residuals and the hint, of one condition."""
    model = net.control_model
    tokens = batch * request.image_tokens * _dtype(net).itemsize
    if isinstance(model, QwenImageControlNetModel):
        widths = len(model.controlnet_blocks) * model.inner_dim + model.controlnet_x_embedder.weight.shape[1]
    else:  # views of one tensor, which has the last block's states as well
        width, hint = model.control_img_in.weight.shape
        widths = (len(model.control_blocks) + 1) * width + hint
    return int(tokens * widths)


def working_bytes(net: Any, request: SamplingRequest, batch: int) -> int:
    """One pass of a net beyond its weights and what it hands over."""
    size, width = _dtype(net).itemsize, _width(net)
    cast = 0 if net.manual_cast_dtype is None else 4 * width * width * size  # its widest weight, for a moment
    return int(batch * BLOCK_WIDTHS * (request.image_tokens + request.prompt_tokens) * width * size + cast)


def _width(net: Any) -> int:
    model = net.control_model
    return int(model.inner_dim if isinstance(model, QwenImageControlNetModel) else model.control_img_in.weight.shape[0])


def make_hints(model: Any, conds: Conds, noise: Tensor) -> bool:
    """Let each ControlNet encode its picture for latents like `noise` now, before the run's memory is laid out.

    Their VAE may ask for room, which during the run would be taken from the blocks. True where there was one to do it.
    """
    nets = list(_all_nets(conds))
    x = torch.zeros_like(noise, device=model.transformer.hardware.device)
    for net in nets:
        net.pre_run(model, lambda percent: 1.0 - percent)
        net.extra_args.pop("base_model", None)
        net.timestep_range, weights = None, net.control_model
        net.control_model = _HandsNothingOver(weights.dtype)
        try:
            _alone(net, x, x.new_zeros(x.shape[0]), {"c_crossattn": x.new_zeros(1, 1, 1)}, 1, {})
        finally:
            net.control_model = weights
    return bool(nets)


class _HandsNothingOver:
    """In the place of a ControlNet's model while only its hint is wanted."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, **kwargs: Any) -> dict[str, Any]:
        return {}


def _alone(net: Any, *arguments: Any) -> Any:
    """Its own residuals, without those of the nets before it in a chain."""
    try:
        with comfy.controlnet.ControlIsolation(net):
            return net.get_control(*arguments)
    except BaseException:
        net.cond_hint = None  # it may be half made, and would pass for whole the next time
        raise


class ControlOnce:
    """Stands for a condition's ControlNets while its call is recorded, and while it is replayed: they compute once.

    One for each condition: ComfyUI then batches no two of them, and a pass is as large as was planned. What nets of a
    chain add is kept apart until it is used, where ComfyUI keeps its sum for every block.
    """

    def __init__(self, control: Any, recording: Callable[[], bool], attempt: Callable[..., Any]) -> None:
        self._nets = chain(control)
        self._recording = recording
        self._attempt = attempt

    def get_control(self, *arguments: Any) -> Residuals | None:
        if not self._recording():
            return None
        answers = [self._attempt(lambda net=net: _alone(net, *arguments)) for net in self._nets]
        return tuple(residuals for answer in answers for residuals in residuals_of(answer))


def residuals_of(control: Any) -> Residuals:
    """What the transformer was handed: by ComfyUI's own ControlNets, by ControlOnce, or nothing."""
    if control is None or isinstance(control, tuple):
        return control or ()
    return (control["input"],)


def sample_of(residuals: Residuals, index: int) -> Residuals:
    """Those of picture `index` of a batch, or of the only one there is."""
    return tuple(
        [None if r is None else r[(at := min(index, r.shape[0] - 1)) : at + 1] for r in net] for net in residuals
    )


def compute_once(conds: list[Any], recording: Callable[[], bool], attempt: Callable[..., Any]) -> list[Any]:
    """The conditions of an evaluation with their ControlNets in ControlOnce."""

    def once(entry: dict[str, Any]) -> dict[str, Any]:
        control = entry.get("control")
        return entry if control is None else {**entry, "control": ControlOnce(control, recording, attempt)}

    return [None if entries is None else [once(entry) for entry in entries] for entries in conds]


class BorrowedBase:
    """The parts of a transformer that ComfyUI's Fun ControlNet borrows from the model it controls."""

    patch_size = 2
    process_img = comfy.ldm.qwen_image.model.QwenImageTransformer2DModel.process_img

    def __init__(self, head_dim: int, rope_axes: Sequence[int], outside: QwenImageTransformer2DModel) -> None:
        self.pe_embedder = comfy.ldm.flux.layers.EmbedND(dim=head_dim, theta=10000, axes_dim=list(rope_axes))
        self.img_in, self.txt_in, self.txt_norm = outside.img_in, outside.txt_in, outside.txt_norm
        self.time_text_embed = outside.time_text_embed


def lend_base(conds: list[Any], transformer: QwenImageTransformer) -> None:
    """Give Fun ControlNets what they borrow, for the evaluation that follows."""
    for net in _nets(entry for entries in conds for entry in entries or ()):
        if "base_model" in net.extra_args:
            transformer.return_outside()
            config = transformer.config
            base = BorrowedBase(config.attention_head_dim, config.axes_dims_rope, transformer.outside)
            net.set_extra_arg("base_model", base)


def take_base_back(conds: Conds) -> None:
    """Of a run that has ended, however it did: a net that is kept must not keep the model."""
    for net in _all_nets(conds):
        net.extra_args.pop("base_model", None)
