"""The tensors that Qwen-Image-2.1's VAE needs: names as diffusers has them, and shapes. Imports no torch."""

from collections.abc import Iterator
from itertools import pairwise

from ..qwen_image_vae.shapes import conv, middle, norm, resample, residual

LATENT_CHANNELS = 64
IMAGE_CHANNELS = 4
# channels of each level, as multiples of the width (diffusers AutoencoderKLQwenImage21: dim_mult)
LEVELS = (1, 2, 4, 8, 8)
ENCODER_BLOCKS, DECODER_BLOCKS = 2, 3  # residual blocks of a level
# of the encoder's levels that have a next one: whether a video's frames would be halved there, too. The decoder's the
# other way round
HALVES_TIME = (False, True, True, True)

_Shapes = Iterator[tuple[str, tuple[int, ...]]]


def image_vae_21_shapes(encoder_width: int, decoder_width: int) -> dict[str, tuple[int, ...]]:
    """Of a VAE of these widths. Kernels are those of images, (out, in, k, k); unused ones over time are left out."""
    both = 2 * LATENT_CHANNELS  # mean and logarithm of the variance
    shapes = (
        *_encoder(encoder_width),
        *conv("quant_conv", both, both, 1),
        *conv("post_quant_conv", LATENT_CHANNELS, LATENT_CHANNELS, 1),
        *_decoder(decoder_width),
    )
    return {name: shape[:2] + shape[3:] if len(shape) == 5 else shape for name, shape in shapes}


def level_widths(width: int) -> list[tuple[int, int]]:
    """(channels in, channels out) of each of the encoder's levels."""
    return list(pairwise(width * multiple for multiple in (1, *LEVELS)))


def _encoder(width: int) -> _Shapes:
    yield from conv("encoder.conv_in", IMAGE_CHANNELS, width)
    channels = width
    for level, (inputs, channels) in enumerate(level_widths(width)):
        name = f"encoder.down_blocks.{level}"
        for index in range(ENCODER_BLOCKS):
            yield from residual(f"{name}.resnets.{index}", inputs if index == 0 else channels, channels)
        if level < len(HALVES_TIME):
            yield from resample(f"{name}.downsampler", channels, channels)
    yield from middle("encoder", channels)
    yield from norm("encoder.norm_out", channels)
    yield from conv("encoder.conv_out", channels, 2 * LATENT_CHANNELS)


def _decoder(width: int) -> _Shapes:
    channels = LEVELS[-1] * width
    yield from conv("decoder.conv_in", LATENT_CHANNELS, channels)
    yield from middle("decoder", channels)
    for level, multiple in enumerate(reversed(LEVELS)):
        name = f"decoder.up_blocks.{level}"
        for index in range(DECODER_BLOCKS):
            yield from residual(f"{name}.resnets.{index}", channels, multiple * width)
            channels = multiple * width
        if level < len(HALVES_TIME):
            yield from resample(f"{name}.upsampler", channels, channels)
    yield from norm("decoder.norm_out", channels)
    yield from conv("decoder.conv_out", channels, IMAGE_CHANNELS)
