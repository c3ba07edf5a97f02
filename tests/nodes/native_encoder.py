"""ComfyUI's own Qwen-Image text encoder at the small size, on the weights of a pipeline folder."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

_TEXT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads",
)  # fmt: skip


@contextmanager
def native_encoder(pipeline: Path) -> Iterator[tuple[Any, Any]]:
    """The model with its vision tower, and the tokenizer; the sizes that ComfyUI has as constants are patched."""
    import comfy.text_encoders.llama as llama
    import comfy.text_encoders.qwen_image as qwen_image
    import comfy.text_encoders.qwen_vl as qwen_vl
    from comfy import sd1_clip

    config = json.loads((pipeline / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    text, vision = config["text_config"], config["vision_config"]
    sizes = {name: text[name] for name in _TEXT}
    tower = qwen_vl.Qwen2VLVisionTransformer

    class SmallModel(sd1_clip.SDClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None, **_: Any) -> None:
            super().__init__(
                device=device,
                layer="last",
                textmodel_json_config=sizes,
                dtype=dtype,
                special_tokens={"pad": 151643},
                layer_norm_hidden_state=False,
                model_class=llama.Qwen25_7BVLI,
                enable_attention_masks=True,
                return_attention_masks=True,
                model_options=model_options or {},
            )

    def small_tower(**options: Any) -> Any:
        small = {name: vision[name] for name in ("hidden_size", "intermediate_size", "num_heads")}
        made = tower(**{**options, **small, "num_layers": vision["depth"]})
        made.fullatt_block_indexes = vision["fullatt_block_indexes"]
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qwen_image, "Qwen25_7BVLIModel", SmallModel)
        patch.setattr(qwen_vl, "Qwen2VLVisionTransformer", small_tower)
        settings = llama.Qwen25_7BVLI_Config
        patch.setattr(settings, "head_dim", text["hidden_size"] // text["num_attention_heads"])
        patch.setattr(settings, "rope_dims", text["rope_parameters"]["mrope_section"])
        model = qwen_image.QwenImageTEModel(dtype=torch.float32)
        weights = load_file(next((pipeline / "text_encoder").glob("*.safetensors")))
        used = {name: value for name, value in weights.items() if name.startswith(("model.", "visual."))}
        result = model.qwen25_7b.transformer.load_state_dict(used, strict=False)
        assert not result.unexpected_keys
        assert not [name for name in result.missing_keys if name.startswith(("model.", "visual."))]
        yield model, qwen_image.QwenImageTokenizer()


def as_clip(model: Any, tokenizer: Any) -> Any:
    """A CLIP of ComfyUI's own around them."""
    import comfy.model_patcher
    import comfy.sd

    clip = comfy.sd.CLIP(no_init=True)
    clip.cond_stage_model, clip.tokenizer = model, tokenizer
    cpu = torch.device("cpu")
    clip.patcher = comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
    clip.layer_idx, clip.tokenizer_options = None, {}
    clip.use_clip_schedule, clip.apply_hooks_to_conds = False, None
    return clip
