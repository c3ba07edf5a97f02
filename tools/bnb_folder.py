"""Quantize models with bitsandbytes, by diffusers and transformers themselves, on the CPU too."""

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import bitsandbytes
import torch
from diffusers import BitsAndBytesConfig, QwenImageTransformer2DModel
from diffusers.quantizers.bitsandbytes import bnb_quantizer
from transformers import BitsAndBytesConfig as TransformersBitsAndBytesConfig
from transformers import Qwen2_5_VLForConditionalGeneration

_QUANTIZERS = (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer)


def write_quantized_pipeline(pipeline: Path, folder: Path, **options: Any) -> tuple[Any, Any]:
    """A copy of a pipeline folder, its transformer and text encoder quantized by bitsandbytes; returns both as loaded.

    `options` are the arguments of a BitsAndBytesConfig.
    """
    shutil.copytree(pipeline, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(pipeline / "vae", folder / "vae", dirs_exist_ok=True)
    transformer = load_quantized(pipeline / "transformer", BitsAndBytesConfig(**options))
    text_encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        pipeline / "text_encoder",
        dtype=torch.float32,
        device_map={"": "cpu"},
        quantization_config=TransformersBitsAndBytesConfig(**options),
    )
    transformer.save_pretrained(folder / "transformer")
    text_encoder.save_pretrained(folder / "text_encoder")
    return transformer, text_encoder


def load_quantized(folder: Path, config: BitsAndBytesConfig | None = None) -> Any:
    """diffusers' transformer in fp32 with bitsandbytes' layers: quantized by `config`, or as the folder stores them."""
    quantization = {} if config is None else {"quantization_config": config}
    # diffusers refuses to start without a GPU, and bitsandbytes then works without one
    with (
        patch.object(_QUANTIZERS[0], "validate_environment", lambda *a, **k: None),
        patch.object(_QUANTIZERS[1], "validate_environment", lambda *a, **k: None),
    ):
        model = QwenImageTransformer2DModel.from_pretrained(
            folder, torch_dtype=torch.float32, device_map={"": "cpu"}, **quantization
        )
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # the first forward would repack the weights in place
    return model


def dequantized(model: Any) -> dict[str, torch.Tensor]:
    """The state dict of a model with bitsandbytes' layers as they decode their weights, in fp32."""
    state = {name: p.data.float() for name, p in model.named_parameters() if p.is_floating_point()}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = module.weight
            state[f"{name}.weight"] = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            weight = module.weight
            scb = weight.SCB if weight.SCB is not None else module.state.SCB
            state[f"{name}.weight"] = bitsandbytes.functional.int8_vectorwise_dequant(weight.data, scb)
    return state
