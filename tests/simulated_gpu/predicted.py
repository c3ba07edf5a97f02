"""Runs whose steps are not all computed: what they are predicted from lies on the card, between passes of blocks that
are fetched ahead for the next computed step."""

from dataclasses import replace

import torch
from qwenimage_lowvram.engine.compute.step_schedules import FirstBlockRule, Measured, StepCache, StepSchedule
from qwenimage_lowvram.engine.models.qwen_image.branch import Branch
from qwenimage_lowvram.engine.planning.draft import least_bytes
from qwenimage_lowvram.engine.planning.forecast import TYPICAL
from qwenimage_lowvram.engine.planning.memory import plan_memory
from qwenimage_lowvram.engine.planning.request import Limits, SamplingRequest
from qwenimage_lowvram.engine.runs.branch_keys import BranchKey
from qwenimage_lowvram.engine.runs.sampling_run import SamplingRun
from qwenimage_lowvram.engine.runs.surroundings import Alone
from qwenimage_lowvram.engine.runs.timeline import Timeline
from torch import Tensor

from .rig import PROMPT_TOKENS, Rig, finish, host, known

SCHEDULE = StepSchedule("of a test", 8, (0, 1, 3, 6), Measured("Qwen-Image", 64, 48))
ANNOUNCED = tuple(1 - step / 8 for step in range(8))
ALONE = (BranchKey("a", 0), BranchKey("b", 0))  # of two images

RULE = FirstBlockRule(1.07)
# one image is computed in every other step, the other one in all
MIXED = FirstBlockRule(1.07, name="mixed")


def predicted(
    rig: Rig, kind: str, *, cache: StepCache = SCHEDULE, more_blocks: float = 0, fail_at: int | None = None
) -> list[Tensor]:
    """The sampler's timesteps lie on the card. With the least memory and so many blocks' more; `fail_at`: an allocation
    that finds none, after which the run goes on with a smaller plan, from what it has kept."""
    model = rig.transformer(kind)
    request = SamplingRequest(
        64, 48, len(PROMPT_TOKENS), max(PROMPT_TOKENS), timesteps=len(ANNOUNCED), step_cache=cache
    )
    vram = least_bytes(model.footprint, request) + int(more_blocks * model.footprint.slot_bytes)
    plan = plan_memory(model.footprint, request, Limits(vram))
    run = SamplingRun(
        model, plan, steps=len(ANNOUNCED), speeds=known(rig, TYPICAL), timeline=Timeline(), surroundings=Alone()
    )
    if rig.gpu is not None:
        rig.gpu.allocator.fail_at = fail_at
    made: list[Tensor] = []
    try:
        run.load()
        run.begin(ANNOUNCED)
        before = model.store.fetched_blocks
        for timestep in ANNOUNCED:
            asked = torch.full((2,), timestep, device=rig.hardware.device)
            made += run.forward_at(asked, lambda values: _branches(rig, values[0], cache), ahead=True, keys=ALONE)
        made = host(made)
        fetched = model.store.fetched_blocks - before
    finally:
        report = run.end(finished=False)
    finish(model)
    computed = 8 if cache is MIXED else 4
    assert (report.computed_steps, report.predicted_steps, report.passes) == (computed, 8 - computed, computed)
    if rig.gpu is not None and fail_at is None:
        ended = report.predicted_steps if cache is RULE else 0
        assert fetched <= report.computed_steps * plan.streamed + ended
        # the host asks once a step what has changed, from the second step on; by a table never
        asked_of_card = [wait for wait in rig.gpu.waits if any("first_block.py" in line for line in wait.site[:1])]
        assert len(asked_of_card) == (0 if cache is SCHEDULE else len(ANNOUNCED) - 1)
    return made


def _branches(rig: Rig, timestep: float, cache: StepCache) -> list[Branch]:
    """Two steps after one another have the same image, so that the second one's first block adds nearly the same; of
    MIXED the second branch has another in each."""
    step = ANNOUNCED.index(timestep)
    same, other = ANNOUNCED[step - step % 2], timestep if cache is MIXED else ANNOUNCED[step - step % 2]
    branches = [rig.branches(same, prompts=2)[0], rig.branches(other, prompts=2)[1]]
    return [replace(branch, timestep=timestep) for branch in branches]
