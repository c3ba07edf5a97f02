"""Our transformer as ComfyUI's MODEL: what native samplers call, translated to branches."""

import logging
from collections.abc import Iterable
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.supported_models
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor, nn

from ...engine.errors import Unsupported
from ...engine.lora.patch import lora_patches
from ...engine.plan.memory import MemoryPlan
from ...engine.plan.report import MemoryReport
from ...engine.transformer.branch import Branch
from ...engine.transformer.hooks import Hooked
from ...engine.transformer.model import QwenImageTransformer
from .call import Call
from .control import (
    check_controls,
    check_devices,
    compute_once,
    lend_base,
    make_hints,
    other_models,
    residuals_of,
    take_base_back,
    with_controls,
)
from .lockstep import KEY, Lockstep
from .native_lora import PREFIX
from .patcher import LowVRAMPatcher
from .patches import BlockPatches, check_patches, has_patches, make_images_fit, sees_each_call
from .planning import plan_run, request_of
from .references import check_methods
from .run import SamplingRun
from .speeds import KnownSpeeds
from .timeline import Timeline
from .unsupported import check_graph, check_layers, check_references, check_size, refuse, why_one_by_one

logger = logging.getLogger(__name__)

# of ComfyUI's model configuration: it alone tells Layered from the other members
ADDITIONAL_KEY = "use_additional_t_cond"


class LowVRAMModel(comfy.model_base.QwenImage):
    """ComfyUI's Qwen-Image with our transformer in the place of its own.

    Latent format, model sampling and conditions are ComfyUI's. The weights lie outside of every nn.Module.
    """

    def __init__(
        self,
        transformer: QwenImageTransformer,
        limit_bytes: int | None,
        ram_limit_bytes: int | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        additional = {ADDITIONAL_KEY: True} if transformer.config.use_additional_t_cond else {}
        config = comfy.supported_models.QwenImage(
            {"image_model": "qwen_image", "disable_unet_model_creation": True, **additional}
        )
        config.set_inference_dtype(transformer.dtype, None)
        super().__init__(config, device=comfy.model_management.unet_offload_device())
        self.transformer = transformer
        self.limit_bytes = limit_bytes
        self.ram_limit_bytes = ram_limit_bytes
        self.calls = _Calls(transformer)
        self.diffusion_model = _DiffusionModel(self.calls)
        self.plan: MemoryPlan | None = None
        self.last_report: MemoryReport | None = None
        self.timeline = timeline or Timeline()

    @property
    def planned_bytes(self) -> int:
        """What the present plan keeps on the device between steps."""
        return self.plan.resident_bytes if self.plan else self.transformer.footprint.outside_bytes

    def load_planned(self) -> None:
        if self.calls.run is not None:
            self.calls.run.load()
            self.plan = self.calls.run.plan
        elif self.plan is not None:
            self.transformer.load(self.plan.resident, self.plan.held, self.plan.annexes)
        else:
            self.transformer.load(())

    def begin_run(self) -> None:
        if self.calls.run is not None:
            self.calls.run.begin(self.model_sampling)

    def memory_required(self, input_shape: Any, cond_shapes: Any = None) -> float:
        """What a run takes on the device beside the resident weights."""
        if self.calls.lockstep.active:
            return 0  # the calls must be made alike when they are recorded and when they are replayed
        if self.plan is None:
            return 0
        # the weights of ControlNets and model patches are counted by ComfyUI itself
        return self.plan.peak_bytes - self.plan.resident_bytes - self.plan.request.controls.weights_bytes

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The weights' names and shapes without the weights: ComfyUI's LoRA loaders look for their keys here."""
        return {
            f"{PREFIX}{name}": torch.empty(shape, device="meta") for name, shape in self.transformer.weights.items()
        }

    def state_dict_for_saving(self, *args: Any, **kwargs: Any) -> Any:
        refuse("Saving the model (ModelSave, CheckpointSave)", "copy the file it was loaded from.")


def make_model(
    transformer: QwenImageTransformer,
    limit_bytes: int | None,
    ram_limit_bytes: int | None = None,
    timeline: Timeline | None = None,
) -> LowVRAMPatcher:
    """A MODEL around `transformer`; a limit of None uses what is free. `timeline`: where its stages are measured,
    shared with the CLIP and VAE of the same loader."""
    model = LowVRAMModel(transformer, limit_bytes, ram_limit_bytes, timeline)
    patcher = LowVRAMPatcher(
        model, load_device=transformer.hardware.device, offload_device=comfy.model_management.unet_offload_device()
    )
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _outer_sample)
    patcher.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, _calc_cond_batch)
    return patcher


def _outer_sample(
    executor: Any, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Around a whole run of any native sampler: plan and refuse before anything is loaded, report afterwards."""
    guider = executor.class_obj
    patcher = guider.model_patcher
    model: LowVRAMModel = patcher.model
    check_graph(guider.model_options, guider.conds)
    options = guider.model_options.get("transformer_options", {})
    check_patches(options)
    check_references(model.transformer.variant, guider.conds)
    check_methods(guider.conds, model.transformer.config)
    check_size(model.transformer.variant, noise)
    request = request_of(guider, noise.shape, sigmas, model.transformer.config.joint_attention_dim)
    check_layers(model.transformer.variant, request.frames)
    check_controls(guider.conds, model.transformer.config.inner_dim, request.frames)
    request = with_controls(request, guider, noise.shape[0], model.transformer.footprint)
    beside = other_models(guider)
    check_devices(beside, model.transformer.hardware.device)
    model.transformer.patch(lora_patches(patcher.loras))
    model.model_loaded_weight_memory = model.transformer.loaded_bytes  # blocks that the LoRAs change have left
    speeds = KnownSpeeds(model.transformer.hardware, model.transformer.dtype, model.transformer.file)

    def plan() -> MemoryPlan:
        return plan_run(
            model.transformer, request, model.limit_bytes, model.ram_limit_bytes, patcher, speeds, beside=beside
        )

    model.plan = plan()
    if make_hints(model, guider.conds, noise) | make_images_fit(options, noise):
        model.plan = plan()  # the VAE may have moved what lay on the device
    reason = _why_one_by_one(guider.model_options, guider.conds.values())
    run = SamplingRun(model.transformer, model.plan, sigmas.cpu(), reason, speeds, model.timeline, beside=beside)
    model.calls.run = run
    finished = False
    try:
        result = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finished = True
        return result
    finally:
        model.calls.run = None
        take_base_back(guider.conds)
        model.plan = run.plan
        model.model_loaded_weight_memory = model.transformer.loaded_bytes  # a smaller plan may have taken some away
        model.last_report = run.end(finished=finished)


def _why_one_by_one(model_options: Any, conds: Iterable[Any]) -> str:
    """Why calls may not share each visit of a block; empty where they may."""
    return why_one_by_one(model_options, KEY) or sees_each_call(model_options.get("transformer_options", {}), conds)


def _calc_cond_batch(
    executor: Any, model: LowVRAMModel, conds: Any, x_in: Tensor, timestep: Tensor, model_options: Any
) -> Any:
    """Around the calls of one evaluation: all of them in one visit of the blocks, unless a foreign wrapper watches."""
    calls = model.calls
    lend_base(conds, calls.transformer)
    if _why_one_by_one(model_options, conds):
        return executor(model, conds, x_in, timestep, model_options)
    if calls.run is not None:
        conds = compute_once(conds, lambda: calls.lockstep.recording, calls.run.attempt)
    return calls.lockstep.together(lambda: executor(model, conds, x_in, timestep, model_options), calls.run_together)


class _Calls:
    """What ComfyUI's calls of the model need: the transformer and the present run. Refers to no module of ComfyUI's,
    which would be a circle that keeps an unloaded model alive."""

    def __init__(self, transformer: QwenImageTransformer) -> None:
        self.transformer = transformer
        self.lockstep = Lockstep()
        self.run: SamplingRun | None = None

    def run_together(self, calls: list[Call]) -> list[Tensor]:
        """Velocities of several calls, each (B, 16, F, H, W), in one visit of the blocks."""
        if self.run is None:
            raise Unsupported("The model was called outside of a sampler. Use a sampler node.")
        branches: list[Branch] = []
        hooked = []
        for call in calls:
            if call.patches is not None:
                hooked.append(Hooked(range(len(branches), len(branches) + call.batch), call.patches))
            branches += call.branches()
        tokens = iter(self.run.forward(branches, hooked))
        return [torch.cat([call.unpack(next(tokens)) for _ in range(call.batch)]) for call in calls]


class _DiffusionModel(nn.Module):
    """What BaseModel.apply_model calls. Has no parameters: nothing here is ComfyUI's to move, cast or patch."""

    def __init__(self, calls: _Calls) -> None:
        super().__init__()
        self._calls = calls
        self.dtype = calls.transformer.dtype
        self.in_channels = calls.transformer.config.in_channels  # RenormCFG asks for it

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        attention_mask: Tensor | None = None,
        ref_latents: list[Tensor] | None = None,
        additional_t_cond: Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """x (B, 16, F, H, W) normalised, timestep (B,) sigma in 0..1, context (B, L, dim), additional_t_cond (B,) of 0
        and 1 -> velocity like x."""
        options = transformer_options or {}
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        executor = WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timestep, context, attention_mask, ref_latents, additional_t_cond, options, **kwargs)

    def _forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        attention_mask: Tensor | None,
        ref_latents: list[Tensor] | None,
        additional_t_cond: Tensor | None,
        transformer_options: dict[str, Any],
        control: Any = None,
        ref_latents_method: str | None = None,
        **kwargs: Any,
    ) -> Tensor:
        calls = self._calls
        check_patches(transformer_options)
        config = calls.transformer.config
        if additional_t_cond is not None and not config.use_additional_t_cond:
            refuse("Additional time conditioning", "use a Qwen-Image-Layered model, or remove the node that sets it.")
        method = None if config.use_layer3d_rope else ref_latents_method  # which has but one
        if calls.lockstep.active and (reason := sees_each_call(transformer_options)):
            refuse(f"A hook that sets a model patch ({reason})", "set the patch on the model, without a hook.")
        references, residuals = ref_latents or [], residuals_of(control)
        call = Call(x, timestep, context, attention_mask, references, method, additional_t_cond, residuals, self.dtype)
        if has_patches(transformer_options):
            given = x.to(self.dtype)
            call.patches = BlockPatches(transformer_options, given, config.num_layers, call.reference_tokens)
        return calls.lockstep.call(call, calls.run_together, lambda: torch.zeros_like(x))
