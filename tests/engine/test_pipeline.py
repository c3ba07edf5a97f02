"""A whole image without ComfyUI: that of diffusers' pipeline, within limits that are kept."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImagePipeline
from qwenimage_lowvram.engine.errors import DoesNotFit, InvalidRequest
from qwenimage_lowvram.engine.lora.lora_file import match_model, open_lora
from qwenimage_lowvram.engine.lora.weight_patches import lora_patches
from qwenimage_lowvram.engine.models.qwen_image.positions import Positions
from qwenimage_lowvram.engine.planning.draft import least_bytes
from qwenimage_lowvram.engine.planning.stages import Stage
from qwenimage_lowvram.engine.runs.opened_files import OpenedFiles
from qwenimage_lowvram.engine.runs.pipeline import Pipeline
from safetensors.torch import save_file
from split_files import write_split_files

PROMPT, NEGATIVE = 'a sign that says "红色"', "blurry"
STEPS = 4
MIB = 1024**2


def opened(folder: Path, **settings: Any) -> Pipeline:
    return Pipeline.open(folder, device="cpu", positions=Positions.DIFFUSERS, **settings)


def image(pipeline: Pipeline, width: int = 112, height: int = 80, **settings: Any) -> torch.Tensor:
    return pipeline.make(PROMPT, NEGATIVE, width=width, height=height, seed=5, steps=STEPS, **settings)


@pytest.mark.parametrize(("width", "height"), [(112, 80), (64, 64)])
@pytest.mark.parametrize("cfg", [4.0, 1.0])
def test_the_image_is_that_of_diffusers(small_pipeline: Path, width: int, height: int, cfg: float) -> None:
    reference = QwenImagePipeline.from_pretrained(small_pipeline)
    reference.set_progress_bar_config(disable=True)
    expected = reference(
        PROMPT,
        negative_prompt=NEGATIVE if cfg > 1 else None,
        true_cfg_scale=cfg,
        width=width,
        height=height,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(5),
        max_sequence_length=1024,
        output_type="pt",
    ).images
    with opened(small_pipeline) as pipeline:
        ours = image(pipeline, width, height, cfg=cfg)
    assert ours.shape == (1, height, width, 3)
    assert (ours - expected.float().permute(0, 2, 3, 1)).abs().max() < 1e-4


def test_limits_change_where_weights_lie_and_not_the_latents(small_pipeline: Path) -> None:
    size = {"width": 112, "height": 80, "seed": 1, "steps": STEPS}
    with opened(small_pipeline) as roomy:
        prompts = roomy.encode([PROMPT, NEGATIVE])
        expected = roomy.sample(prompts, **size)
        plan, footprint = roomy.report.sampling.plan, roomy._transformer.footprint
    limit = least_bytes(footprint, plan.request) + 2 * footprint.resident_block_bytes
    with opened(small_pipeline, vram_limit_bytes=limit) as tight:
        assert torch.equal(tight.sample(prompts, **size), expected)
        fewer = tight.report.sampling.plan
        assert 0 < len(fewer.resident) < len(plan.resident)
        assert fewer.peak_bytes <= limit
        assert tight._transformer.loaded_bytes == fewer.resident_bytes
    assert tight._transformer.loaded_bytes == tight._transformer.store.held_bytes == 0


def test_an_image_by_products_in_fp16_is_nearly_that_of_fp32(small_pipeline: Path) -> None:
    with opened(small_pipeline) as pipeline:
        expected = image(pipeline)
    with opened(small_pipeline, dtype=torch.float16) as pipeline:
        assert (image(pipeline) - expected).abs().max() < 0.02
        assert "products in fp16 between activations in fp32" in str(pipeline.report.sampling.plan)


def test_loras_are_those_of_the_files_in_their_order(small_pipeline: Path, tmp_path: Path) -> None:
    weight = "transformer_blocks.1.attn.to_q"
    for name in ("first", "second"):
        generator = torch.Generator().manual_seed(len(name))
        up, down = torch.randn(64, 4, generator=generator), torch.randn(4, 64, generator=generator)
        tensors = {f"{weight}.lora_B.weight": up, f"{weight}.lora_A.weight": down}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    loras = [(tmp_path / "first.safetensors", 0.5), (tmp_path / "second.safetensors", -0.25)]
    size = {"width": 64, "height": 64, "seed": 1, "steps": 2}
    with opened(small_pipeline, loras=loras) as pipeline:
        latents = pipeline.sample(pipeline.encode([PROMPT]), **size, cfg=1.0)
    with opened(small_pipeline) as plain:
        prompts = plain.encode([PROMPT])
        without = plain.sample(prompts, **size, cfg=1.0)
        matched = [(match_model(open_lora(file), plain._transformer), strength) for file, strength in loras]
        plain._transformer.patch(lora_patches(matched))
        assert torch.equal(plain.sample(prompts, **size, cfg=1.0), latents)
    assert (latents - without).norm() > 0.01 * without.norm()


def test_int8_weights_are_computed_with_as_stored_where_that_is_asked_for(small_pipeline: Path, tmp_path: Path) -> None:
    files = write_split_files(small_pipeline, tmp_path, dtype="int8_convrot", text_dtype="bf16")
    transformer = tmp_path / "diffusion_models" / files.transformer
    others = (small_pipeline / name for name in ("text_encoder", "vae", "tokenizer"))
    opened_files = OpenedFiles.of(transformer, *others)
    size = {"width": 64, "height": 64, "seed": 1, "steps": 2, "cfg": 1.0}
    latents = {}
    for compute in ("exact", "auto", "fast"):
        with Pipeline(opened_files, device="cpu", compute=compute) as pipeline:
            latents[compute] = pipeline.sample(pipeline.encode([PROMPT]), **size)
            assert ("int8 by comfy-kitchen" in str(pipeline.report.sampling.plan)) == (compute == "fast")
    assert torch.equal(latents["exact"], latents["auto"])  # on a CPU
    error = (latents["fast"] - latents["exact"]).norm() / latents["exact"].norm()
    assert 0 < error < 0.05
    with pytest.raises(InvalidRequest, match="compute is 'quick'"):
        Pipeline(opened_files, device="cpu", compute="quick")


def test_compiled_blocks_make_the_same_image_and_the_report_says_so(
    small_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._dynamo

    find = torch._dynamo.lookup_backend
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: find("aot_eager"))  # inductor's needs a compiler
    with opened(small_pipeline) as plain, opened(small_pipeline, compile=True) as compiled:
        assert torch.equal(image(compiled), image(plain))
        reports = [pipeline.report.sampling for pipeline in (plain, compiled)]
    assert [report is not None and report.plan.compiled for report in reports] == ["", "exact"]


def test_an_image_that_could_not_be_decoded_is_refused_before_it_is_sampled(small_pipeline: Path) -> None:
    pipeline = opened(small_pipeline, vram_limit_bytes=2 * MIB)
    with pytest.raises(DoesNotFit, match=r"(?s)VAE decode of 1600x1600 needs .*The limit is vram_limit_bytes\.$"):
        image(pipeline, 1600, 1600)
    assert pipeline._encoder.fetched_bytes == 0


def test_what_does_not_fit_is_refused_by_the_limits_name(small_pipeline: Path) -> None:
    with opened(small_pipeline, vram_limit_bytes=300_000) as pipeline:
        prompts = [torch.zeros(1, 5, 64)] * 2
        with pytest.raises(DoesNotFit, match=r"(?s)Sampling needs .*The limit is vram_limit_bytes\.$"):
            pipeline.sample(prompts, width=112, height=80, seed=1)
        assert pipeline._transformer.store.fetched_blocks == 0
    with (
        opened(small_pipeline, vram_limit_bytes=2 * MIB, ram_limit_bytes=300_000) as pipeline,
        pytest.raises(DoesNotFit, match=r"The limit is ram_limit_bytes\.$"),
    ):
        pipeline.sample(prompts, width=112, height=80, seed=1)


def test_each_image_has_its_own_report_of_every_stage(small_pipeline: Path) -> None:
    with opened(small_pipeline) as pipeline:
        image(pipeline)
        assert [report.stage for report in pipeline.report.stages] == list(Stage)
        assert all(report.plan is not None for report in pipeline.report.stages)
        first = pipeline.report
        image(pipeline)
        second = {report.stage: report for report in pipeline.report.stages}
    assert Stage.MODULATION not in second  # its table is known
    assert second[Stage.LOAD].moved.file_bytes == 0  # resident blocks are still there
    assert "modulation" in str(first)
    assert first.sampling.passes == STEPS


def test_prompts_and_speeds_are_kept_where_a_folder_is_given(small_pipeline: Path, tmp_path: Path) -> None:
    expected = image(opened(small_pipeline, cache=tmp_path))
    assert (tmp_path / "speeds.json").exists()
    again = opened(small_pipeline, cache=tmp_path)
    assert torch.equal(image(again), expected)
    assert Stage.ENCODE not in {report.stage for report in again.report.stages}


def test_progress_is_told_and_a_check_ends_the_run(small_pipeline: Path) -> None:
    told: list[Mapping[str, Any]] = []

    def check() -> None:
        if any(progress.get("step") == 2 for progress in told):
            raise KeyboardInterrupt

    pipeline = opened(small_pipeline, on_progress=told.append, check=check)
    pipeline.sample(pipeline.encode([PROMPT]), width=64, height=64, seed=1, steps=1, cfg=1.0)
    stages = list(dict.fromkeys(progress["stage"] for progress in told))
    assert (stages[0], stages[-1]) == ("encoding", "done")
    assert "Memory plan for 64x64" in told[-1]["plan"]
    told.append({"step": 2})
    with pytest.raises(KeyboardInterrupt):
        image(pipeline)


@pytest.mark.parametrize(
    ("width", "height", "batch", "count", "cfg"),
    [(100, 64, 1, 2, 4.0), (64, 0, 1, 2, 4.0), (64, 64, 0, 2, 4.0), (64, 64, 1, 1, 4.0), (64, 64, 1, 2, 1.0)],
)
def test_what_is_no_request_is_refused(
    small_pipeline: Path, width: int, height: int, batch: int, count: int, cfg: float
) -> None:
    pipeline = opened(small_pipeline)
    with pytest.raises(InvalidRequest):
        pipeline.sample([torch.zeros(1, 5, 64)] * count, width=width, height=height, batch=batch, seed=1, cfg=cfg)
    assert pipeline._transformer.store.fetched_blocks == 0


def test_models_that_begin_with_an_image_are_refused(layered_pipeline: Path) -> None:
    with pytest.raises(InvalidRequest, match="Qwen-Image-Layered, which takes images apart"):
        Pipeline.open(layered_pipeline)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dtype": "fp32"}, "dtype is 'fp32'; torch.bfloat16"),
        ({"dtype": torch.float64}, "dtype is 'torch.float64'"),
        ({"attention": "sage2"}, "attention is 'sage2'; it must be one of auto, pytorch"),
    ],
)
def test_settings_that_are_none_are_refused(small_pipeline: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        opened(small_pipeline, **settings)


def test_a_batch_is_its_images(small_pipeline: Path) -> None:
    pipeline = opened(small_pipeline)
    both = image(pipeline, 64, 64, batch=2)
    assert both.shape == (2, 64, 64, 3)
    assert torch.equal(both[:1], image(pipeline, 64, 64))
