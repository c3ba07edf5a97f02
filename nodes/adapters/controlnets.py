"""ControlNets that ComfyUI runs beside our transformer: which ones work, and what they hand over.

Their weights and their computing are ComfyUI's. What they add behind our blocks are residuals: for each net of a chain,
a tensor or None for each block.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import comfy.controlnet
import comfy.model_patcher
import comfy.sampler_helpers
import torch
from comfy.ldm.qwen_image.controlnet import QwenImageControlNetModel, QwenImageFunControlNetModel
from torch import Tensor

from ...engine.models.qwen_image.transformer import QwenImageTransformer
from .borrowed_base import BorrowedBase
from .graph_checks import refuse
from .run_conditions import Conds, entries_of, size_of

# one sequence of residuals (B, n, dim) for each net
Residuals = tuple[Sequence[Tensor | None], ...]
BASE = "base_model"  # what a Fun ControlNet calls the model it borrows from


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


def check_controls(conds: Conds, inner_dim: int, frames: int) -> None:
    """Raise Unsupported for ControlNets that were made for other models, or beside latents of several `frames`."""
    for net in _nets(entries_of(conds)):
        if frames > 1:
            refuse(
                "A ControlNet together with layers",
                "remove the ControlNet, or use a Qwen-Image or Edit model.",
                code="graph.control_beside_layers",
            )
        model = getattr(net, "control_model", None)
        known = isinstance(model, (QwenImageControlNetModel, QwenImageFunControlNetModel))
        width = width_of(net) if known and isinstance(net, comfy.controlnet.ControlNet) else None
        if width != inner_dim:
            kind = type(net if model is None else model).__name__
            of = "" if width is None else f", {width} wide where the model is {inner_dim},"
            refuse(
                "A ControlNet for another model ({kind}){of}",
                "choose a ControlNet made for Qwen-Image.",
                code="graph.control_of_another_model",
                kind=kind,
                of=of,
            )


def other_models(guider: Any) -> list[comfy.model_patcher.ModelPatcher]:
    """What ComfyUI will load on the device beside our model for a run."""
    patcher = guider.model_patcher
    models, _ = comfy.sampler_helpers.get_additional_models(guider.conds, patcher.model_dtype())
    models = models + comfy.sampler_helpers.get_additional_models_from_model_options(guider.model_options)
    return list(dict.fromkeys([*models, *patcher.get_nested_additional_models(), *patcher.model_patches_models()]))


def check_devices(models: Iterable[comfy.model_patcher.ModelPatcher], device: torch.device) -> None:
    """Raise Unsupported for models beside the transformer on another device than its own."""
    for other in models:
        if other.load_device != device:
            refuse(
                "A {kind} on {other_device} together with a transformer on {device}",
                "set transformer_device to auto in '{loader}'.",
                code="graph.model_on_another_device",
                kind=type(other.model).__name__,
                other_device=other.load_device,
                device=device,
            )


def width_of(net: Any) -> int:
    model = net.control_model
    return int(model.inner_dim if isinstance(model, QwenImageControlNetModel) else model.control_img_in.weight.shape[0])


class ControlNets:
    """The ControlNets of one sampling run, from before its memory is laid out until `release`.

    Their images are encoded once for each size that the run's calls have. ComfyUI keeps one at a time, and does not
    compare widths.
    """

    def __init__(self, conds: Conds, shape: Sequence[int], transformer: QwenImageTransformer) -> None:
        """`shape`: of the run's latents, (B, 16, F, H, W)."""
        self._conds = conds
        self._shape = shape
        self._transformer = transformer
        self._hints: dict[tuple[Any, torch.Size], Tensor] = {}

    def make_hints(self) -> bool:
        """Let each encode its image for each size now. True where there was one to do it.

        Their VAE may ask for room, which during the run would be taken from the blocks.
        """
        device = self._transformer.hardware.device
        for entry in entries_of(self._conds):
            height, width = size_of(entry, self._shape)
            x = torch.zeros(*self._shape[:3], height, width, device=device)
            for net in chain(entry.get("control")):
                if (net, x.shape) not in self._hints:
                    self._make_hint(net, x)
        return bool(self._hints)

    def _make_hint(self, net: Any, x: Tensor) -> None:
        when, weights = net.timestep_range, net.control_model
        net.timestep_range, net.control_model = None, _HandsNothingOver(weights.dtype)
        try:
            self._alone(net, x, x.new_zeros(x.shape[0]), {"c_crossattn": x.new_zeros(1, 1, 1)}, 1, {})
        finally:
            net.timestep_range, net.control_model = when, weights

    def once(self, conds: list[Any], recording: Callable[[], bool], attempt: Callable[..., Any]) -> list[Any]:
        """The conditions of an evaluation with their ControlNets in ControlOnce."""

        def compute(net: Any, *arguments: Any) -> Any:
            return attempt(lambda: self._alone(net, *arguments))

        def once(entry: dict[str, Any]) -> dict[str, Any]:
            control = entry.get("control")
            return entry if control is None else {**entry, "control": ControlOnce(chain(control), recording, compute)}

        return [None if entries is None else [once(entry) for entry in entries] for entries in conds]

    def _alone(self, net: Any, x: Tensor, *arguments: Any) -> Any:
        """Its own residuals, without those of the nets before it in a chain."""
        net.cond_hint = self._hints.get((net, x.shape))
        borrows = isinstance(net.control_model, QwenImageFunControlNetModel)
        if borrows:
            net.set_extra_arg(BASE, self._base())
        try:
            with comfy.controlnet.ControlIsolation(net):
                answer = net.get_control(x, *arguments)
            if net.cond_hint is not None:
                self._hints[net, x.shape] = net.cond_hint
            return answer
        finally:
            net.cond_hint = None  # it may be half made, or for another size than the next call's
            if borrows:
                net.set_extra_arg(BASE, None)

    def _base(self) -> BorrowedBase:
        transformer = self._transformer
        transformer.return_outside()
        config = transformer.config
        return BorrowedBase(config.attention_head_dim, config.axes_dims_rope, transformer.outside)

    def release(self) -> None:
        """However the run has ended: nets that are kept must not keep its images, nor what ComfyUI gave them."""
        self._hints.clear()
        for net in _nets(entries_of(self._conds)):
            net.cleanup()


class _HandsNothingOver:
    """In the place of a ControlNet's model while only its hint is wanted."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, **kwargs: Any) -> dict[str, Any]:
        return {}


class ControlOnce:
    """Stands for a condition's ControlNets while its call is recorded, and while it is replayed: they compute once.

    One for each condition: ComfyUI then batches no two of them, and a pass is as large as was planned. What nets of a
    chain add is kept apart until it is used, where ComfyUI keeps its sum for every block.
    """

    def __init__(self, nets: list[Any], recording: Callable[[], bool], compute: Callable[..., Any]) -> None:
        self._nets = nets
        self._recording = recording
        self._compute = compute

    def get_control(self, *arguments: Any) -> Residuals | None:
        if not self._recording():
            return None
        answers = [self._compute(net, *arguments) for net in self._nets]
        return tuple((answer or {}).get("input", ()) for answer in answers)


def sample_of(residuals: Residuals, index: int) -> Residuals:
    """Those of image `index` of a batch, or of the only one there is."""
    return tuple(
        [None if r is None else r[(at := min(index, r.shape[0] - 1)) : at + 1] for r in net] for net in residuals
    )
