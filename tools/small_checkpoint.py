"""Make a small Qwen-Image of the real architecture with random weights, as a pipeline folder.

Weights are scaled by their fan-in, so that activations keep their size and errors cannot hide in zeros.
Nothing is downloaded: the tokenizer comes from the files that ComfyUI ships.
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from devtools.comfyui import require_comfyui
from split_files import SplitFiles, write_split_files

__all__ = [
    "SplitFiles",
    "TextSize",
    "make_pipeline",
    "make_text_encoder",
    "make_tokenizer",
    "make_transformer",
    "make_vae",
    "write_split_files",
]

TOKENIZER_IN_COMFYUI = Path("comfy/text_encoders/qwen25_tokenizer")

# diffusers' prompt templates (pipeline_qwenimage.py, pipeline_qwenimage_edit_plus.py) and words for the image labels:
# the pruned vocabulary is closed over them, so that template lengths stay 34 and 64 tokens
_TEMPLATES = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "Picture 1: <|vision_start|><|image_pad|><|vision_end|>Picture 2: a cat, photo of the dog, high quality",
)

# the scheduler that every Qwen-Image folder has
_SCHEDULER = {
    "base_image_seq_len": 256, "base_shift": 0.5, "invert_sigmas": False, "max_image_seq_len": 8192, "max_shift": 0.9,
    "num_train_timesteps": 1000, "shift": 1.0, "shift_terminal": 0.02, "stochastic_sampling": False,
    "time_shift_type": "exponential", "use_beta_sigmas": False, "use_dynamic_shifting": True,
    "use_exponential_sigmas": False, "use_karras_sigmas": False,
}  # fmt: skip

# what differs in Qwen-Image-Layered's folder
_LAYERED_TRANSFORMER = {"use_additional_t_cond": True, "use_layer3d_rope": True}
_LAYERED_SCHEDULER = {"shift_terminal": None, "time_shift_type": "linear"}

# rotary axes of the reference (16, 56, 56 of 128) and of transformers' Qwen2.5-VL (16, 24, 24 of 64 pairs)
_ROPE_AXES = {32: (4, 14, 14), 64: (8, 28, 28), 128: (16, 56, 56)}
_TEXT_ROPE_SECTIONS = {16: (2, 3, 3), 32: (4, 6, 6), 64: (8, 12, 12), 128: (16, 24, 24)}


@dataclass(frozen=True)
class TextSize:
    """Sizes of the text encoder; `hidden` is also the transformer's joint_attention_dim."""

    hidden: int = 64
    layers: int = 2
    heads: int = 2
    kv_heads: int = 1
    intermediate: int = 128
    vision_layers: int = 2


def make_pipeline(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    layers: int = 4,
    heads: int = 2,
    head_dim: int = 32,
    text: TextSize = TextSize(),
    vae_base_dim: int = 8,
    seed: int = 0,
    full_tokenizer: bool = False,
    max_shard_size: str | None = None,
    transformer_options: Mapping[str, Any] | None = None,
    layered: bool = False,
    comfyui: Path | None = None,
) -> Path:
    """Write a pipeline folder that diffusers' QwenImagePipeline loads, and return it.

    `full_tokenizer` keeps the whole vocabulary (152,064 rows), which ComfyUI's own CLIP needs: it knows ids by number.
    `max_shard_size` such as "200KB" shards the transformer and the text encoder, with index files.
    `transformer_options` are further arguments of QwenImageTransformer2DModel, such as zero_cond_t=True.
    `layered`: Qwen-Image-Layered, for diffusers' QwenImageLayeredPipeline.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageLayeredPipeline, QwenImagePipeline

    tokenizer = make_tokenizer(full=full_tokenizer, comfyui=comfyui)
    options = {**(_LAYERED_TRANSFORMER if layered else {}), **(transformer_options or {})}
    transformer = make_transformer(
        layers=layers, heads=heads, head_dim=head_dim, text_dim=text.hidden, seed=seed, **options
    )
    vae = make_vae(base_dim=vae_base_dim, seed=seed + 1, channels=4 if layered else 3)
    text_encoder = make_text_encoder(tokenizer, text, seed=seed + 2)
    if dtype != torch.float32:
        transformer, vae, text_encoder = (model.to(dtype) for model in (transformer, vae, text_encoder))
    make, scheduler, others = QwenImagePipeline, _SCHEDULER, {}
    if layered:
        make, scheduler = QwenImageLayeredPipeline, {**_SCHEDULER, **_LAYERED_SCHEDULER}
        others = {"processor": _make_processor(tokenizer)}
    pipeline = make(
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        **others,
    )
    sharding = {"max_shard_size": max_shard_size} if max_shard_size else {}
    pipeline.save_pretrained(folder, **sharding)
    return Path(folder)


def make_transformer(
    *, layers: int = 4, heads: int = 2, head_dim: int = 32, text_dim: int = 64, seed: int = 0, **options: Any
) -> torch.nn.Module:
    """diffusers' QwenImageTransformer2DModel in fp32; 24 heads of 128, 60 layers and text_dim 3584 are the real one."""
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=layers,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=text_dim,
        guidance_embeds=False,
        axes_dims_rope=_ROPE_AXES[head_dim],
        **options,
    )
    model = randomize(model, seed, lambda name: ".norm_" in name or name == "txt_norm.weight")
    with torch.no_grad():
        for block in model.transformer_blocks:
            # random attention spreads evenly over hundreds of image tokens: let the few text tokens count
            block.attn.norm_added_k.weight.mul_(3)
    return model


def make_text_encoder(tokenizer: Any, size: TextSize, *, seed: int) -> torch.nn.Module:
    """transformers' Qwen2.5-VL with lm_head and vision tower, as the real folder has them."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    def token(text: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(text))

    # the real vocabulary has a few hundred rows more than the tokenizer has tokens, in a multiple of 256
    vocab_size = -(-(len(tokenizer) + 1) // 256) * 256
    # as the published file has it, which transformers 4 and 5 read
    rope = {"type": "default", "rope_type": "default", "mrope_section": _TEXT_ROPE_SECTIONS[size.hidden // size.heads]}
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": size.hidden,
            "intermediate_size": size.intermediate,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "vocab_size": vocab_size,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_scaling": rope,
            "rope_theta": 1e6,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
        },
        vision_config={
            "depth": size.vision_layers,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": size.hidden,
            "window_size": 112,
            "fullatt_block_indexes": [size.vision_layers - 1],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        vision_token_id=token("<|vision_pad|>"),
        tie_word_embeddings=False,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    return randomize(
        model, seed, lambda name: name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "ln_q.weight"))
    )


def make_vae(*, base_dim: int = 8, seed: int = 1, channels: int = 3) -> torch.nn.Module:
    """diffusers' AutoencoderKLQwenImage with the real latent statistics; the real base_dim is 96. Layered's VAE has 4
    channels."""
    from diffusers import AutoencoderKLQwenImage

    model = AutoencoderKLQwenImage(base_dim=base_dim, z_dim=16, input_channels=channels)
    return randomize(model, seed, lambda name: name.endswith(".gamma"))


def _make_processor(tokenizer: Any) -> Any:
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(), tokenizer=tokenizer, video_processor=Qwen2VLVideoProcessor()
    )


def randomize(model: torch.nn.Module, seed: int, is_norm: Callable[[str], bool]) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if is_norm(name):
            parameter.data = 1 + 0.1 * noise
        elif parameter.ndim == 1:
            parameter.data = 0.05 * noise
        elif "embed_tokens" in name:
            parameter.data = noise
        else:
            parameter.data = noise / parameter[0].numel() ** 0.5
    return model.eval()


def make_tokenizer(*, full: bool, comfyui: Path | None = None) -> Any:
    """transformers' Qwen2Tokenizer: the whole one, or about 500 tokens that still spell every text byte by byte."""
    from transformers import Qwen2Tokenizer

    source = (comfyui or require_comfyui()) / TOKENIZER_IN_COMFYUI
    whole = Qwen2Tokenizer.from_pretrained(source)
    if full:
        return whole
    vocab = json.loads((source / "vocab.json").read_text(encoding="utf-8"))
    lines = (source / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    kept, kept_merges = _prune(vocab, merges, [t for text in _TEMPLATES for t in whole.tokenize(text)])
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    added = [entry for _, entry in sorted(settings["added_tokens_decoder"].items(), key=lambda item: int(item[0]))]
    settings["added_tokens_decoder"] = {str(len(kept) + i): entry for i, entry in enumerate(added)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "vocab.json").write_text(json.dumps(kept), encoding="utf-8")
        pairs = "".join(f"{left} {right}\n" for left, right in kept_merges)
        (folder / "merges.txt").write_text("#version: 0.2\n" + pairs, encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        pruned = Qwen2Tokenizer.from_pretrained(folder)
    for text in _TEMPLATES:
        if pruned.tokenize(text) != whole.tokenize(text):
            raise RuntimeError("The pruned tokenizer splits the prompt template otherwise than the whole one.")
    return pruned


def _prune(
    vocab: Mapping[str, int], merges: list[tuple[str, ...]], needed: list[str]
) -> tuple[dict[str, int], list[tuple[str, ...]]]:
    """All bytes and what `needed` is merged from, ids renumbered; the merges among them, in their order."""
    parts = {left + right: (left, right) for left, right in reversed(merges)}
    keep, open_tokens = set(), [token for token in needed if token in vocab]
    while open_tokens:
        token = open_tokens.pop()
        if token not in keep:
            keep.add(token)
            open_tokens.extend(parts.get(token, ()))
    ordered = [token for token, i in sorted(vocab.items(), key=lambda item: item[1]) if i < 256 or token in keep]
    ids = {token: i for i, token in enumerate(ordered)}
    return ids, [(left, right) for left, right in merges if {left, right, left + right} <= ids.keys()]
