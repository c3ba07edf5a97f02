"""The sizes of images that 2.1 makes and is shown: sides in multiples of 32 px, by area. Numbers in; imports no torch.

The output has the size of the first image's reference, so that a pixel of one is a pixel of the other (as ComfyUI's own
node has it; diffusers takes the last image's shape).

Edits of exactly 1024x1024 px come out as near-copies of the image, with halos, whatever was asked for and whoever
computes them: diffusers, ComfyUI and a port to MLX alike (huggingface/diffusers#14824, Comfy-Org/ComfyUI#16435). The
grids beside it, 992x992 and 1056x1056, are said to be free of that. A square image is therefore edited in 1056x1056
where nobody asks for another size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import InvalidRequest

STEP_PX = 32
LARGEST = ((2752, 1536), (2400, 1792), (2048, 2048))  # the model card's
PIXELS = 1024 * 1024  # of each reference, where nobody says otherwise
HALOED, BESIDE_IT = (1024, 1024), (1056, 1056)  # see above
# ten are what the reference pipeline was shown with; more are taken, with a warning
MOST_IMAGES, WARNED_IMAGES = 12, 10
LEAST_SIDE_PX, MOST_LENGTH = 16, 100

Size = tuple[int, int]  # (width, height) in px


@dataclass(frozen=True)
class EditSizes21:
    """Of the output, and of each reference, which encoder and VAE see alike. aside: square images, which would be on
    the grid whose edits come out as near-copies, are on the one beside it."""

    output: Size
    references: tuple[Size, ...]
    aside: bool = False

    @property
    def one_grid(self) -> bool:
        """Whether a pixel of the first image is a pixel of the output: else what is kept shifts or zooms."""
        return not self.references or self.references[0] == self.output


def plan_sizes_21(images: Sequence[Size], *, pixels: float | None = PIXELS, output: Size | None = None) -> EditSizes21:
    """`pixels`: area of each reference, and of the output unless `output` says otherwise; None: each image's own.

    Raises InvalidRequest for more than MOST_IMAGES, one that is none, or an output that the model cannot make.
    """
    if len(images) > MOST_IMAGES:
        raise InvalidRequest(
            "{count} images are connected. Qwen-Image-2.1 takes at most {most}, and was made for up to {usual}. Use "
            "fewer.",
            code="edit_21.too_many_images",
            count=len(images),
            most=MOST_IMAGES,
            usual=WARNED_IMAGES,
        )
    for number, (width, height) in enumerate(images, start=1):
        if min(width, height) < LEAST_SIDE_PX or max(width, height) > MOST_LENGTH * min(width, height):
            raise InvalidRequest(
                "Image {number} is {width}x{height} px; each side needs at least {least_px} px, and one side may be "
                "at most {most_length} times the other. Crop or enlarge it.",
                code="edit_21.wrong_image",
                number=number,
                width=width,
                height=height,
                least_px=LEAST_SIDE_PX,
                most_length=MOST_LENGTH,
            )
    if output is not None and (min(output) < STEP_PX or any(side % STEP_PX for side in output)):
        near = [max(STEP_PX, round(side / STEP_PX) * STEP_PX) for side in output]
        raise InvalidRequest(
            "An image of {width}x{height} px cannot be made: sides must be multiples of {step} px. Use "
            "{near_width}x{near_height}.",
            code="edit_21.wrong_output",
            width=output[0],
            height=output[1],
            step=STEP_PX,
            near_width=near[0],
            near_height=near[1],
        )
    references = tuple(by_area(size, pixels or size[0] * size[1]) for size in images)
    aside = output is None and pixels == PIXELS and references[:1] == (HALOED,)
    if aside:
        references = tuple(BESIDE_IT if size == HALOED else size for size in references)
    return EditSizes21(
        output or (references[0] if references else by_area((1, 1), pixels or PIXELS)), references, aside
    )


def by_area(size: Size, pixels: float) -> Size:
    """The multiples of 32 px next to that shape and area (diffusers' calculate_dimensions)."""
    ratio = size[0] / size[1]
    width = math.sqrt(pixels * ratio)
    return max(STEP_PX, round(width / STEP_PX) * STEP_PX), max(STEP_PX, round(width / ratio / STEP_PX) * STEP_PX)
