"""Our MODEL under ComfyUI's own samplers: one visit per step, the same numbers, nothing silently ignored."""

import logging
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.errors import DoesNotFit, InvalidRequest, Unsupported
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.planning.draft import least_bytes
from qwenimage_lowvram.engine.planning.request import SamplingRequest

from .conftest import cond, embeds, empty_latent

STEPS = 4


def ksampler(model: Any, positive: Any, negative: Any, latent: Any, sampler: str = "euler", **options: Any) -> Any:
    import nodes

    settings = {"seed": 42, "steps": STEPS, "cfg": 3.0, "scheduler": "simple", "denoise": 1.0} | options
    result = nodes.common_ksampler(
        model,
        settings.pop("seed"),
        settings.pop("steps"),
        settings.pop("cfg"),
        sampler,
        settings.pop("scheduler"),
        positive,
        negative,
        latent,
        **settings,
    )
    return result[0]["samples"]


def one_by_one(model: Any) -> Any:
    """The same model with a foreign wrapper that changes nothing, so that calls are not recorded."""
    clone = model.clone()
    clone.set_model_unet_function_wrapper(lambda apply, args: apply(args["input"], args["timestep"], **args["c"]))
    return clone


def references(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    return [torch.randn(1, 16, 1, h, w, generator=torch.Generator().manual_seed(h)) for h, w in sizes]


CASES = {
    "two prompts of different length": (cond(9), cond(5, 2)),
    "two positive prompts with strength": (cond(9) + cond(7, 3, strength=0.5), cond(5, 2)),
    "an area": (cond(9) + cond(7, 3, area=(4, 6, 0, 2)), cond(5, 2)),
    "a reference latent": (cond(9, reference_latents=references((6, 8))), cond(5, 2)),
    "timestep ranges": (
        cond(9, start_percent=0.3, end_percent=1.0) + cond(7, 3, start_percent=0.0, end_percent=0.3),
        cond(5, 2),
    ),
    "a masked prompt": (cond(9, attention_mask=torch.tensor([[1] * 6 + [0] * 3])), cond(5, 2)),
}


@pytest.mark.parametrize(
    ("case", "sampler"),
    [
        *((case, "euler") for case in CASES),
        *(("two prompts of different length", sampler) for sampler in ("dpmpp_2m", "heun", "dpmpp_sde")),
    ],
)
def test_calls_together_equal_calls_one_by_one(model: Any, case: str, sampler: str) -> None:
    positive, negative = CASES[case]
    together = ksampler(model, positive, negative, empty_latent(), sampler)
    assert model.model.last_report.one_by_one == ""
    alone = ksampler(one_by_one(model), positive, negative, empty_latent(), sampler)
    assert "wrapper" in model.model.last_report.one_by_one
    assert torch.equal(together, alone)


def test_steps_at_which_no_prompt_is_active_run_no_block(model: Any) -> None:
    first, last = cond(9, end_percent=0.2), cond(7, 3, start_percent=0.8)
    for positive in (last, first + last):
        together, alone = (
            ksampler(asked, positive, cond(5, 2), empty_latent(), steps=6, cfg=1.0)
            for asked in (model, one_by_one(model))
        )
        assert torch.equal(together, alone)
    ksampler(model, first + last, cond(5, 2), empty_latent(), steps=6, cfg=1.0)
    assert 0 < model.model.last_report.passes < 6


@pytest.mark.parametrize(("batch", "negative"), [(1, True), (1, False), (3, True)])
def test_each_block_is_fetched_once_per_step(
    model: Any, transformer: QwenImageTransformer, batch: int, negative: bool
) -> None:
    model.model.limit_bytes = least_bytes(transformer.footprint, SamplingRequest(96, 64, 6, 9))
    ksampler(model, cond(), cond(5, 2), empty_latent(batch=batch), cfg=3.0 if negative else 1.0)
    report = model.model.last_report
    assert len(report.plan.resident) < transformer.config.num_layers
    assert report.passes == STEPS
    assert report.fetched_blocks == STEPS * report.plan.streamed + len(report.plan.resident)


def test_a_batch_equals_its_images_alone(model: Any) -> None:
    latents = {"samples": torch.randn(2, 16, 1, 8, 12, generator=torch.Generator().manual_seed(3))}
    both = ksampler(model, cond(), cond(5, 2), latents, denoise=0.6, disable_noise=True)
    for i in range(2):
        alone = {"samples": latents["samples"][i : i + 1]}
        assert torch.equal(both[i : i + 1], ksampler(model, cond(), cond(5, 2), alone, denoise=0.6, disable_noise=True))


@pytest.mark.parametrize("limit", ["least", "half", "all"])
def test_every_plan_makes_the_same_image(model: Any, transformer: QwenImageTransformer, limit: str) -> None:
    expected = ksampler(model, cond(), cond(5, 2), empty_latent())
    least = least_bytes(transformer.footprint, SamplingRequest(96, 64, 2, 9))
    block = transformer.footprint.slot_bytes
    model.model.limit_bytes = {"least": least, "half": least + 2 * block, "all": None}[limit]
    assert torch.equal(ksampler(model, cond(), cond(5, 2), empty_latent()), expected)
    resident = len(model.model.last_report.plan.resident)
    assert (resident == 0) == (limit == "least")
    assert (resident == transformer.config.num_layers) == (limit == "all")


def test_another_seed_reads_no_modulation_and_no_resident_block(model: Any) -> None:
    ksampler(model, cond(), cond(5, 2), empty_latent(), seed=1)
    assert model.model.last_report.modulation_bytes > 0
    ksampler(model, cond(), cond(5, 2), empty_latent(), seed=2)
    assert model.model.last_report.modulation_bytes == 0
    assert model.model.last_report.fetched_bytes == 0


def test_timesteps_that_nobody_announced_are_computed_when_asked_for(model: Any) -> None:
    inner = ksampler(model, cond(), cond(5, 2), empty_latent(), "dpm_2")
    assert torch.equal(inner, ksampler(one_by_one(model), cond(), cond(5, 2), empty_latent(), "dpm_2"))


def test_a_clone_shares_the_weights_and_keeps_the_wrappers(model: Any) -> None:
    clone = model.clone()
    assert clone.model is model.model
    ksampler(clone, cond(), cond(5, 2), empty_latent())
    assert clone.model.last_report.one_by_one == ""


def test_a_patched_model_sampling_is_used_and_undone(model: Any) -> None:
    from comfy_extras.nodes_model_advanced import ModelSamplingAuraFlow

    plain = ksampler(model, cond(), cond(5, 2), empty_latent())
    shifted = ModelSamplingAuraFlow().patch_aura(model, 3.1)[0]
    assert not torch.equal(plain, ksampler(shifted, cond(), cond(5, 2), empty_latent()))
    assert torch.equal(plain, ksampler(model, cond(), cond(5, 2), empty_latent()))


@pytest.mark.parametrize(("scheduler", "said"), [("qwen_image", True), ("simple", False)])
def test_a_shift_that_the_schedule_leaves_out_is_said(
    scheduler: str, said: bool, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from comfy_extras.nodes_model_advanced import ModelSamplingAuraFlow
    from qwenimage_lowvram.nodes.sample import QwenLowVRAMSample

    shifted = ModelSamplingAuraFlow().patch_aura(model, 3.1)[0]
    with caplog.at_level(logging.WARNING):
        QwenLowVRAMSample().sample(
            shifted, cond(), cond(5, 2), empty_latent(), 5, 1, 1.0, "euler", scheduler, 1.0, False
        )
    assert ("A node sets the shift of the schedule" in caplog.text) == said


def test_nothing_is_held_by_modules_that_comfyui_could_move(model: Any) -> None:
    left = [model.model]
    while left:  # by torch's own books: walking through the modules is refused
        module = left.pop()
        assert not module._parameters
        left += module._modules.values()


# what is refused, and in which words


def test_an_odd_reference_is_wrapped_round_with_a_warning(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    (odd,) = references((7, 9))
    whole = torch.cat([torch.cat([odd, odd[..., :1]], dim=4)] * 2, dim=3)[..., :8, :]
    with caplog.at_level(logging.WARNING):
        made = ksampler(model, cond(reference_latents=[odd]), cond(5, 2), empty_latent())
    assert "A reference image of 72x56 px is not a multiple of 16" in caplog.text
    caplog.clear()
    expected = ksampler(model, cond(reference_latents=[whole]), cond(5, 2), empty_latent())
    assert "not a multiple" not in caplog.text
    assert torch.equal(made, expected)


def test_a_limit_that_nothing_fits_in_is_refused_before_loading(model: Any, transformer: QwenImageTransformer) -> None:
    model.model.limit_bytes = 100_000
    with pytest.raises(DoesNotFit, match=r"needs at least .*, but the limit is .*\nUse .*VRAM limit of"):
        ksampler(model, cond(), cond(5, 2), empty_latent())
    assert transformer.store.fetched_blocks == 0


def _control(model: Any) -> tuple[Any, Any]:
    class Control:
        def get_extra_hooks(self) -> list[Any]:
            return []

        extra_hooks = None
        previous_controlnet = None

        def get_models(self) -> list[Any]:
            return []

        def inference_memory_requirements(self, dtype: Any) -> int:
            return 0

    return model, cond(control=Control())


def _attention_patch(model: Any) -> tuple[Any, Any]:
    clone = model.clone()
    clone.set_model_attn1_patch(lambda *args, **kwargs: {})
    return clone, cond()


def _input_patch(model: Any) -> tuple[Any, Any]:
    clone = model.clone()
    clone.set_model_post_input_patch(lambda args: args)
    return clone, cond()


def _attention_replacement(model: Any) -> tuple[Any, Any]:
    clone = model.clone()
    clone.set_model_patch_replace(lambda args, extra: args, "attn1", "double_block", 0)
    return clone, cond()


def _weight_hook(model: Any) -> tuple[Any, Any]:
    import comfy.hooks

    group = comfy.hooks.create_hook_lora({"nothing.lora_up.weight": torch.zeros(1, 1)}, 1.0, 1.0)
    return model, cond(hooks=group)


def _float_mask(model: Any) -> tuple[Any, Any]:
    return model, cond(attention_mask=torch.full((1, 9), 0.5))


def _reference_method(model: Any) -> tuple[Any, Any]:
    return model, cond(reference_latents=references((6, 8)), reference_latents_method="index_timestep_zero")


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (_control, "ControlNet"),
        (_attention_patch, "model patch .'attn1_patch'"),
        (_input_patch, "model patch .'post_input'"),
        (_attention_replacement, "replaces 'attn1' at"),
        (_weight_hook, "hook"),
        (_float_mask, "attention mask"),
        (_reference_method, "Qwen-Image-Edit-2511's reference method 'index_timestep_zero' with another model"),
    ],
)
def test_what_is_not_supported_is_named(model: Any, prepare: Any, words: str) -> None:
    patched, positive = prepare(model)
    with pytest.raises(Unsupported, match=words):
        ksampler(patched, positive, cond(5, 2), empty_latent())


@pytest.mark.parametrize(
    "ask",
    [
        lambda model: model.get_key_patches("diffusion_model."),
        lambda model: model.set_model_compute_dtype(torch.float32),
        lambda model: model.add_weight_wrapper("img_in.weight", lambda weight: weight),
        lambda model: model.state_dict_for_saving(),
    ],
)
def test_changing_or_saving_weights_is_refused(model: Any, ask: Any) -> None:
    with pytest.raises(Unsupported, match="What to do"):
        ask(model)


@pytest.mark.parametrize("key", ["counter", "easycache"])  # the second one by a name that is not its own
def test_a_foreign_wrapper_is_named_in_the_report(model: Any, key: str) -> None:
    from comfy.patcher_extension import WrappersMP

    watched = model.clone()
    watched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, key, lambda run, *args, **kwargs: run(*args, **kwargs))
    out = ksampler(watched, cond(), cond(5, 2), empty_latent(), steps=2)
    assert key in model.model.last_report.one_by_one
    assert torch.isfinite(out).all()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["two prompts of different length", "two prompts of one length"])
def test_easycache_skips_the_same_steps_in_calls_together_as_one_by_one(case: str, model: Any) -> None:
    from comfy_extras.nodes_easycache import EasyCacheNode

    conds = {"two prompts of different length": (cond(), cond(5, 2)), "two prompts of one length": (cond(), cond())}[
        case
    ]
    made, passes = [], []
    for watched in (model, one_by_one(model)):
        cached = EasyCacheNode.execute(watched, 3.0, 0.0, 1.0, False)[0]
        made.append(ksampler(cached, *conds, empty_latent(), steps=8))
        passes.append(model.model.last_report.passes)
    assert torch.equal(*made)
    assert passes[0] < 8
    assert not torch.equal(made[0], ksampler(model, *conds, empty_latent(), steps=8))


# interruption and books


def test_an_interruption_ends_the_run_at_the_next_block_and_frees_what_it_held(
    model: Any, transformer: QwenImageTransformer
) -> None:
    import comfy.model_management as management

    model.model.limit_bytes = least_bytes(transformer.footprint, SamplingRequest(96, 64, 2, 9))
    visited = 0
    check = management.throw_exception_if_processing_interrupted

    def interrupt_at_the_tenth_block() -> None:
        nonlocal visited
        visited += 1
        if visited == 10:
            management.interrupt_current_processing()
        check()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(management, "throw_exception_if_processing_interrupted", interrupt_at_the_tenth_block)
        with pytest.raises(management.InterruptProcessingException):
            ksampler(model, cond(), cond(5, 2), empty_latent())
    assert visited == 10
    assert model.model.calls.run is None
    assert transformer.store.resident_bytes == 0
    again = ksampler(model, cond(), cond(5, 2), empty_latent())
    model.model.limit_bytes = None
    assert torch.equal(again, ksampler(model, cond(), cond(5, 2), empty_latent()))


def test_comfyui_sees_the_model_asks_it_to_leave_and_gets_it_back(
    model: Any, transformer: QwenImageTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as management

    monkeypatch.setattr(model, "load_device", torch.device("meta"))  # a card that ComfyUI keeps books of
    monkeypatch.setattr(management, "get_all_torch_devices", lambda *args: [torch.device("meta")])
    monkeypatch.setattr(
        management, "get_free_memory", lambda *args, torch_free_too=False: (8 << 30, 0) if torch_free_too else 8 << 30
    )
    monkeypatch.setattr(management, "soft_empty_cache", lambda *args: None)

    def loaded() -> list[int]:
        return [entry.model_loaded_memory() for entry in management.current_loaded_models if entry.model is model]

    management.load_models_gpu([model], memory_required=1)
    assert loaded() == [transformer.footprint.outside_bytes]
    management.load_models_gpu([model], memory_required=1)
    assert len(loaded()) == 1
    management.unload_all_models()
    assert loaded() == []
    assert transformer.loaded_bytes == 0
    management.load_models_gpu([model], memory_required=1)
    assert loaded() == [transformer.footprint.outside_bytes]


def test_resident_blocks_are_given_back_one_by_one_when_memory_is_asked_for(
    model: Any, transformer: QwenImageTransformer
) -> None:
    ksampler(model, cond(), cond(5, 2), empty_latent())
    before = model.loaded_size()
    freed = model.partially_unload(torch.device("cpu"), 1)
    assert freed == transformer.footprint.resident_block_bytes
    assert model.loaded_size() == before - freed
    assert len(transformer.store.resident) == transformer.config.num_layers - 1


def test_embeddings_of_another_model_are_refused(model: Any) -> None:
    with pytest.raises(InvalidRequest, match="64"):
        ksampler(model, [[torch.zeros(1, 5, 48), {}]], [[embeds(5, 1), {}]], empty_latent())


def test_decoding_stays_within_the_limit_beside_resident_blocks(
    model: Any, transformer: QwenImageTransformer, small_pipeline: Any
) -> None:
    from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
    from qwenimage_lowvram.nodes.adapters.vae import make_vae

    ksampler(model, cond(), cond(5, 2), empty_latent())
    held = model.loaded_size()
    assert held > transformer.footprint.outside_bytes
    vae = make_vae(open_checkpoint(small_pipeline / "vae"), dtype=torch.float32, limit_bytes=None)
    free = vae.decode(empty_latent()["samples"])
    image_bytes = 96 * 64 * 3 * 4
    least = vae.first_stage_model.plan_decode(64, 96).peak_bytes + 2 * image_bytes
    vae.limit_bytes = vae.size + least + transformer.footprint.outside_bytes
    assert torch.equal(vae.decode(empty_latent()["samples"]), free)
    assert model.loaded_size() < held
    assert model.loaded_size() + vae.size + least <= vae.limit_bytes
    again = ksampler(model, cond(), cond(5, 2), empty_latent())
    assert torch.equal(again, ksampler(model, cond(), cond(5, 2), empty_latent()))
