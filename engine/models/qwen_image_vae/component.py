"""How a VAE's file is told by its tensors' names, ComfyUI's (which are Wan's) or diffusers'."""

from ..component import Component

_ANCHORS = (
    ("decoder.conv1.weight", "decoder.head.2.weight", "conv2.weight"),
    ("decoder.conv_in.weight", "decoder.conv_out.weight", "post_quant_conv.weight"),
)

VAE = Component(
    "a VAE",
    "vae",
    example="qwen_image_vae.safetensors",
    signs=(r"(^|\.)(decoder|encoder)\.(conv_in|conv1|up_blocks|upsamples|downsamples)\.",),
    anchors=_ANCHORS,
    whole=_ANCHORS,
)
