"""What is done around ComfyUI's runs and evaluations of our MODEL: plan, refuse, sample, report."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import comfy.model_management
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...engine.lora.weight_patches import lora_patches
from ...engine.out_of_memory import in_words
from ...engine.planning.memory_plan import MemoryPlan
from ...engine.planning.request import SamplingRequest
from ...engine.runs.phases import Phase
from ...engine.runs.sampling_plan import plan_sampling
from ...engine.runs.sampling_run import SamplingRun
from .attention import OVERRIDE_KEY, attention_of_run
from .block_patches import PatchImages, check_patches, has_patches, sees_each_call
from .compiling import settings_of_run
from .content_checks import check_computed, check_result, check_values
from .controlnets import ControlNets, check_devices, other_models
from .easycache import state_of
from .error_events import errors_sent
from .graph_checks import check_device, check_graph, why_one_by_one
from .in_comfyui import InComfyUI
from .known_speeds import known_speeds
from .limit_names import loader_limit
from .lockstep import KEY
from .patcher import LowVRAMPatcher
from .progress import progress_sender
from .run_conditions import Conds, conditions_of_run, entries_of, size_of
from .step_caches import check_step_cache
from .streamed_model import LowVRAMModel
from .whole_process import tell_patched_process


def as_patcher(model: LowVRAMModel) -> LowVRAMPatcher:
    """The MODEL around a model, with what is done around its runs and evaluations."""
    patcher = LowVRAMPatcher(
        model,
        load_device=model.transformer.hardware.device,
        offload_device=comfy.model_management.unet_offload_device(),
    )
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _outer_sample)
    patcher.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, _calc_cond_batch)
    return patcher


@errors_sent()
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
    progress_sender()({"stage": Phase.PREPARING.value})
    guider = executor.class_obj
    model: LowVRAMModel = guider.model_patcher.model
    device = model.transformer.hardware.device
    beside = other_models(guider)
    check_device(guider.model_patcher, device)  # first: it is where the values lie
    check_values(guider, noise, latent_image, sigmas, denoise_mask, model.latent_format.latent_channels)
    _check_graph(model, guider)
    model.check_run(guider.conds, noise)
    model.check_beside(guider.conds, guider.model_options.get("transformer_options", {}))
    if model.step_cache is not None:
        options = guider.model_options
        windows = options.get("context_handler") is not None
        check_step_cache(model.step_cache, sampler, options.get("transformer_options", {}), windows)
    check_devices(beside, device)
    conds = conditions_of_run(guider, noise)
    check_computed(conds, noise.shape)
    calls = model.calls
    calls.controls = ControlNets(conds, noise.shape, model.transformer)
    calls.images = PatchImages(guider.model_options.get("transformer_options", {}), device)
    finished = False
    try:
        request = replace(model.request_of(conds, noise, sigmas), step_cache=model.step_cache)
        controls = model.controls_of(conds, guider, noise, request, beside)
        calls.run = _planned_run(model, guider, conds, noise, sigmas, replace(request, controls=controls), beside)
        result = executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
        check_result(result)
        finished = True
        return result
    finally:
        run, nets = calls.run, calls.controls
        calls.run = calls.controls = calls.images = None
        nets.release()
        if run is not None:
            model.plan = run.plan
            model.model_loaded_weight_memory = model.transformer.loaded_bytes  # a smaller plan may have taken some away
            model.last_report = run.end(finished=finished)


def _check_graph(model: LowVRAMModel, guider: Any) -> None:
    """Raise Unsupported for what the graph asks of our models that none of them does."""
    model._refuse_compiled()
    guider.model_patcher.check_guests()
    tell_patched_process()
    check_graph(guider.model_options, guider.conds)
    check_patches(guider.model_options.get("transformer_options", {}))


def _planned_run(
    model: LowVRAMModel,
    guider: Any,
    conds: Conds,
    noise: Tensor,
    sigmas: Tensor,
    request: SamplingRequest,
    beside: Sequence[ModelPatcher],
) -> SamplingRun:
    """The plan, and the images of ControlNets and model patches, which are encoded before the run's memory is laid
    out. Raises DoesNotFit."""
    transformer, patcher, calls = model.transformer, guider.model_patcher, model.calls
    options = guider.model_options.get("transformer_options", {})
    calls.override = options.get(OVERRIDE_KEY)
    settle(model, patcher, guider.model_options)
    speeds = known_speeds(
        transformer.hardware,
        transformer.products_dtype,
        transformer.file,
        transformer.stored_product,
        [store.hardware for store in transformer.secondaries.values()],
    )
    limit, surroundings = loader_limit(model.limit_bytes), InComfyUI(patcher, beside)

    one_by_one = _why_one_by_one(model, guider.model_options)
    # patches may hand on what lies on one device
    alone = bool(one_by_one) or has_patches(options)

    def plan() -> MemoryPlan:
        ram_bytes = model.ram_limit_bytes
        return plan_sampling(transformer, request, limit, ram_bytes, speeds, surroundings, one_by_one=alone)

    model.plan = plan()
    sizes = {size_of(entry, noise.shape) for entry in entries_of(conds)}
    assert calls.controls is not None
    assert calls.images is not None
    if calls.controls.make_hints() | calls.images.encode(sizes, noise):
        model.plan = plan()  # the VAE may have moved what lay on the device
    calls.sigmas = sigmas.cpu()
    return SamplingRun(
        transformer,
        model.plan,
        steps=len(sigmas) - 1,
        speeds=speeds,
        timeline=model.timeline,
        surroundings=surroundings,
        one_by_one=one_by_one,
        advice=model.advice,
    )


def settle(model: LowVRAMModel, patcher: LowVRAMPatcher, model_options: Any) -> None:
    """Bring what the MODEL carries to its transformer, before a run: LoRAs, attention, compiling."""
    transformer, options = model.transformer, model_options.get("transformer_options", {})
    transformer.patch(lora_patches(patcher.loras))
    transformer.attend_by(attention_of_run(transformer, model.attention, options.get(OVERRIDE_KEY)))
    transformer.compile_by(settings_of_run(model_options, exact=model.exact, of_loader=model.compiling))
    model.model_loaded_weight_memory = transformer.loaded_bytes  # blocks that the LoRAs change have left


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
    return calls.lockstep.together(
        lambda: executor(model, conds, x_in, timestep, model_options),
        calls.run_together,
        recorded_once=state_of(model_options),
    )
