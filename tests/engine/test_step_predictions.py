"""Steps that are not computed: extrapolated to the bit, nothing fetched for them, and refused where a table says
nothing."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from qwenimage_lowvram.engine.compute.step_schedules import (
    OFF,
    STEP_SCHEDULES,
    FirstBlockRule,
    StepCache,
    StepSchedule,
)
from qwenimage_lowvram.engine.errors import InvalidRequest, Unsupported
from qwenimage_lowvram.engine.models.qwen_image.family import QWEN_IMAGE
from qwenimage_lowvram.engine.models.qwen_image.positions import Positions
from qwenimage_lowvram.engine.planning.draft import least_bytes
from qwenimage_lowvram.engine.planning.request import SamplingRequest
from qwenimage_lowvram.engine.reports.memory_report import MemoryReport
from qwenimage_lowvram.engine.runs.euler import euler
from qwenimage_lowvram.engine.runs.limit import Limit
from qwenimage_lowvram.engine.runs.pipeline import Pipeline
from qwenimage_lowvram.engine.runs.sample import EulerSampler
from qwenimage_lowvram.engine.runs.step_predictions import StepPredictions
from qwenimage_lowvram.engine.runs.surroundings import Alone
from qwenimage_lowvram.engine.runs.timeline import Timeline
from torch import Tensor

SIZE = {"width": 64, "height": 48, "seed": 3, "steps": 40}
TIMES = [1 - step / 40 for step in range(40)]
OFTEN = FirstBlockRule(0.95)  # of random weights each step is another
K12 = STEP_SCHEDULES["planned_12"]


def sampled(
    folder: Path, prompts: Sequence[Tensor], step_cache: str | StepCache, **settings: Any
) -> tuple[Tensor, MemoryReport]:
    with Pipeline.open(folder, device="cpu", positions=Positions.DIFFUSERS, **settings) as pipeline:
        latents = pipeline.sample(prompts, **SIZE, cfg=4.0 if len(prompts) > 1 else 1.0, step_cache=step_cache)
        assert pipeline.report.sampling is not None
        return latents, pipeline.report.sampling


def prompts(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(1, length, 64, generator=generator) for length in (9, 5)[:count]]


@torch.no_grad()
def reference(folder: Path, embeds: Sequence[Tensor], schedule: StepSchedule) -> Tensor:
    """diffusers' model, whose norm_out is given another input in the steps that the schedule leaves out."""
    model = QwenImageTransformer2DModel.from_pretrained(folder / "transformer").eval()
    past: dict[int, list[tuple[int, Tensor]]] = {i: [] for i in range(len(embeds))}
    step = prompt = 0

    def behind_the_blocks(module: Any, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if step in schedule.computed:
            past[prompt].append((step, given[0]))
            return given
        (n0, h0), (n1, h1) = past[prompt][-2:]
        return h1 + (h1 - h0) / (n1 - n0) * (step - n1), given[1]

    model.norm_out.register_forward_pre_hook(behind_the_blocks)

    def answers(given: Sequence[dict[str, Any]]) -> list[Tensor]:
        nonlocal step, prompt
        made = []
        for prompt in range(len(given)):
            made.append(model(**given[prompt], return_dict=False)[0])
        step += 1
        return made

    return denoised_by(answers, embeds)


def denoised_by(answers: Callable[[Sequence[dict[str, Any]]], list[Tensor]], embeds: Sequence[Tensor]) -> Tensor:
    """Latents by Euler's method; `answers(arguments of diffusers' model for each prompt)`."""
    images = QWEN_IMAGE.from_prompts
    noise = torch.randn(images.noise_shape(1, 64, 48), generator=torch.Generator().manual_seed(3))

    def denoised(x: Tensor, sigma: Tensor, value: float) -> Tensor:
        same = {"timestep": torch.tensor([value]), "img_shapes": [[(1, 3, 4)]]}
        tokens = images.branch(x, embeds[0], value).tokens
        given = [{"hidden_states": tokens, "encoder_hidden_states": embed, **same} for embed in embeds]
        guesses = [x - images.velocity([answer], x) * sigma for answer in answers(given)]
        if len(guesses) == 1:
            return guesses[0]
        return x - images.guided(x - guesses[0], x - guesses[1], 4.0)

    return images.raw(euler(noise, images.sigmas(None, 40, noise), denoised))


def assert_near(made: Tensor, wanted: Tensor) -> None:
    """Some CPUs round diffusers' model in another order than ours."""
    assert (made - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("planned_12", 2), ("planned_20", 1)])
def test_a_predicted_step_is_diffusers_model_with_the_extrapolation(
    small_pipeline: Path, name: str, count: int
) -> None:
    made, report = sampled(small_pipeline, prompts(count), name)
    assert_near(made, reference(small_pipeline, prompts(count), STEP_SCHEDULES[name]))
    computed = len(STEP_SCHEDULES[name].computed)
    assert (report.computed_steps, report.predicted_steps) == (computed, 40 - computed)
    assert f"not exact: {computed} of 40 steps computed" in str(report.plan)
    assert f"not exact: {computed} of 40 steps computed, {40 - computed} predicted" in str(report)


@torch.no_grad()
def reference_by_first_block(folder: Path, embeds: Sequence[Tensor], threshold: float) -> tuple[Tensor, int]:
    """diffusers' model, whose norm_out is given what block 0 made and what the others added when they last counted,
    where block 0 has hardly changed for every prompt; and how many steps those were. Each step runs twice: to look, and
    to answer."""
    model = QwenImageTransformer2DModel.from_pretrained(folder / "transformer").eval()
    past: dict[int, tuple[Tensor, Tensor]] = {}
    now: dict[str, Tensor] = {}
    ends = 0

    def behind_the_first(module: Any, args: Any, given: dict[str, Tensor], made: tuple[Tensor, Tensor]) -> None:
        now.update(added=made[1] - given["hidden_states"], behind=made[1])

    def behind_the_last(module: Any, given: tuple[Tensor, Tensor]) -> None:
        now["last"] = given[0]

    model.transformer_blocks[0].register_forward_hook(behind_the_first, with_kwargs=True)
    model.norm_out.register_forward_pre_hook(behind_the_last)

    def answers(given: Sequence[dict[str, Any]]) -> list[Tensor]:
        nonlocal ends
        made, seen = [], []
        for one in given:
            made.append(model(**one, return_dict=False)[0])
            seen.append(dict(now))
        changes = [(s["added"] - past[i][0]).abs().mean() / past[i][0].abs().mean() for i, s in enumerate(seen) if past]
        if changes and max(changes) < threshold:
            ends += 1
            tembs = [model.time_text_embed(one["timestep"], one["hidden_states"]) for one in given]
            hidden = [s["behind"] + past[i][1] for i, s in enumerate(seen)]
            return [model.proj_out(model.norm_out(h, temb)) for h, temb in zip(hidden, tembs, strict=True)]
        past.update({i: (s["added"], s["last"] - s["behind"]) for i, s in enumerate(seen)})
        return made

    return denoised_by(answers, embeds), ends


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_step_ends_behind_the_first_block_where_that_has_hardly_changed(small_pipeline: Path, count: int) -> None:
    made, report = sampled(small_pipeline, prompts(count), OFTEN)
    wanted, ended = reference_by_first_block(small_pipeline, prompts(count), OFTEN.threshold)
    assert_near(made, wanted)
    assert 5 < report.predicted_steps == ended < 35
    assert report.computed_steps + report.predicted_steps == 40
    assert report.passes == report.computed_steps
    assert "not exact: steps end after block 0" in str(report.plan)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_each_image_of_a_batch_ends_by_itself_and_blocks_are_fetched_once_for_those_that_go_on(
    small_pipeline: Path, count: int
) -> None:
    """Beside another whose noise is less, and whose first block changes in other steps."""
    cfg = 4.0 if count > 1 else 1.0
    with Pipeline.open(small_pipeline, device="cpu") as pipeline:
        transformer, images = pipeline._transformer, pipeline._images_of
        request = SamplingRequest(64, 48, 2 * count, 9, timesteps=40, step_cache=OFTEN)
        limit = least_bytes(transformer.footprint, request) + 40_000
        noise = torch.randn(images.noise_shape(2, 64, 48), generator=torch.Generator().manual_seed(3))
        noise[1] *= 0.1
        around = (Timeline(), Alone(transformer), Limit(limit))
        sampler = EulerSampler(transformer, images, pipeline._speeds, *around, step_cache=OFTEN)

        def run(noise: Tensor) -> Any:
            return sampler.sample(prompts(count), noise, images.sigmas(transformer, 40, noise), cfg=cfg)

        both, first, second = run(noise), run(noise[:1]), run(noise[1:])
    assert torch.equal(both.latents, torch.cat([first.latents, second.latents]))
    report, alone = both.report, (first.report, second.report)
    assert not report.plan.resident
    assert max(one.computed_steps for one in alone) < report.computed_steps < sum(one.computed_steps for one in alone)
    assert report.fetched_blocks == report.computed_steps * report.plan.blocks + report.predicted_steps


@pytest.mark.slow
def test_a_step_that_ends_behind_the_first_block_fetches_no_other(small_pipeline: Path) -> None:
    with Pipeline.open(small_pipeline, device="cpu") as pipeline:
        request = SamplingRequest(64, 48, 1, 9, timesteps=40, step_cache=OFTEN)
        limit = least_bytes(pipeline._transformer.footprint, request) + 40_000
    _, report = sampled(small_pipeline, prompts(1), OFTEN, vram_limit_bytes=limit)
    assert not report.plan.resident
    assert report.predicted_steps > 5
    assert report.fetched_blocks == report.computed_steps * report.plan.blocks + report.predicted_steps


@pytest.mark.slow
def test_a_skipped_step_fetches_nothing(small_pipeline: Path) -> None:
    embeds = prompts(1)
    exact, report = sampled(small_pipeline, embeds, OFF)
    with Pipeline.open(small_pipeline, device="cpu") as pipeline:
        limit = least_bytes(pipeline._transformer.footprint, report.plan.request) + 40_000
    for name in ("planned_28", "planned_12"):
        made, report = sampled(small_pipeline, embeds, name, vram_limit_bytes=limit)
        assert not report.plan.resident
        computed = len(STEP_SCHEDULES[name].computed)
        assert (report.passes, report.fetched_blocks) == (computed, computed * report.plan.blocks)
        assert 0 < (made - exact).abs().max() < exact.abs().max()


def test_another_number_of_steps_is_refused_before_anything_is_read(small_pipeline: Path) -> None:
    with Pipeline.open(small_pipeline, device="cpu") as pipeline:
        with pytest.raises(InvalidRequest, match=r"planned_20 is a table for runs of 40 steps; this run has 30\."):
            pipeline.make("a cat", width=64, height=48, seed=1, steps=30, step_cache="planned_20")
        with pytest.raises(
            InvalidRequest, match=r"step_cache is 'half'; it must be one of off, planned_28, planned_20"
        ):
            pipeline.make("a cat", width=64, height=48, seed=1, steps=40, step_cache="half")
        assert pipeline._encoder.fetched_bytes == pipeline._transformer.store.fetched_bytes == 0


def tokens(seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_prediction_is_computed_in_the_dtype_of_what_it_is_made_of(dtype: torch.dtype) -> None:
    steps = StepPredictions(K12, TIMES)
    first, last = tokens(0, dtype), tokens(1, dtype)
    for step, hidden in ((6, first), (9, last)):
        assert steps.predict(["a"], TIMES[step]) == [None]
        steps.done(TIMES[step], {"a": hidden}, ())
    for step in (10, 11, 12):  # of computed ones alone, however many were predicted since
        (made,) = steps.predict(["a"], TIMES[step])
        assert made is not None
        assert made.dtype == dtype
        assert torch.equal(made, last + (last - first) / 3 * (step - 9))
        steps.done(TIMES[step], {}, ["a"])
    assert torch.equal(first, tokens(0, dtype))
    assert torch.equal(last, tokens(1, dtype))


def test_a_branch_that_begins_late_is_computed_until_it_can_be_predicted() -> None:
    steps = StepPredictions(K12, TIMES)
    for step in (0, 1, 2):
        steps.done(TIMES[step], {"a": tokens(step)}, ())
    known, late = steps.predict(["a", "b"], TIMES[3])
    assert known is not None
    assert torch.equal(known, tokens(2) + (tokens(2) - tokens(1)))
    assert late is None
    steps.done(TIMES[3], {"b": tokens(13)}, ["a"])
    steps.done(TIMES[4], {"a": tokens(4), "b": tokens(14)}, ())
    late, known = steps.predict(["b", "a"], TIMES[5])  # in any order
    assert late is not None
    assert known is not None
    assert torch.equal(late, tokens(14) + (tokens(14) - tokens(13)))
    assert torch.equal(known, tokens(4) + (tokens(4) - tokens(2)) / 2)
    steps.done(TIMES[5], {}, ["b", "a"])
    assert (steps.computed_steps, steps.predicted_steps) == (5, 1)


@pytest.mark.parametrize("asked", [TIMES[2], TIMES[1], 0.501], ids=["again", "before", "none of the run's"])
def test_a_sampler_that_leaves_the_schedule_is_refused(asked: float) -> None:
    steps = StepPredictions(K12, TIMES)
    for step in (0, 1, 2):
        steps.done(TIMES[step], {"a": tokens(step)}, ())
    with pytest.raises(Unsupported, match="planned_12 needs a sampler that takes each step of the schedule once"):
        steps.predict(["a"], asked)
    assert steps.predict(["b"], TIMES[2]) == [None]  # another branch, which runs behind the first


def test_a_first_timestep_a_little_behind_the_schedules_is_the_first_step() -> None:
    steps = StepPredictions(K12, TIMES)
    assert steps.predict(["a"], 0.9999) == [None]
    steps.done(0.9999, {"a": tokens(0)}, ())
    steps.done(TIMES[1], {"a": tokens(1)}, ())
    with pytest.raises(Unsupported, match=r"asked for timestep 0\.98 out of order"):
        steps.predict(["a"], 0.98)
    steps.done(TIMES[2], {"a": tokens(2)}, ())
    assert steps.predict(["a"], TIMES[3])[0] is not None
