"""How a Qwen-Image transformer's file is told by its tensors' names."""

from ..component import Component

_BLOCK = "transformer_blocks.0.attn.add_q_proj.weight"
_ANCHORS = (
    (_BLOCK, "img_in.weight", "transformer_blocks.0.img_mod.1.weight"),
    (_BLOCK,),
    ("img_in.weight",),
)

TRANSFORMER = Component(
    "a Qwen-Image transformer",
    "diffusion_models",
    example="qwen_image_fp8_e4m3fn.safetensors",
    signs=(r"transformer_blocks\.\d+\.attn\.add_q_proj\.weight",),
    telling_signs=(r"transformer_blocks\.\d+\.attn\.add_qkv_proj\.qweight$",),  # of nunchaku
    anchors=_ANCHORS,
    whole=_ANCHORS[:1],
    kinds_of_layers=((".img_mod.1.",), (".img_mlp.",), ("img_in.weight", "proj_out.weight")),
    several="transformers",
)
