"""How a Qwen2.5-VL text encoder's file, and that of its vision part, are told by their tensors' names."""

from ..component import Component
from ..foreign import OTHER_TEXT_ENCODER
from .gguf_names import TEXT_ARCHITECTURES

_LAYER = "layers.0.self_attn.q_proj.weight"
_ANCHORS = (("embed_tokens.weight", _LAYER, "layers.0.self_attn.q_proj.bias"), (_LAYER,), ("embed_tokens.weight",))

TEXT_ENCODER = Component(
    "a Qwen2.5-VL text encoder",
    "text_encoders",
    example="qwen_2.5_vl_7b_fp8_scaled.safetensors",
    signs=(r"layers\.\d+\.self_attn\.q_proj\.weight|^blk\.\d+\.attn_q\.weight",),
    needed_sign=r"q(_proj)?\.bias",  # Qwen2 alone among the language models in use has biases there
    architectures=TEXT_ARCHITECTURES,
    otherwise=OTHER_TEXT_ENCODER,
    anchors=_ANCHORS,
    whole=_ANCHORS[:1],
)
