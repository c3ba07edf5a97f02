"""The tensors that Qwen-Image's VAE needs for one frame: names as diffusers has them, and shapes. Imports nothing."""

from collections.abc import Iterator

LATENT_CHANNELS = 16
# channels of each level, as multiples of the width (diffusers AutoencoderKLQwenImage: dim_mult)
LEVELS = (1, 2, 4, 4)
ENCODER_BLOCKS, DECODER_BLOCKS = 2, 3  # residual blocks of a level

_Shapes = Iterator[tuple[str, tuple[int, ...]]]


def image_vae_shapes(width: int, image_channels: int) -> dict[str, tuple[int, ...]]:
    """Of a VAE of that width for RGB (3) or RGBA (4); the kernels over time of videos are left out.

    diffusers' class tells the same, and takes seconds to import: too long for checking a file while a person waits.
    """
    both = 2 * LATENT_CHANNELS  # mean and logarithm of the variance
    return dict(
        [
            *_encoder(width, image_channels),
            *conv("quant_conv", both, both, 1),
            *conv("post_quant_conv", LATENT_CHANNELS, LATENT_CHANNELS, 1),
            *_decoder(width, image_channels),
        ]
    )


def _encoder(width: int, image_channels: int) -> _Shapes:
    yield from conv("encoder.conv_in", image_channels, width)
    channels, place = width, 0
    for level, multiple in enumerate(LEVELS):
        for _ in range(ENCODER_BLOCKS):
            yield from residual(f"encoder.down_blocks.{place}", channels, multiple * width)
            channels, place = multiple * width, place + 1
        if level < len(LEVELS) - 1:
            yield from resample(f"encoder.down_blocks.{place}", channels, channels)
            place += 1
    yield from middle("encoder", channels)
    yield from norm("encoder.norm_out", channels)
    yield from conv("encoder.conv_out", channels, 2 * LATENT_CHANNELS)


def _decoder(width: int, image_channels: int) -> _Shapes:
    channels = LEVELS[-1] * width
    yield from conv("decoder.conv_in", LATENT_CHANNELS, channels)
    yield from middle("decoder", channels)
    for level, multiple in enumerate(reversed(LEVELS)):
        for index in range(DECODER_BLOCKS):
            yield from residual(f"decoder.up_blocks.{level}.resnets.{index}", channels, multiple * width)
            channels = multiple * width
        if level < len(LEVELS) - 1:
            yield from resample(f"decoder.up_blocks.{level}.upsamplers.0", channels, channels // 2)
            channels //= 2
    yield from norm("decoder.norm_out", channels)
    yield from conv("decoder.conv_out", channels, image_channels)


def middle(half: str, channels: int) -> _Shapes:
    attention = f"{half}.mid_block.attentions.0"
    yield f"{attention}.norm.gamma", (channels, 1, 1)
    yield from _weight_and_bias(f"{attention}.to_qkv", (3 * channels, channels, 1, 1))
    yield from _weight_and_bias(f"{attention}.proj", (channels, channels, 1, 1))
    for index in range(2):
        yield from residual(f"{half}.mid_block.resnets.{index}", channels, channels)


def residual(name: str, inputs: int, outputs: int) -> _Shapes:
    yield from norm(f"{name}.norm1", inputs)
    yield from conv(f"{name}.conv1", inputs, outputs)
    yield from norm(f"{name}.norm2", outputs)
    yield from conv(f"{name}.conv2", outputs, outputs)
    if inputs != outputs:
        yield from conv(f"{name}.conv_shortcut", inputs, outputs, 1)


def resample(name: str, inputs: int, outputs: int) -> _Shapes:
    yield from _weight_and_bias(f"{name}.resample.1", (outputs, inputs, 3, 3))


def norm(name: str, channels: int) -> _Shapes:
    yield f"{name}.gamma", (channels, 1, 1, 1)


def conv(name: str, inputs: int, outputs: int, kernel: int = 3) -> _Shapes:
    yield from _weight_and_bias(name, (outputs, inputs, kernel, kernel, kernel))


def _weight_and_bias(name: str, shape: tuple[int, ...]) -> _Shapes:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]
