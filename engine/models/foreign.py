"""Models that are none of ours, or no place for them: known only to say what a file is, and where it belongs."""

from .component import Component

UNMERGED = Component(
    "a model with a place for LoRAs in its layers (base_layer), as PEFT has it while it trains",
    hint=" Merge the LoRA into it first (merge_and_unload), or use its LoRA alone.",
    signs=(r"\.base_layer\.weight$",),
)
LORA = Component("a LoRA", "loras", signs=(r"lora_(up|down|A|B)\b|\.lora\.(up|down)\.|lokr_w|hada_w",))
MODEL_PATCH = Component("a model patch (DiffSynth)", "model_patches", signs=(r"^controlnet_blocks\.\d+\.x_rms\.",))
CONTROLNET = Component("a ControlNet", "controlnet", signs=(r"^(controlnet_|control_model\.)",))
OTHER_QUANTIZATION = Component(
    "a model quantized for another program (GPTQ, AWQ, quanto, torchao, or nunchaku for another model)",
    signs=(r"\.(qweight|wscales|weight_packed|_?weight_qdata|weight:_data|weight\._(data|scale))$",),
)
OTHER_TEXT_ENCODER = Component(
    "the text encoder of another model",
    "text_encoders",
    signs=(
        r"text_model\.encoder\.layers\.|encoder\.block\.\d+\.layer\.|^enc\.blk\.\d+\.",
        r"(^|\.)visual\.blocks\.\d+\.mlp\.(linear_)?fc1\.",  # Qwen2-VL, and Qwen3.5, which has no deepstack
    ),
)
STABLE_DIFFUSION = Component(
    "a Stable Diffusion checkpoint",
    signs=(r"model\.diffusion_model\.input_blocks\.|(^|\.)down_blocks\.\d+\.attentions\.|joint_blocks\.\d+\.",),
)
FLUX = Component("a Flux transformer", signs=(r"double_blocks\.\d+\.img_attn\.|single_transformer_blocks\.",))
WAN = Component("a Wan video transformer", signs=(r"blocks\.\d+\.cross_attn\.q\.weight",))
TINY_VAE = Component(
    "a small VAE for previews",
    "vae_approx",
    signs=(r"^(taesd_)?(decoder|encoder)\.(layers\.)?\d+\.(conv\.\d+\.)?weight$",),
)
UNKNOWN = Component("a model that is not recognised")
