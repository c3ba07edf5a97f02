"""The sizes of images in an edit: one grid for what is shown and what is made. Numbers in; imports no torch.

Guarantees: every size is a multiple of what the model's patches cover; the first image and the output have the same
size, unless a person asks for an output of another shape; an image that is on the grid already is not resampled, so
that an edited image can be edited again and again without being zoomed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import InvalidRequest
from .variants import Variant

MOST_IMAGES = 3
PIXELS = 1024 * 1024  # of a megapixel, as the editing models count it
# sides are multiples of it (pipeline_qwenimage_edit_plus.py, calculate_dimensions), and in an image of one's own size
# of what the model's patches cover
STEP_PX, LEAST_STEP_PX = 32, 16
# an image of about the wanted area that is on the grid stays as it is
SAME_AREA = 0.1
# an output of about the first image's shape takes that image onto its grid
SAME_SHAPE = 0.03
# what the vision tower is shown (pipeline_qwenimage_edit.py and ..._edit_plus.py); its tokens have 28 px
SEEN_PIXELS, SEEN_PIXELS_OF_EDIT, SEEN_STEP_PX = 384 * 384, 1024 * 1024, 28
# smaller ones are placeholders, not images
LEAST_SIDE_PX = 16
# of the longer side to the shorter one; the vision tower's processor refuses 200
MOST_LENGTH = 100

Size = tuple[int, int]  # (width, height) in px


@dataclass(frozen=True)
class ImageSizes:
    """Of one image: as it was given, as the VAE encodes it, and as the vision tower sees it."""

    given: Size
    reference: Size
    seen: Size

    @property
    def stretch(self) -> float:
        """How much wider the reference is than the image's shape: 0.01 for a hundredth."""
        return _stretch(self.given, self.reference)

    def __str__(self) -> str:
        if self.given == self.reference:
            taken = f"{_text(self.given)} used as it is"
        else:
            stretch = f", {abs(self.stretch):.1%} {'wider' if self.stretch > 0 else 'taller'}"
            taken = f"{_text(self.given)} to {_text(self.reference)}{stretch if round(self.stretch, 3) else ''}"
        return f"{taken}, seen at {_text(self.seen)}"


@dataclass(frozen=True)
class EditSizes:
    """Of the output, and of each image."""

    output: Size
    images: tuple[ImageSizes, ...]

    @property
    def one_grid(self) -> bool:
        """Whether a pixel of the first image is a pixel of the output."""
        return not self.images or self.images[0].reference == self.output

    def __str__(self) -> str:
        own = "" if self.one_grid else ", not on the grid of image 1: what is kept may shift or zoom"
        lines = [f"output {_text(self.output)}{own}"]
        lines += [f"image {i}: {sizes}" for i, sizes in enumerate(self.images, start=1)]
        return "\n".join(lines)


def plan_sizes(
    images: Sequence[Size], variant: Variant, *, megapixels: float = 1.0, output: Size | None = None
) -> EditSizes:
    """`megapixels`: of each reference, and of the output; 0 leaves each image its own size, to the nearest multiple
    of 16. `output`: where the output is to be of another size.

    Raises InvalidRequest for more images than the model knows, one that is no image, or an output that patches do
    not cover.
    """
    most = 1 if variant is Variant.EDIT else MOST_IMAGES
    if len(images) > most:
        newer = f" Use {Variant.EDIT_2509.value} or {Variant.EDIT_2511.value} for several." if most == 1 else ""
        raise InvalidRequest(
            "{variant} edits at most {most} image{plural} at a time, but {count} are connected.{newer}",
            code="edit.too_many_images",
            variant=variant.value,
            most=most,
            plural="s" if most != 1 else "",
            count=len(images),
            newer=newer,
        )
    for i, (width, height) in enumerate(images, start=1):
        if min(width, height) < LEAST_SIDE_PX:
            raise InvalidRequest(
                "Image {number} is {width}x{height} px; each side needs at least {least_px} px. Use the image itself, "
                "not a placeholder.",
                code="edit.image_too_small",
                number=i,
                width=width,
                height=height,
                least_px=LEAST_SIDE_PX,
            )
        if max(width, height) > MOST_LENGTH * min(width, height):
            raise InvalidRequest(
                "Image {number} is {width}x{height} px, too long and narrow for the model to see: one side may be at "
                "most {most_length} times the other. Crop it.",
                code="edit.image_too_long",
                number=i,
                width=width,
                height=height,
                most_length=MOST_LENGTH,
            )
    if output is not None and (min(output) < LEAST_STEP_PX or any(side % LEAST_STEP_PX for side in output)):
        near = tuple(max(LEAST_STEP_PX, round(side / LEAST_STEP_PX) * LEAST_STEP_PX) for side in output)
        raise InvalidRequest(
            "The output is {output} px; width and height must be multiples of {step_px}.\nUse "
            "{near_width}x{near_height}.",
            code="edit.wrong_output_size",
            output=_text(output),
            step_px=LEAST_STEP_PX,
            near_width=near[0],
            near_height=near[1],
        )
    references = [_on_grid(size, megapixels * PIXELS) for size in images]
    if output is not None and images and abs(_stretch(images[0], output)) <= SAME_SHAPE:
        references[0] = output
    seen = SEEN_PIXELS_OF_EDIT if variant is Variant.EDIT else SEEN_PIXELS
    sizes = tuple(
        ImageSizes(given, reference, seen_size(given, seen))
        for given, reference in zip(images, references, strict=True)
    )
    made = output or (references[0] if references else _fitted((1, 1), (megapixels or 1.0) * PIXELS, STEP_PX))
    return EditSizes(made, sizes)


def seen_size(size: Size, pixels: float) -> Size:
    """What the reference pipeline shows the vision tower of an image: first on its own grid, then on the tower's."""
    width, height = _fitted(size, pixels, STEP_PX)
    return _rounded(width, SEEN_STEP_PX), _rounded(height, SEEN_STEP_PX)


def _on_grid(size: Size, pixels: float) -> Size:
    """The size of a reference, `pixels` large (0: its own)."""
    width, height = size
    if pixels == 0:
        return _rounded(width, LEAST_STEP_PX), _rounded(height, LEAST_STEP_PX)
    on_grid = width % STEP_PX == height % STEP_PX == 0
    if on_grid and abs(width * height / pixels - 1) <= SAME_AREA:
        return size
    return _fitted(size, pixels, STEP_PX)


def _fitted(size: Size, pixels: float, step: int) -> Size:
    """The multiples of `step` next to that shape and area."""
    width = math.sqrt(pixels * size[0] / size[1])
    return _rounded(width, step), _rounded(width * size[1] / size[0], step)


def _rounded(side: float, step: int) -> int:
    return max(step, round(side / step) * step)


def _stretch(given: Size, made: Size) -> float:
    return (made[0] / given[0]) / (made[1] / given[1]) - 1


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
