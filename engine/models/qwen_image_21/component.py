"""How a Qwen-Image-2.1 transformer's file is told by its tensors' names."""

from ..component import Component

_BLOCK = "transformer_blocks.0.attn.norm_q.weight"
_ANCHORS = (
    (_BLOCK, "img_in.weight", "modulation.1.weight", "txt_in.text_norm.weight"),
    (_BLOCK,),
    ("txt_in.text_norm.weight",),
)

# its attention's names are among those of the 20B transformer's blocks: it is to be looked for before that
TRANSFORMER_21 = Component(
    "a Qwen-Image-2.1 transformer",
    "diffusion_models",
    example="qwen_image_2.1_int8_convrot.safetensors",
    signs=(r"(^|\.)txt_in\.text_norm\.weight$|\.img_mlp\.(gate_up|gate_layer)\.weight$",),
    anchors=_ANCHORS,
    whole=_ANCHORS[:1],
    kinds_of_layers=(("modulation.1.",), (".img_mlp.",), ("img_in.weight", "proj_out.weight")),
    several="transformers",
)
