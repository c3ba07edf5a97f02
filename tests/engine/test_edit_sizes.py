"""Pixel grid in, pixel grid out, offset 0: what is shown and what is made lie on one grid, for every size."""

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import CONDITION_IMAGE_SIZE, calculate_dimensions
from hypothesis import given, settings
from hypothesis import strategies as st
from qwenimage_lowvram.engine.errors import InvalidRequest
from qwenimage_lowvram.engine.models.qwen25_vl.vision_patches import LEAST_PIXELS, MOST_PIXELS, patch_image
from qwenimage_lowvram.engine.models.qwen_image.edit_sizes import EditSizes, ImageSizes, plan_sizes
from qwenimage_lowvram.engine.models.qwen_image.resample import resample
from qwenimage_lowvram.engine.models.qwen_image.variants import Variant
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

EDIT, PLUS = Variant.EDIT, Variant.EDIT_2509
SIDES = st.integers(16, 6000)
# as wide as high, to four times as wide, and the other way round
IMAGES = st.tuples(SIDES, SIDES).filter(lambda size: max(size) <= 4 * min(size))
MEGAPIXELS = st.sampled_from([0.0, 0.25, 1.0, 2.0])


@pytest.mark.slow
@settings(max_examples=400, deadline=None, derandomize=True)
@given(shown=st.lists(IMAGES, min_size=1, max_size=3), megapixels=MEGAPIXELS)
def test_the_output_lies_on_the_grid_of_the_first_image(shown: list[tuple[int, int]], megapixels: float) -> None:
    sizes = plan_sizes(shown, PLUS, megapixels=megapixels)
    assert sizes.one_grid
    assert sizes.output == sizes.images[0].reference
    step = 32 if megapixels else 16
    for image, size in zip(sizes.images, shown, strict=True):
        assert image.given == size
        for side, given_side in zip(image.reference, size, strict=True):
            assert side % step == 0
            assert megapixels or abs(side - given_side) <= 8 or side == 16
        assert abs(image.stretch) < (0.07 if megapixels >= 1 else 0.7)


@pytest.mark.slow
@settings(max_examples=400, deadline=None, derandomize=True)
@given(size=IMAGES, megapixels=MEGAPIXELS)
def test_an_edited_image_is_edited_again_without_being_resampled(size: tuple[int, int], megapixels: float) -> None:
    once = plan_sizes([size], PLUS, megapixels=megapixels)
    again = plan_sizes([once.output], PLUS, megapixels=megapixels)
    assert again.output == once.output == again.images[0].given


@pytest.mark.slow
@settings(max_examples=400, deadline=None, derandomize=True)
@given(size=IMAGES)
def test_sizes_are_those_of_the_reference_pipeline(size: tuple[int, int]) -> None:
    sizes = plan_sizes([size], PLUS).images[0]
    wanted = calculate_dimensions(1024 * 1024, size[0] / size[1])
    kept = size[0] % 32 == size[1] % 32 == 0 and abs(size[0] * size[1] / 1024**2 - 1) <= 0.1
    assert sizes.reference == (size if kept else wanted)
    width, height = calculate_dimensions(CONDITION_IMAGE_SIZE, size[0] / size[1])
    assert sizes.seen[::-1] == smart_resize(height, width, 28, LEAST_PIXELS, MOST_PIXELS)


def test_the_first_edit_model_sees_its_image_at_a_megapixel() -> None:
    assert plan_sizes([(1000, 700)], EDIT).images[0].seen == (1204, 868)
    assert plan_sizes([(1000, 700)], PLUS).images[0].seen == (448, 308)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(size=st.tuples(st.integers(16, 500), st.integers(16, 500)), seen=st.sampled_from([384 * 384, 1024 * 1024]))
def test_what_the_tower_is_shown_needs_no_second_resampling(size: tuple[int, int], seen: int) -> None:
    variant = EDIT if seen > 400_000 else PLUS
    width, height = plan_sizes([size], variant).images[0].seen
    patched = patch_image(torch.rand(1, height, width, 3))
    assert (patched.width * 14, patched.height * 14) == (width, height)


# an output of its own size


def test_an_output_of_the_images_shape_takes_the_image_onto_its_grid() -> None:
    sizes = plan_sizes([(1000, 700), (640, 480)], PLUS, output=(1328, 928))
    assert sizes.one_grid
    assert sizes.images[0].reference == sizes.output == (1328, 928)
    assert sizes.images[1].reference == (1184, 896)


def test_an_output_of_another_shape_leaves_the_image_its_own_and_says_so() -> None:
    sizes = plan_sizes([(1000, 700)], PLUS, output=(1024, 1024))
    assert not sizes.one_grid
    assert sizes.images[0].reference == (1216, 864)
    assert "output 1024x1024, not on the grid of image 1: what is kept may shift or zoom" in str(sizes)


@pytest.mark.parametrize(("megapixels", "output"), [(1.0, (1024, 1024)), (0.25, (512, 512)), (0.0, (1024, 1024))])
def test_without_an_image_the_output_is_square(megapixels: float, output: tuple[int, int]) -> None:
    assert plan_sizes([], PLUS, megapixels=megapixels) == EditSizes(output, ())
    assert plan_sizes([], PLUS, megapixels=megapixels, output=(1664, 928)).output == (1664, 928)


def test_sizes_are_told_in_words() -> None:
    assert str(plan_sizes([(1000, 700), (1216, 864)], PLUS)) == (
        "output 1216x864\n"
        "image 1: 1000x700 to 1216x864, 1.5% taller, seen at 448x308\n"
        "image 2: 1216x864 used as it is, seen at 448x308"
    )
    assert str(ImageSizes((500, 400), (1250, 1000), (28, 28))) == "500x400 to 1250x1000, seen at 28x28"


# what is refused


def test_more_images_than_the_model_knows_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"Edit-2509 edits at most 3 images at a time, but 4 are connected\.$"):
        plan_sizes([(64, 64)] * 4, PLUS)
    with pytest.raises(
        InvalidRequest, match=r"Qwen-Image-Edit edits at most 1 image at a time, but 2 are connected\. Use Qwen-Im"
    ):
        plan_sizes([(64, 64)] * 2, EDIT)


@pytest.mark.parametrize("size", [(1, 1), (15, 400), (400, 15)])
def test_a_placeholder_is_no_image(size: tuple[int, int]) -> None:
    with pytest.raises(InvalidRequest, match=rf"Image 2 is {size[0]}x{size[1]} px; each side needs at least 16 px"):
        plan_sizes([(64, 64), size], PLUS)


@pytest.mark.parametrize("size", [(20, 2001), (3300, 32)])
def test_a_strip_is_no_image(size: tuple[int, int]) -> None:
    with pytest.raises(InvalidRequest, match=rf"Image 1 is {size[0]}x{size[1]} px, too long and narrow .* 100 times"):
        plan_sizes([size], PLUS)


@pytest.mark.parametrize(("output", "near"), [((1000, 700), "992x704"), ((8, 64), "16x64"), ((0, 16), "16x16")])
def test_an_output_beside_the_grid_is_refused(output: tuple[int, int], near: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"{output[0]}x{output[1]} px; .* multiples of 16\.\nUse {near}\."):
        plan_sizes([], PLUS, output=output)


# resampling


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(40, 400), st.integers(40, 400)),
    made=st.tuples(st.integers(2, 14), st.integers(2, 14)),
    at=st.tuples(st.floats(0.3, 0.7), st.floats(0.3, 0.7)),
)
def test_resampling_moves_nothing(size: tuple[int, int], made: tuple[int, int], at: tuple[float, float]) -> None:
    width, height = (32 * side for side in made)
    moved = resample(_spot(*size, *at), width, height)
    assert moved.shape == (1, height, width, 3)
    for axis, (pixels, place) in enumerate(zip((width, height), _centre(moved), strict=True)):
        before = _centre(_spot(*size, *at))[axis]
        assert abs(place - before) * pixels < 0.05  # in pixels of the result


@settings(max_examples=40, deadline=None, derandomize=True)
@given(size=st.tuples(st.integers(16, 300), st.integers(16, 300)), made=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_resampling_treats_all_sides_alike(size: tuple[int, int], made: tuple[int, int]) -> None:
    width, height = (32 * side for side in made)
    pixels = torch.rand(1, size[1], size[0], 3, generator=torch.Generator().manual_seed(size[0]))
    wanted = resample(pixels, width, height)
    for axes in ((1,), (2,), (1, 2)):
        assert (resample(pixels.flip(axes), width, height).flip(axes) - wanted).abs().max() < 1e-4


def test_an_image_of_that_size_is_not_resampled() -> None:
    pixels = torch.rand(1, 64, 96, 3)
    assert resample(pixels, 96, 64) is pixels


def test_a_resampled_image_stays_within_its_range() -> None:
    pixels = (torch.rand(1, 50, 70, 3) > 0.5).float()
    made = resample(pixels, 256, 192)
    assert made.min() >= 0
    assert made.max() <= 1


def _spot(width: int, height: int, x: float, y: float) -> torch.Tensor:
    """A soft light at (x, y) of the image, far from its borders."""
    columns = (torch.arange(width, dtype=torch.float64) + 0.5) / width - x
    rows = (torch.arange(height, dtype=torch.float64) + 0.5) / height - y
    spot = torch.exp(-(rows[:, None] ** 2 + columns[None] ** 2) / (2 * 0.06**2))
    return spot.float()[None, :, :, None].expand(1, height, width, 3)


def _centre(pixels: torch.Tensor) -> tuple[float, float]:
    """Of gravity, (x, y) as parts of the image."""
    plane = pixels[0, :, :, 0].double()
    height, width = plane.shape
    columns = (torch.arange(width, dtype=torch.float64) + 0.5) / width
    rows = (torch.arange(height, dtype=torch.float64) + 0.5) / height
    return float((plane.sum(0) * columns).sum() / plane.sum()), float((plane.sum(1) * rows).sum() / plane.sum())


# positions within the model


@settings(max_examples=25, deadline=None, derandomize=True)
@given(size=IMAGES)
def test_a_place_of_the_image_and_of_the_output_is_one_position_to_the_model(size: tuple[int, int]) -> None:
    rope = QwenEmbedRope(theta=10000, axes_dim=[4, 14, 14], scale_rope=True)
    sizes = plan_sizes([size], PLUS)
    shapes = [(1, height // 16, width // 16) for width, height in (sizes.output, sizes.images[0].reference)]
    frequencies, _ = rope([shapes], max_txt_seq_len=8, device=torch.device("cpu"))
    made, shown = frequencies.split(shapes[0][1] * shapes[0][2])
    which, place = made[:, :2], made[:, 2:]  # of complex numbers, half as many as dimensions
    assert torch.equal(place, shown[:, 2:])
    assert not torch.equal(which, shown[:, :2])
