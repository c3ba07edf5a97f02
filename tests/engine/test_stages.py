"""The plan of a whole image keeps the limit in every stage, adds up its seconds, and is made from headers alone."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import full_size
import pytest
import simulated_cards
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_bytes import LiveBytes
from qwenimage_lowvram.engine.errors import DoesNotFit, InvalidRequest
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.families import QWEN_IMAGE_21
from qwenimage_lowvram.engine.models.qwen25_vl.text_encoder import TextEncoder
from qwenimage_lowvram.engine.models.qwen_image.costs import PROMPT_SIZES
from qwenimage_lowvram.engine.models.qwen_image.network import QwenImageParts
from qwenimage_lowvram.engine.models.qwen_image.prompt_template import EDIT_TEMPLATE
from qwenimage_lowvram.engine.models.qwen_image.prompts import PromptTokenizer, with_places
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.models.qwen_image_vae.image_vae import ImageVAE
from qwenimage_lowvram.engine.planning.forecast import TYPICAL, Speeds
from qwenimage_lowvram.engine.planning.memory import plan_memory
from qwenimage_lowvram.engine.planning.request import GIB, Limits
from qwenimage_lowvram.engine.planning.stages import ImageModels, ImageRequest, Stage, plan_image
from qwenimage_lowvram.engine.streaming import TensorReader
from safetensors.torch import load_file

ALIAS = Path(__file__).parents[2] / "tools" / "alias"
FP8 = torch.float8_e4m3fn
CARD = Hardware(torch.device("cpu"), streams=False, pinned=False, prefetch=False, host_device=False)
REQUEST = ImageRequest(1328, 1328, batch=1, guided=True, steps=20, prompt_tokens=60, prompts=PROMPT_SIZES)


def models_of(stored: torch.dtype) -> ImageModels:
    options = {"dtype": torch.bfloat16, "hardware": CARD}
    return ImageModels(
        TextEncoder(full_size.text_encoder_checkpoint(stored), **options).footprint,
        QwenImageParts(full_size.transformer_checkpoint(stored), **options).footprint,
        ImageVAE.without_weights(full_size.vae_checkpoint(), dtype=torch.bfloat16).footprint,
    )


@pytest.fixture(scope="module")
def models() -> dict[torch.dtype, ImageModels]:
    return {stored: models_of(stored) for stored in (torch.bfloat16, FP8)}


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(
    stored=st.sampled_from([torch.bfloat16, FP8]),
    width=st.integers(16, 160).map(lambda n: 16 * n),
    height=st.integers(16, 160).map(lambda n: 16 * n),
    batch=st.integers(1, 4),
    guided=st.booleans(),
    vram=st.integers(5, 300),
    ram=st.none() | st.integers(2, 400),
)
def test_no_stage_is_planned_above_its_limit(
    models: dict[torch.dtype, ImageModels],
    stored: torch.dtype,
    width: int,
    height: int,
    batch: int,
    guided: bool,
    vram: int,
    ram: int | None,
) -> None:
    request = ImageRequest(width, height, batch, guided, 20, 60, prompts=PROMPT_SIZES)
    limits = Limits(vram * GIB // 10, None if ram is None else ram * GIB // 10)
    try:
        plan = plan_image(models[stored], request, limits)
    except DoesNotFit:
        return
    assert [stage.stage for stage in plan.stages] == list(Stage)
    for stage in plan.stages:
        assert 0 < stage.peak_bytes <= limits.vram_bytes
        assert min(stage.weights_bytes, stage.passing_bytes, stage.activation_bytes) >= 0
        assert stage.ram_bytes > 0
    if limits.ram_bytes is not None:
        assert plan.stage(Stage.SAMPLING).ram_bytes <= limits.ram_bytes


@pytest.mark.slow
@pytest.mark.parametrize("limit_gib", [2, 7, 24])
def test_the_stages_are_those_of_the_sampling_plan(models: dict[torch.dtype, ImageModels], limit_gib: int) -> None:
    limits = Limits(limit_gib * GIB, 12 * GIB)
    plan = plan_image(models[FP8], REQUEST, limits)
    sampling = plan_memory(models[FP8].transformer, REQUEST.sampling, limits)
    assert plan.sampling == sampling
    peaks = {stage.stage: stage.peak_bytes for stage in plan.stages}
    assert peaks[Stage.SAMPLING] == sampling.sampling_peak_bytes
    assert peaks[Stage.MODULATION] == sampling.modulation_peak_bytes
    assert peaks[Stage.LOAD] == sampling.resident_bytes
    assert plan.stage(Stage.DECODE).activation_bytes == plan.tiles.peak_bytes


def test_small_limits_are_decoded_in_tiles_and_larger_ones_whole(models: dict[torch.dtype, ImageModels]) -> None:
    request = replace(REQUEST, width=2048, height=2048)
    tiles = {gib: plan_image(models[FP8], request, Limits(gib * GIB)).tiles for gib in (2, 8)}
    assert len(tiles[2]) > 1
    assert len(tiles[8]) == 1


@pytest.mark.slow
def test_blocks_leave_for_the_tiles_and_stay_where_there_is_room(models: dict[torch.dtype, ImageModels]) -> None:
    tight, roomy = (plan_image(models[FP8], REQUEST, Limits(gib * GIB)) for gib in (6, 40))
    vae = models[FP8].vae.weights_bytes
    assert roomy.stage(Stage.DECODE).weights_bytes == roomy.sampling.resident_bytes + vae
    large = replace(REQUEST, width=2560, height=2560)
    assert plan_image(models[FP8], large, Limits(6 * GIB)).tiles.peak_bytes > tight.tiles.peak_bytes
    kept = plan_image(models[FP8], large, Limits(6 * GIB)).stage(Stage.DECODE).weights_bytes - vae
    assert 0 < kept < tight.sampling.resident_bytes


def test_seconds_add_up_to_every_byte_that_is_read(models: dict[torch.dtype, ImageModels]) -> None:
    """On a disk so slow that nothing else counts."""
    slow = Speeds(flops=1e18, bus_bytes=1e15, disk_bytes=1e6)
    text, transformer = models[torch.bfloat16].text_encoder, models[torch.bfloat16].transformer
    plan = plan_image(models[torch.bfloat16], REQUEST, Limits(7 * GIB, 10 * GIB), slow)
    sampling = plan.sampling
    assert len(sampling.resident) > 0
    assert len(sampling.held) > 0
    assert sampling.from_file > 0
    read = 28 * text.stored_bytes  # once
    read += 60 * transformer.modulation_stored_bytes  # once for all steps
    read += 60 * transformer.stored_bytes  # once: resident blocks before the first step, the others in it
    read += 19 * sampling.from_file * transformer.stored_bytes
    assert plan.seconds == pytest.approx(read / 1e6, rel=1e-4)
    assert sampling.forecast.bound.value == "the disk"


def test_the_next_image_takes_what_is_not_there_any_more(models: dict[torch.dtype, ImageModels]) -> None:
    """Of a size for whose tiles resident blocks leave, on a disk so slow that nothing else counts."""
    slow = Speeds(flops=1e18, bus_bytes=1e15, disk_bytes=1e6)
    text, transformer = models[FP8].text_encoder, models[FP8].transformer
    issued = 10  # seconds of the host, for 20 steps
    large = replace(REQUEST, width=2560, height=2560)
    plan = plan_image(models[FP8], large, Limits(6 * GIB), slow)
    weights = plan.stage(Stage.DECODE).weights_bytes - models[FP8].vae.weights_bytes
    left = len(plan.sampling.resident) - (weights - transformer.outside_bytes) // transformer.resident_block_bytes
    assert 0 < left < len(plan.sampling.resident)
    assert plan.again_seconds == pytest.approx(left * transformer.stored_bytes / 1e6, abs=issued)
    encoded = 28 * text.stored_bytes / 1e6
    assert plan.prompt_seconds >= encoded + plan.again_seconds * (1 - 1e-6)
    roomy = plan_image(models[FP8], REQUEST, Limits(40 * GIB), slow)
    assert roomy.again_seconds < issued
    assert roomy.prompt_seconds == pytest.approx(encoded, abs=issued)


def test_another_prompt_makes_its_part_of_what_blocks_keep() -> None:
    """Of Qwen-Image-2.1: what they keep of an image to change stays; a slow card tells."""
    sizes = simulated_cards.models("int8_convrot", torch.bfloat16, QWEN_IMAGE_21)
    slow = Speeds(flops=1e10, bus_bytes=1e15, disk_bytes=1e15)
    request = replace(REQUEST, width=1024, height=1024, guided=False, references=1, prompts=QWEN_IMAGE_21.prompts)
    plan = plan_image(sizes, request, Limits(40 * GIB), slow)
    tokens, before = 60 + 8 + 6, 4096
    anew = 32 * 2 * tokens * (4 * 4096**2 + 3 * 4096 * 12288 + 2 * 4096 * (before + tokens)) / 1e10
    encoding = plan.stage(Stage.ENCODE).seconds
    assert encoding is not None
    assert plan.sampling.kept.remade == 0
    assert plan.prompt_seconds - plan.again_seconds - encoding == pytest.approx(anew, rel=0.01)


@pytest.mark.parametrize("size", [(1024, 1024), (1328, 1328)])
def test_decoding_an_image_is_part_of_it(models: dict[torch.dtype, ImageModels], size: tuple[int, int]) -> None:
    plan = plan_image(models[FP8], replace(REQUEST, width=size[0], height=size[1]), Limits(40 * GIB))
    flops = models[FP8].vae.decode_flops(size[1], size[0], plan.tiles.work)
    decode = plan.stage(Stage.DECODE)
    assert decode.seconds == decode.again_seconds == pytest.approx(2 * flops / TYPICAL.flops)
    assert 0.1 < decode.seconds < 5


def test_the_prompts_have_as_many_tokens_as_the_tokenizer_gives_them(comfyui_path: Path) -> None:
    tokenizer = PromptTokenizer(comfyui_path / "comfy" / "text_encoders" / "qwen25_tokenizer")
    ids = tokenizer.encode("a red circle on white paper")
    request = replace(REQUEST, prompt_tokens=6)
    assert request.encoded_tokens == (len(ids), len(ids))
    assert request.sampling.prompt_tokens == len(ids) - tokenizer.start(ids)


@pytest.mark.parametrize("shown", [1, 3])
def test_images_to_change_have_the_tokens_of_the_editing_prompt(shown: int, comfyui_path: Path) -> None:
    tokenizer = PromptTokenizer(comfyui_path / "comfy" / "text_encoders" / "qwen25_tokenizer")
    prompt = with_places("a red circle on white paper", shown, labelled=True)
    ids = tokenizer.encode(prompt, template=EDIT_TEMPLATE, images=shown)
    request = replace(REQUEST, prompt_tokens=6, references=shown)
    seen = shown * (384 // 28 + 1) ** 2 - shown  # embeddings in the place of one token each
    assert request.encoded_tokens == (len(ids) + seen, len(ids) + seen)
    assert request.sampling.prompt_tokens == len(ids) + seen - tokenizer.start(ids)
    assert request.sampling.reference_tokens == shown * (1024 // 16) ** 2


def test_headers_tell_what_the_loaded_models_take(small_pipeline: Path, cpu: Hardware) -> None:
    transformer, vae = open_checkpoint(small_pipeline / "transformer"), open_checkpoint(small_pipeline / "vae")
    loaded = QwenImageTransformer(transformer, dtype=torch.float32, hardware=cpu)
    assert QwenImageParts(transformer, dtype=torch.float32, hardware=cpu).footprint == loaded.footprint
    assert loaded.footprint.outside_bytes == sum(p.nbytes for p in loaded._outside.parameters())
    weights = load_file(next(entry.file for entry in vae.tensors.values()))
    real, planned = (
        ImageVAE.from_state_dict(weights, dtype=torch.float32),
        ImageVAE.without_weights(vae, dtype=torch.float32),
    )
    assert planned.footprint.weights_bytes == real.footprint.weights_bytes
    for limit in (None, 40_000_000):
        assert planned.plan_decode(512, 512, limit) == real.plan_decode(512, 512, limit)


def test_planning_reads_no_tensor_and_makes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [
        full_size.write_header(checkpoint, tmp_path / f"{checkpoint.path}.safetensors")
        for checkpoint in (
            full_size.text_encoder_checkpoint(FP8),
            full_size.transformer_checkpoint(FP8),
            full_size.vae_checkpoint(),
        )
    ]
    read: list[str] = []
    read_into = TensorReader.read_into

    def counted(self: TensorReader, entry: object, *arguments: object, **options: object) -> None:
        read.append(str(entry))
        read_into(self, entry, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(TensorReader, "read_into", counted)
    with LiveBytes("cpu") as live:
        text, transformer, vae = (open_checkpoint(file) for file in files)
        models = ImageModels(
            TextEncoder(text, dtype=torch.bfloat16, hardware=CARD).footprint,
            QwenImageParts(transformer, dtype=torch.bfloat16, hardware=CARD).footprint,
            ImageVAE.without_weights(vae, dtype=torch.bfloat16).footprint,
        )
        plan_image(models, REQUEST, Limits(4 * GIB))
    assert read == []
    assert live.peak < 100_000
    assert sum(file.stat().st_size for file in files) > 25e9


def test_planning_an_image_imports_no_torch() -> None:
    modules = ("planning.stages", "reports.image_report", "reports.charts")
    code = f"import sys, {', '.join(f'qwenimage_lowvram.engine.{m}' for m in modules)}; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ALIAS)}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "False", done.stderr


def test_a_plan_prints_as_one_line_and_its_json_says_the_same(models: dict[torch.dtype, ImageModels]) -> None:
    plan = plan_image(models[FP8], REQUEST, Limits(7 * GIB, 12 * GIB), TYPICAL)
    peak, ram = plan.peak_bytes / GIB, plan.ram_bytes / GIB
    assert str(plan) == (
        f"ImagePlan(1328x1328, batch 1, guided, 20 steps: peak {peak:.2f} GiB of 7.00 GiB in sampling, RAM {ram:.2f} "
        f"GiB of 12.00 GiB; {plan.sampling.forecast}, first image in {plan.seconds:.0f} s, another seed in "
        f"{plan.again_seconds:.0f} s, another prompt in {plan.prompt_seconds:.0f} s; decoded whole)"
    )
    values = json.loads(json.dumps(plan.as_dict()))
    assert values["text"] == str(plan)
    assert [stage["stage"] for stage in values["stages"]] == ["encode", "load", "modulation", "sampling", "decode"]
    assert max(stage["peak_bytes"] for stage in values["stages"]) == plan.peak_bytes
    assert values["limits"] == {"vram_bytes": 7 * GIB, "ram_bytes": 12 * GIB}
    assert values["resident_blocks"] + values["held_blocks"] + values["blocks_from_file"] == 60
    assert len(str(plan)) < 300


def test_a_request_for_nothing_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="1 or more"):
        replace(REQUEST, steps=0)
