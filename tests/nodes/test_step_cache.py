"""Steps that are not computed, under ComfyUI's samplers: the same branch in every step, or a refusal."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.compute.step_schedules import FirstBlockRule, Measured, StepSchedule
from qwenimage_lowvram.engine.errors import InvalidRequest, Unsupported
from qwenimage_lowvram.nodes.adapters import step_caches

from .conftest import NAME_21, cond, empty_latent, sample
from .test_model import CASES, ksampler, one_by_one

SCHEDULE = StepSchedule("of a test", 8, (0, 1, 2, 5), Measured("Qwen-Image", 96, 64))
CONDS = (cond(), cond(5, 2))


@pytest.fixture
def cached(model: Any) -> Any:
    model.model.step_cache = SCHEDULE
    return model


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_calls_together_are_predicted_as_calls_one_by_one(cached: Any, case: str) -> None:
    positive, negative = CASES[case]
    latent = empty_latent(batch=2)
    together = ksampler(cached, positive, negative, latent, steps=8)
    report = cached.model.last_report
    assert report.one_by_one == ""
    assert report.computed_steps + report.predicted_steps == 8
    # a prompt that begins late is computed until there is enough to predict it from
    assert report.computed_steps == (6 if case == "timestep ranges" else 4)
    alone = ksampler(one_by_one(cached), positive, negative, latent, steps=8)
    assert torch.equal(together, alone)
    cached.model.step_cache = None
    exact = ksampler(cached, positive, negative, latent, steps=8)
    assert 0 < (together - exact).abs().max() < exact.abs().max()


def test_a_table_of_every_step_changes_no_bit(model: Any) -> None:
    exact = ksampler(model, *CONDS, empty_latent(), steps=8)
    model.model.step_cache = replace(SCHEDULE, computed=tuple(range(8)))
    assert torch.equal(ksampler(model, *CONDS, empty_latent(), steps=8), exact)
    assert model.model.last_report.predicted_steps == 0


@pytest.mark.slow
def test_every_sampler_takes_the_tables_steps_or_is_found_out(cached: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.samplers

    named = step_caches.OTHER_STEPS
    monkeypatch.setattr(step_caches, "OTHER_STEPS", frozenset())
    refused = set()
    for sampler in comfy.samplers.SAMPLER_NAMES:
        try:
            ksampler(cached, *CONDS, empty_latent(), sampler, steps=8)
        except Unsupported:
            refused.add(sampler)
            continue
        report = cached.model.last_report
        assert (report.computed_steps, report.predicted_steps, report.passes) == (4, 4, 4), sampler
    assert refused == named & set(comfy.samplers.SAMPLER_NAMES)
    assert {"heun", "dpm_2", "dpmpp_sde"} <= refused


def test_what_a_table_cannot_serve_is_refused_before_anything_is_loaded(cached: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"a table for runs of 8 steps; this run has 20\."):
        sample(cached, steps=20)
    patched = cached.clone()
    patched.set_model_patch(lambda args: args, "double_block")
    with pytest.raises(Unsupported, match="with a patch that is called around the model's blocks"):
        sample(patched, steps=8)
    windowed = cached.clone()
    windowed.model_options["context_handler"] = object()
    with pytest.raises(Unsupported, match="Combining context windows"):
        sample(windowed, steps=8)
    assert cached.model.transformer.store.fetched_blocks == 0


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_sde"])
def test_a_sampler_of_several_evaluations_a_step_is_refused_before_anything_is_loaded(
    cached: Any, sampler: str
) -> None:
    with pytest.raises(Unsupported, match=rf"with the sampler {sampler} \(it takes other steps"):
        sample(cached, steps=8, sampler=sampler)
    assert cached.model.transformer.store.fetched_blocks == 0


@pytest.mark.slow
def test_the_loader_sets_it_for_our_sampler_and_comfyuis(diffusers_21: Path, models: Any) -> None:
    from qwenimage_lowvram.nodes.loader import QwenLowVRAMLoader

    models("diffusers", str(diffusers_21))
    files = {"transformer": f"{NAME_21} (folder)", "text_encoder": "from the folder", "vae": "from the folder"}
    settings = {"dtype": "fp32", "weight_format": "auto", "vram_limit_gb": 0.0, "timesteps": "fp32"}
    model, clip, _ = QwenLowVRAMLoader().load(**files, **settings, step_cache="planned_12")
    prompt = clip.encode_from_tokens_scheduled(clip.tokenize("a cat"))
    latent = {"samples": torch.zeros(1, 64, 4, 4)}
    by_ours = sample(model, positive=prompt, negative=prompt, latent_image=latent, steps=40)
    report = by_ours["ui"]["qwen_lowvram_report"][0]
    assert (report["computed_steps"], report["predicted_steps"]) == (12, 28)
    assert "not exact: 12 of 40 steps computed, the others predicted (planned_12)" in report["plan_text"]
    assert "this run is Qwen-Image-2.1, 64x64, 1 branch: nobody has measured" in report["text"]
    by_comfyuis = ksampler(model, prompt, prompt, latent, steps=40, cfg=1.0)
    assert torch.isfinite(by_comfyuis).all()
    assert model.model.last_report.predicted_steps == 28
    with pytest.raises(InvalidRequest, match="step_cache"):
        QwenLowVRAMLoader().load(**files, **settings, step_cache="planned_13")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "sampler"), [("two prompts of different length", "heun"), ("timestep ranges", "euler")]
)
def test_steps_end_behind_the_first_block_with_any_sampler(model: Any, case: str, sampler: str) -> None:
    positive, negative = CASES[case]
    exact = ksampler(model, positive, negative, empty_latent(), sampler, steps=8)
    model.model.step_cache = FirstBlockRule(0.0)
    assert torch.equal(ksampler(model, positive, negative, empty_latent(), sampler, steps=8), exact)
    model.model.step_cache = FirstBlockRule(1.2)  # of random weights each step is another
    made = ksampler(model, positive, negative, empty_latent(), sampler, steps=8)
    report = model.model.last_report
    assert report.predicted_steps > 0
    assert report.passes < 15
    assert 0 < (made - exact).abs().max() < exact.abs().max()
    assert f"not exact: {report.computed_steps} of 8 steps computed" in str(report)
