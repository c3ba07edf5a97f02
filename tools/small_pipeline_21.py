"""A small pipeline folder of Qwen-Image-2.1 with random weights, and diffusers' pipeline of it where it has one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from small_checkpoint import make_tokenizer
from small_qwen3_vl import LEAST_PX, Size, make_processor, make_qwen3_vl
from small_transformer_21 import SMALL, random_weights
from small_transformer_21 import write_folder as write_transformer
from small_vae_21 import random_vae_21
from small_vae_21 import write_folder as write_vae
from torch import Tensor

# of the published folder (Qwen-Image-2.1, scheduler_config.json)
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
INDEX = {
    "_class_name": "QwenImage21Pipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3VLForConditionalGeneration"],
    "transformer": ["diffusers", "QwenImage21Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage21"],
    "processor": ["transformers", "Qwen3VLProcessor"],
}


def make_pipeline_21(
    folder: Path, *, comfyui: Path | None = None, sample_sigmas: list[float] | None = None, whole_tokens: bool = False
) -> Path:
    """sample_sigmas: of 2.1-Turbo. whole_tokens: the published tokenizer, which single files are read with."""
    size = Size()
    tokenizer = make_tokenizer(full=whole_tokens, comfyui=comfyui)
    config = replace(SMALL, prompt_dim=size.hidden)
    write_transformer(folder / "transformer", random_weights(config), config)
    make_qwen3_vl(tokenizer, size).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "processor")
    write_vae(folder / "vae", random_vae_21())
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER), encoding="utf-8")
    index = {**INDEX, **({"sample_sigmas": sample_sigmas} if sample_sigmas else {})}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def open_with_diffusers(folder: Path, *, least_px: int = LEAST_PX) -> Any:
    """diffusers' QwenImage21Pipeline, from 0.42 on. least_px: area below which the encoder is shown images enlarged."""
    from diffusers import (
        AutoencoderKLQwenImage21,
        FlowMatchEulerDiscreteScheduler,
        QwenImage21Pipeline,
        QwenImage21Transformer2DModel,
    )
    from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

    pipeline = QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae=AutoencoderKLQwenImage21.from_pretrained(folder / "vae"),
        text_encoder=Qwen3VLForConditionalGeneration.from_pretrained(folder / "text_encoder"),
        processor=make_processor(AutoTokenizer.from_pretrained(folder / "processor"), least_px=least_px),
        transformer=QwenImage21Transformer2DModel.from_pretrained(folder / "transformer"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def without_shift(scheduler: Any) -> Any:
    """A diffusers scheduler that takes sigmas as they are: the published one of 2.1-Turbo."""
    return type(scheduler).from_config(scheduler.config, use_dynamic_shifting=False, shift=1.0, shift_terminal=None)


def packed_noise(width: int, height: int, batch: int, seed: int) -> Tensor:
    """As ComfyUI draws it for a seed, in the order in which the pipeline takes it."""
    noise = torch.randn((batch, 64, height // 16, width // 16), generator=torch.Generator().manual_seed(seed))
    return noise.flatten(2).transpose(1, 2)
