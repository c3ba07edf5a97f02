"""Schedules, sizes and names of Qwen-Image-2.1: numbers alone."""

import json
from pathlib import Path

import pytest
import torch
from qwenimage_lowvram.engine.errors import InvalidRequest
from qwenimage_lowvram.engine.files.checkpoint import Checkpoint
from qwenimage_lowvram.engine.models.qwen_image_21.schedule import TURBO_SIGMAS, guided, sigmas_21, turbo_sigmas
from qwenimage_lowvram.engine.models.qwen_image_21.sizes import LARGEST, PIXELS, by_area, plan_sizes_21
from qwenimage_lowvram.engine.models.qwen_image_21.variants import Variant21, variant_of


def test_the_schedule_shifts_with_the_size_and_ends_at_its_terminal_sigma() -> None:
    small, large = sigmas_21(40, 1024), sigmas_21(40, 16384)
    assert small[0] == large[0] == 1
    assert small[-2].item() == pytest.approx(0.02)
    assert len(small) == 41
    assert all(large[1:-2] > small[1:-2])


def test_turbo_takes_its_own_eight_steps() -> None:
    assert turbo_sigmas().tolist() == torch.tensor([*TURBO_SIGMAS, 0.0]).tolist()
    assert turbo_sigmas(denoise=0.5).tolist() == torch.tensor([*TURBO_SIGMAS[4:], 0.0]).tolist()
    assert len(turbo_sigmas(denoise=0.01)) == 2


@pytest.mark.parametrize("denoise", [0.0, -1.0, 1.5, float("nan")])
def test_turbo_refuses_a_denoise_that_is_none(denoise: float) -> None:
    with pytest.raises(InvalidRequest) as refused:
        turbo_sigmas(denoise=denoise)
    assert refused.value.code == "sampling_21.wrong_denoise"


def test_guidance_keeps_no_norm() -> None:
    cond, uncond = torch.full((1, 64, 2, 2), 2.0), torch.ones(1, 64, 2, 2)
    assert torch.equal(guided(cond, uncond, 3.0), torch.full((1, 64, 2, 2), 4.0))


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("qwen_image_2.1_bf16.safetensors", Variant21.BASE),
        ("qwen_image_2.1_turbo_int8_convrot.safetensors", Variant21.TURBO),
        ("Qwen-Image-2.1-Turbo-Q4_K_M.gguf", Variant21.TURBO),
        ("Turbo/diffusion_pytorch_model.safetensors", Variant21.TURBO),
        ("turbocharged.safetensors", Variant21.BASE),
    ],
)
def test_turbo_is_found_by_its_name(name: str, variant: Variant21) -> None:
    checkpoint = Checkpoint(Path("models") / name, {}, {}, None, "")
    assert variant_of(checkpoint) is variant
    assert variant_of(checkpoint, Variant21.BASE) is Variant21.BASE
    assert variant.is_turbo == (variant is Variant21.TURBO)


def test_turbo_is_found_by_the_sigmas_of_its_pipeline(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps({"sample_sigmas": list(TURBO_SIGMAS)}))
    assert variant_of(Checkpoint(tmp_path / "transformer", {}, {}, None, "")) is Variant21.TURBO


def test_the_output_has_the_first_images_grid() -> None:
    sizes = plan_sizes_21([(1920, 1080), (600, 900)])
    assert sizes.references == ((1376, 768), (832, 1248))
    assert sizes.output == sizes.references[0]
    assert sizes.one_grid
    assert not plan_sizes_21([(1920, 1080)], output=(1024, 1024)).one_grid
    assert plan_sizes_21([]).output == (1024, 1024)


def test_square_edits_are_beside_the_grid_that_makes_near_copies() -> None:
    default = plan_sizes_21([(640, 640), (1024, 1024), (1920, 1080)])
    assert default.references == ((1056, 1056), (1056, 1056), (1376, 768))
    assert (default.output, default.aside, default.one_grid) == ((1056, 1056), True, True)
    # text alone, other shapes, and whoever asks for another area or that very size, get what they ask for
    for asked in (
        plan_sizes_21([]),
        plan_sizes_21([(640, 640)], pixels=0.98 * PIXELS),
        plan_sizes_21([(640, 640)], output=(1024, 1024)),
        plan_sizes_21([(1024, 1024)], pixels=1.01 * PIXELS),
    ):
        assert (asked.output, asked.aside, asked.one_grid) == ((1024, 1024), False, True)
    wide = plan_sizes_21([(1920, 1080), (640, 640)])
    assert (wide.references, wide.aside) == (((1376, 768), (1024, 1024)), False)


@pytest.mark.parametrize("size", LARGEST)
def test_the_largest_sizes_are_on_the_grid(size: tuple[int, int]) -> None:
    assert plan_sizes_21([], output=size).output == size
    assert by_area(size, size[0] * size[1]) == size


@pytest.mark.parametrize(
    ("images", "output", "code"),
    [
        ([(64, 64)] * 13, None, "edit_21.too_many_images"),
        ([(64, 8)], None, "edit_21.wrong_image"),
        ([(6400, 32)], None, "edit_21.wrong_image"),
        ([], (1000, 1024), "edit_21.wrong_output"),
    ],
)
def test_what_cannot_be_shown_or_made_is_refused(
    images: list[tuple[int, int]], output: tuple[int, int] | None, code: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        plan_sizes_21(images, output=output)
    assert refused.value.code == code
