"""How a Qwen3-VL text encoder's file is told by its tensors' names."""

from ..component import Component
from ..foreign import OTHER_TEXT_ENCODER

_LAYER = "layers.0.self_attn.q_norm.weight"
_ANCHORS = (("embed_tokens.weight", _LAYER), (_LAYER,), ("embed_tokens.weight",))

TEXT_ENCODER = Component(
    "a Qwen3-VL text encoder",
    "text_encoders",
    example="qwen3vl_8b_int8_convrot.safetensors",
    # Qwen3 without eyes has the same language model; in a GGUF file, where both are alone, the architecture tells
    signs=(r"(^|\.)visual\.deepstack_merger_list\.\d+\.|^blk\.\d+\.attn_q_norm\.weight$",),
    needed_sign=r"layers\.\d+\.mlp\.gate_proj\.|^blk\.\d+\.ffn_gate\.",  # the sizes with experts have none
    architectures=("qwen3vl",),
    otherwise=OTHER_TEXT_ENCODER,
    anchors=_ANCHORS,
    whole=_ANCHORS[:1],
)
