"""Our transformer as ComfyUI's MODEL: what native samplers call, translated to branches."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.supported_models
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor

from ...engine.errors import Unsupported
from ...engine.lora.weight_patches import lora_patches
from ...engine.models.network import Hooked
from ...engine.models.qwen_image.branch import Branch
from ...engine.models.qwen_image.latents import PATCH
from ...engine.models.qwen_image.transformer import QwenImageTransformer
from ...engine.out_of_memory import in_words
from ...engine.planning.memory import MemoryPlan
from ...engine.reports.memory_report import MemoryReport
from ...engine.runs.timeline import Timeline
from .block_patches import BlockPatches, PatchPictures, check_patches, has_patches, sees_each_call
from .content_checks import check_computed, check_result, check_values
from .control_memory import controls_of
from .controlnets import ControlNets, check_controls, check_devices, other_models
from .graph_checks import (
    check_device,
    check_graph,
    check_latents,
    check_layers,
    check_references,
    check_size,
    refuse,
    why_one_by_one,
)
from .known_speeds import known_speeds
from .lockstep import KEY, Lockstep
from .model_call import Call
from .native_lora import PREFIX
from .patcher import LowVRAMPatcher
from .planning import check_positions, plan_run, request_of
from .progress import executing_prompt_id
from .references import check_methods
from .run_conditions import Conds, conditions_of_run, entries_of, size_of
from .sampling_run import SamplingRun
from .stand_ins import WithoutLayers, refuse_compiling
from .whole_process import tell_patched_process

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
        advice: str = "",
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
        self.timeline = timeline or Timeline(executing_prompt_id)
        self.advice = advice

    def _apply_model(self, *args: Any, **kwargs: Any) -> Any:
        if type(self.diffusion_model) is not _DiffusionModel:
            refuse_compiling()
        return super()._apply_model(*args, **kwargs)

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
        return self.diffusion_model.state_dict(prefix=PREFIX)

    def state_dict_for_saving(self, *args: Any, **kwargs: Any) -> Any:
        refuse("Saving the model (ModelSave, CheckpointSave)", "copy the file it was loaded from.")


def make_model(
    transformer: QwenImageTransformer,
    limit_bytes: int | None,
    ram_limit_bytes: int | None = None,
    timeline: Timeline | None = None,
    advice: str = "",
) -> LowVRAMPatcher:
    """A MODEL around `transformer`; a limit of None uses what is free. `timeline`: where its stages are measured,
    shared with the CLIP and VAE of the same loader. `advice`: what a person is told beside each plan."""
    model = LowVRAMModel(transformer, limit_bytes, ram_limit_bytes, timeline, advice)
    patcher = LowVRAMPatcher(
        model, load_device=transformer.hardware.device, offload_device=comfy.model_management.unet_offload_device()
    )
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _outer_sample)
    patcher.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, _calc_cond_batch)
    return patcher


@in_words("images were sampled")
def _outer_sample(
    executor: Any,
    noise: Tensor,
    latent_image: Tensor,
    sampler: Any,
    sigmas: Tensor,
    denoise_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Around a whole run of any native sampler: plan and refuse before anything is loaded, report afterwards."""
    guider = executor.class_obj
    model: LowVRAMModel = guider.model_patcher.model
    beside = other_models(guider)
    check_device(guider.model_patcher, model.transformer.hardware.device)  # first: it is where the values lie
    check_values(guider, noise, latent_image, sigmas, denoise_mask, model.latent_format.latent_channels)
    _check(model, guider, noise, beside)
    conds = conditions_of_run(guider, noise)
    check_computed(conds, noise.shape)
    check_positions(conds, noise.shape, model.transformer)
    calls = model.calls
    calls.controls = ControlNets(conds, noise.shape, model.transformer)
    options = guider.model_options.get("transformer_options", {})
    calls.pictures = PatchPictures(options, model.transformer.hardware.device)
    finished = False
    try:
        calls.run = _planned_run(model, guider, conds, noise, sigmas, beside)
        result = executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
        check_result(result)
        finished = True
        return result
    finally:
        run, controls = calls.run, calls.controls
        calls.run = calls.controls = calls.pictures = None
        controls.release()
        if run is not None:
            model.plan = run.plan
            model.model_loaded_weight_memory = model.transformer.loaded_bytes  # a smaller plan may have taken some away
            model.last_report = run.end(finished=finished)


def _check(model: LowVRAMModel, guider: Any, noise: Tensor, beside: Sequence[ModelPatcher]) -> None:
    """Raise Unsupported or InvalidRequest for what the graph asks of our model that it does not do."""
    transformer = model.transformer
    if type(model.diffusion_model) is not _DiffusionModel:
        refuse_compiling()
    guider.model_patcher.check_guests()
    tell_patched_process()
    check_graph(guider.model_options, guider.conds)
    check_patches(guider.model_options.get("transformer_options", {}))
    check_references(transformer.variant, guider.conds)
    check_methods(guider.conds, transformer.config)
    check_latents(noise)
    check_size(noise)
    check_layers(transformer.variant, noise.shape[2])
    check_controls(guider.conds, transformer.config.inner_dim, noise.shape[2])
    check_devices(beside, transformer.hardware.device)


def _planned_run(
    model: LowVRAMModel, guider: Any, conds: Conds, noise: Tensor, sigmas: Tensor, beside: Sequence[ModelPatcher]
) -> SamplingRun:
    """The plan, and the pictures of ControlNets and model patches, which are encoded before the run's memory is laid
    out. Raises DoesNotFit."""
    transformer, patcher, calls = model.transformer, guider.model_patcher, model.calls
    request = request_of(conds, noise.shape, sigmas, transformer.config.joint_attention_dim)
    controls = controls_of(conds, guider, noise.shape, request, transformer.footprint, beside)
    request = replace(request, controls=controls)
    transformer.patch(lora_patches(patcher.loras))
    model.model_loaded_weight_memory = transformer.loaded_bytes  # blocks that the LoRAs change have left
    speeds = known_speeds(transformer.hardware, transformer.dtype, transformer.file)

    def plan() -> MemoryPlan:
        return plan_run(transformer, request, model.limit_bytes, model.ram_limit_bytes, patcher, speeds, beside=beside)

    model.plan = plan()
    sizes = {size_of(entry, noise.shape) for entry in entries_of(conds)}
    if calls.controls.make_hints() | calls.pictures.encode(sizes, noise):
        model.plan = plan()  # the VAE may have moved what lay on the device
    reason = _why_one_by_one(model, guider.model_options)
    return SamplingRun(
        transformer,
        model.plan,
        sigmas.cpu(),
        reason,
        speeds,
        model.timeline,
        patcher=patcher,
        beside=beside,
        advice=model.advice,
    )


def _why_one_by_one(model: LowVRAMModel, model_options: Any) -> str:
    """Why calls may not share each visit of a block; empty where they may."""
    if model.diffusion_model.watched:
        return "a hook or another forward of the model sees each call"
    return why_one_by_one(model_options, KEY) or sees_each_call(model_options.get("transformer_options", {}))


def _calc_cond_batch(
    executor: Any, model: LowVRAMModel, conds: Any, x_in: Tensor, timestep: Tensor, model_options: Any
) -> Any:
    """Around the calls of one evaluation: all of them in one visit of the blocks, unless a foreign wrapper watches."""
    calls = model.calls
    alone = bool(_why_one_by_one(model, model_options))
    if calls.run is not None and calls.controls is not None:
        conds = calls.controls.once(conds, lambda: alone or calls.lockstep.recording, calls.run.attempt)
    if alone:
        return executor(model, conds, x_in, timestep, model_options)
    return calls.lockstep.together(lambda: executor(model, conds, x_in, timestep, model_options), calls.run_together)


class _Calls:
    """What ComfyUI's calls of the model need: the transformer and the present run. Refers to no module of ComfyUI's,
    which would be a circle that keeps an unloaded model alive."""

    def __init__(self, transformer: QwenImageTransformer) -> None:
        self.transformer = transformer
        self.lockstep = Lockstep()
        self.run: SamplingRun | None = None
        self.controls: ControlNets | None = None
        self.pictures: PatchPictures | None = None

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


class _DiffusionModel(WithoutLayers):
    """What BaseModel.apply_model calls. Has no parameters: nothing here is ComfyUI's to move, cast or patch."""

    def __init__(self, calls: _Calls) -> None:
        super().__init__(calls.transformer.weights)
        self._calls = calls
        self.dtype = calls.transformer.dtype
        config = calls.transformer.config
        self.in_channels = config.in_channels  # RenormCFG asks for it
        self.inner_dim, self.patch_size = config.inner_dim, PATCH
        self.guard()

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
        if x.shape[1] != config.in_channels // PATCH**2:
            refuse(f"A latent of {x.shape[1]} channels in the model (concat_cond, c_concat)", "remove that node.")
        if additional_t_cond is not None and not config.use_additional_t_cond:
            refuse("Additional time conditioning", "use a Qwen-Image-Layered model, or remove the node that sets it.")
        method = None if config.use_layer3d_rope else ref_latents_method  # which has but one
        if calls.lockstep.active and (reason := sees_each_call(transformer_options)):
            refuse(f"A hook that sets a model patch ({reason})", "set the patch on the model, without a hook.")
        call = Call(
            x,
            timestep,
            context,
            attention_mask=attention_mask,
            references=ref_latents or [],
            method=method,
            additional_t_cond=additional_t_cond,
            residuals=control or (),
            dtype=self.dtype,
        )
        if has_patches(transformer_options):
            given = x.to(self.dtype)
            call.patches = BlockPatches(
                transformer_options, given, config.num_layers, call.reference_tokens, calls.pictures
            )
        return calls.lockstep.call(call, calls.run_together, lambda: torch.zeros_like(x))
