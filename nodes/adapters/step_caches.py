"""Steps that are not computed, under ComfyUI's samplers: which of them can, and which branch is which from step to
step."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from ...engine.compute.step_schedules import StepCache, StepSchedule
from ...engine.runs.branch_keys import BranchKey
from .block_patches import has_patches
from .graph_checks import refuse

# ComfyUI's samplers that ask the model several times a step, or by a schedule of their own
OTHER_STEPS = frozenset(
    {
        *("dpm_2", "dpm_2_ancestral", "dpm_adaptive", "dpm_fast", "dpmpp_2s_ancestral", "dpmpp_2s_ancestral_cfg_pp"),
        *("dpmpp_sde", "dpmpp_sde_gpu", "exp_heun_2_x0", "exp_heun_2_x0_sde", "heun", "heunpp2", "sa_solver_pece"),
        *("seeds_2", "seeds_3"),
    }
)


def check_step_cache(cache: StepCache, sampler: Any, options: dict[str, Any], context_windows: bool) -> None:
    """Raise Unsupported for samplers that are known to take other steps than a table's, and for what has to see every
    step; `options`: the model's transformer_options. Other samplers are found out by the run."""
    name = cache.name
    function = getattr(getattr(sampler, "sampler_function", None), "__name__", "")
    taken = function.removeprefix("sample_").removesuffix("_function")
    if taken in OTHER_STEPS and isinstance(cache, StepSchedule):
        refuse(
            "Combining step_cache {name} with the sampler {sampler} (it takes other steps than the schedule's)",
            "use euler, dpmpp_2m or another sampler that calls the model once per step, or set step_cache to off in "
            "the loader.",
            code="graph.sampler_of_other_steps",
            sampler=taken,
            name=name,
        )
    if has_patches(options):
        refuse(
            "Combining step_cache {name} with a patch that is called around the model's blocks in every step",
            "remove the node that sets it, or set step_cache to off in the loader.",
            code="graph.patch_of_predicted_steps",
            name=name,
        )
    if context_windows:
        refuse(
            "Combining context windows with step_cache {name}",
            "remove the node that sets them, or set step_cache to off in the loader.",
            code="graph.windows_of_predicted_steps",
            name=name,
        )


def identities(options: dict[str, Any], batch: int) -> list[BranchKey]:
    """Of each image of a call's batch: which condition it is made for, and which image it is. `options`: the call's
    transformer_options, in which ComfyUI says what it has put together."""
    kinds, numbers = options.get("cond_or_uncond") or [0], options.get("uuids") or ()
    conditions = list(zip(kinds, numbers, strict=False)) or list(enumerate(kinds))
    images = batch // len(conditions)
    return [BranchKey(image, condition) for condition in conditions for image in range(images)]


def numbered(keys: Iterable[BranchKey]) -> list[BranchKey]:
    """Those of one evaluation, told from each other where they are the same."""
    seen = Counter[BranchKey]()
    made: list[BranchKey] = []
    for key in keys:
        made.append(BranchKey(key.image, (key.which, seen[key])))
        seen[key] += 1
    return made
