"""Bring an image to another size, once. Decides no size."""

from torch import Tensor
from torch.nn.functional import interpolate


def resample(pixels: Tensor, width: int, height: int) -> Tensor:
    """(1, H, W, 3) in 0..1 -> (1, height, width, 3) in 0..1; the same tensor where that is its size already.

    Bicubic, antialiased; the borders of the image stay its borders: what lies at x of W comes to lie at
    x * width / W, without an offset.
    """
    if tuple(pixels.shape[1:3]) == (height, width):
        return pixels
    planes = pixels.movedim(-1, 1).float()
    made = interpolate(planes, (height, width), mode="bicubic", align_corners=False, antialias=True)
    return made.clamp(0.0, 1.0).movedim(1, -1)
