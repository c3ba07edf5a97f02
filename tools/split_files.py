"""Write a pipeline folder's weights the way ComfyUI's users have them: one file each, in its key names and formats."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from comfy_files import KINDS, note_bytes, quantized
from gguf_files import write_gguf_text_encoder, write_gguf_transformer
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True)
class SplitFiles:
    """Names of the split files, as ComfyUI's loaders list them."""

    transformer: str
    text_encoder: str
    vae: str


def write_split_files(
    pipeline: Path,
    models: Path,
    *,
    dtype: str = "bf16",
    text_dtype: str | None = None,
    vae_dtype: str | None = None,
    prefix: str = "",
    name: str = "small_qwen_image",
    outside: bool = False,
) -> SplitFiles:
    """Write the three components below `models` (diffusion_models, text_encoders, vae) and return the file names.

    dtype, text_dtype: bf16, fp16, fp32; fp8 (a plain cast of the blocks' matrices, the rest bf16); fp8_scaled (with
    `scale_weight` and the marker `scaled_fp8`); fp8_quant, fp8_quant_row, fp8_quant_row_flat (with `weight_scale` of
    shape (), (N, 1), (N,) and `comfy_quant`, ComfyUI's newer files); fp8mixed (the same, modulations in bf16); int8,
    int8_row, int8_convrot (ComfyUI's int8; the text encoder's embeddings too); nvfp4, mxfp8, convrot_w4a4 (ComfyUI's as
    well); asym_w4a8_int8 (from comfy-kitchen 0.2.27 on); gguf_q8_0, gguf_q4_0, ... (GGUF files).
    text_dtype defaults to fp8_scaled beside any fp8, vae_dtype to bf16 (fp32 beside fp32). `prefix` stands before the
    transformer's keys ("model.diffusion_model."; never in GGUF files, whose converters take it off).
    Configurations lie in the metadata under "config", because a small model's heads cannot be told from shapes.
    """
    text_dtype = text_dtype or ("fp8_scaled" if dtype.startswith("fp8") else dtype)
    vae_dtype = vae_dtype or ("fp32" if dtype == "fp32" else "bf16")
    names = SplitFiles(
        transformer=f"{name}_{'prefixed_' if prefix else ''}{dtype}.{_suffix(dtype)}",
        text_encoder=f"{name}_text_encoder_{text_dtype}.{_suffix(text_dtype)}",
        vae=f"{name}_vae_{vae_dtype}.safetensors",
    )
    _save(models / "diffusion_models" / names.transformer, pipeline / "transformer", dtype, prefix, outside=outside)
    _save(models / "text_encoders" / names.text_encoder, pipeline / "text_encoder", text_dtype)
    vae = {wan_vae_name(key): value for key, value in _load_weights(pipeline / "vae").items()}
    _save_safetensors(models / "vae" / names.vae, _store(vae, vae_dtype), _config(pipeline / "vae"))
    return names


def _store(weights: Mapping[str, Tensor], dtype: str, *, outside: bool = False) -> dict[str, Tensor]:
    """The weights in a storage format; matrices of blocks and layers quantized, where the format does that, and those
    outside them."""
    if dtype in _DTYPES:
        return {key: value.to(_DTYPES[dtype]) for key, value in weights.items()}
    places = (*_QUANTIZED, *(_EMBEDDINGS if dtype.startswith("int8") else ()), *(OUTSIDE if outside else ()))
    stored: dict[str, Tensor] = {}
    for key, value in weights.items():
        matrix = key.endswith(".weight") and value.ndim == 2 and key.startswith(places)
        narrow = dtype == "convrot_w4a4" and value.shape[-1] % 64  # its blocks are wider than such rows
        if not matrix or narrow or (dtype == "fp8mixed" and "_mod." in key):
            stored[key] = value.to(torch.bfloat16)
            continue
        layer = key.removesuffix(".weight")
        for part, tensor in _PARTS[dtype](value.float()).items():
            stored[f"{layer}.{part}"] = tensor
    if dtype == "fp8_scaled":
        stored["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    return stored


def _fp8_plain(weight: Tensor) -> dict[str, Tensor]:
    return {"weight": weight.to(torch.float8_e4m3fn)}


def _fp8_scaled(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "scale_weight": scale}


def _fp8_quant(weight: Tensor) -> dict[str, Tensor]:
    parts = _fp8_scaled(weight)
    return {"weight": parts["weight"], "weight_scale": parts["scale_weight"], "comfy_quant": _comfy_quant()}


def _fp8_quant_row(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().amax(dim=1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max  # (N, 1)
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale, "comfy_quant": _comfy_quant()}


def _fp8_quant_row_flat(weight: Tensor) -> dict[str, Tensor]:
    parts = _fp8_quant_row(weight)
    return parts | {"weight_scale": parts["weight_scale"].flatten()}


def _comfy_quant() -> Tensor:
    return note_bytes({"format": "float8_e4m3fn"})


# where matrices are stored in the format; the rest stays in bf16
_QUANTIZED = ("transformer_blocks.", "model.layers.", "visual.blocks.")
OUTSIDE = ("img_in.", "txt_in.", "time_text_embed.timestep_embedder.", "norm_out.", "proj_out.")
_EMBEDDINGS = ("model.embed_tokens.",)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_PARTS: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {
    "fp8": _fp8_plain,
    "fp8_scaled": _fp8_scaled,
    "fp8_quant": _fp8_quant,
    "fp8_quant_row": _fp8_quant_row,
    "fp8_quant_row_flat": _fp8_quant_row_flat,
    **{kind: partial(quantized, kind=kind) for kind in (*KINDS, "asym_w4a8_int8")},
}


def _load_weights(folder: Path) -> dict[str, Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def _save(file: Path, component: Path, dtype: str, prefix: str = "", *, outside: bool = False) -> None:
    """The weights of a transformer's or text encoder's folder as one file."""
    weights = _load_weights(component)
    if dtype.startswith("gguf_"):
        file.parent.mkdir(parents=True, exist_ok=True)
        write = write_gguf_transformer if component.name == "transformer" else write_gguf_text_encoder
        write(file, weights, _config(component), dtype.removeprefix("gguf_").upper())
    else:
        stored = _store(weights, dtype, outside=outside)
        _save_safetensors(file, {prefix + key: value for key, value in stored.items()}, _config(component))


def _save_safetensors(file: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.contiguous() for key, value in weights.items()}
    save_file(tensors, file, metadata={"format": "pt", "config": json.dumps(config)})


def _config(component: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((component / "config.json").read_text(encoding="utf-8"))
    return config


def _suffix(dtype: str) -> str:
    return "gguf" if dtype.startswith("gguf_") else "safetensors"


_WAN_RESNET = {
    "norm1.": "residual.0.",
    "conv1.": "residual.2.",
    "norm2.": "residual.3.",
    "conv2.": "residual.6.",
    "conv_shortcut.": "shortcut.",
}
_WAN_ENDS = {
    "quant_conv.": "conv1.",
    "post_quant_conv.": "conv2.",
    "encoder.conv_in.": "encoder.conv1.",
    "decoder.conv_in.": "decoder.conv1.",
    "encoder.norm_out.": "encoder.head.0.",
    "decoder.norm_out.": "decoder.head.0.",
    "encoder.conv_out.": "encoder.head.2.",
    "decoder.conv_out.": "decoder.head.2.",
}


def wan_vae_name(key: str) -> str:
    """ComfyUI's name of a diffusers VAE tensor: the inverse of diffusers' convert_wan_vae_to_diffusers.

    Of the real shape only: two resnets per encoder level, three and an upsampler per decoder level.
    """
    for ours, theirs in _WAN_ENDS.items():
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    half, kind, rest = key.split(".", 2)
    if kind == "mid_block":
        part, index, rest = rest.split(".", 2)
        place = "middle.1" if part == "attentions" else f"middle.{2 * int(index)}"
    elif kind == "down_blocks":
        index, rest = rest.split(".", 1)
        place = f"downsamples.{index}"
    else:
        level, part, index, rest = rest.split(".", 3)
        place = f"upsamples.{4 * int(level) + (int(index) if part == 'resnets' else 3)}"
    for ours, theirs in _WAN_RESNET.items():
        if rest.startswith(ours):
            rest = theirs + rest.removeprefix(ours)
    return f"{half}.{place}.{rest}"
