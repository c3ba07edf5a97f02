"""Build the miniature's modules: the real classes at a tiny size, seeded, untrained."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from qwenimage_lowvram.engine.models.qwen_image_vae.latent_statistics import LATENTS_MEAN, LATENTS_STD
from torch.nn import functional
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

# the real model's values (Qwen/Qwen-Image, scheduler/scheduler_config.json)
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000, "shift": 1.0, "shift_terminal": 0.02, "use_dynamic_shifting": True,
    "base_shift": 0.5, "max_shift": 0.9, "base_image_seq_len": 256, "max_image_seq_len": 8192,
    "time_shift_type": "exponential", "invert_sigmas": False, "stochastic_sampling": False,
    "use_beta_sigmas": False, "use_exponential_sigmas": False, "use_karras_sigmas": False,
}  # fmt: skip

TEXT_HIDDEN = 128


def build_vae(*, base_dim: int = 8) -> AutoencoderKLQwenImage:
    """Return an untrained VAE that takes every frame for itself: the taps on earlier frames are zero."""
    vae = AutoencoderKLQwenImage(
        base_dim=base_dim,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        dropout=0.0,
        latents_mean=list(LATENTS_MEAN),
        latents_std=list(LATENTS_STD),
    )
    for module in vae.modules():
        if isinstance(module, QwenImageCausalConv3d):
            module.weight.data[:, :, :-1] = 0
    return vae


class _SingleFrameConv(QwenImageCausalConv3d):
    """The causal convolution of one frame as the 2D convolution that it is: 2.3 times as fast to train."""

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        pad = (self._padding[2], self._padding[0])
        return functional.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=pad)[:, :, None]


def use_single_frame(vae: AutoencoderKLQwenImage, *, enabled: bool) -> None:
    """Switch the 2D view of the convolutions on or off; the parameters stay the same tensors."""
    old, new = QwenImageCausalConv3d, _SingleFrameConv
    for module in vae.modules():
        if isinstance(module, QwenImageCausalConv3d):
            module.__class__ = new if enabled else old


def build_transformer(
    *, text_hidden: int = TEXT_HIDDEN, layers: int = 4, heads: int = 6, head_dim: int = 32
) -> QwenImageTransformer2DModel:
    """Return an untrained transformer; its rope axes keep the proportions of the real (16, 56, 56)."""
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=layers,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=text_hidden,
        guidance_embeds=False,
        axes_dims_rope={32: (4, 14, 14), 64: (8, 28, 28)}[head_dim],
    )
    for block in model.transformer_blocks:
        for modulation in (block.img_mod[1], block.txt_mod[1]):
            torch.nn.init.zeros_(modulation.weight)
            torch.nn.init.zeros_(modulation.bias)
    for layer in (model.norm_out.linear, model.proj_out):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return model


def build_text_encoder(
    tokenizer: PreTrainedTokenizerBase, *, hidden: int = TEXT_HIDDEN, layers: int = 3, head_dim: int = 32
) -> Qwen2_5_VLForConditionalGeneration:
    """Return an untrained Qwen2.5-VL with the vocabulary of `tokenizer` and a vision tower of two small blocks."""
    special = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // head_dim,
            "num_key_value_heads": hidden // head_dim,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "type": "default",
                "mrope_section": {16: [2, 3, 3], 32: [4, 6, 6]}[head_dim],
                "rope_theta": 1000000.0,
            },
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
            "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "in_channels": 3,
            "out_hidden_size": hidden, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "window_size": 112, "fullatt_block_indexes": [1], "hidden_act": "silu",
        },
        tie_word_embeddings=True,
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in special.items()},
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**SCHEDULER)
