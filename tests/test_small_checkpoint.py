"""The small checkpoint is one that diffusers, ComfyUI and our readers take for a Qwen-Image."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from small_checkpoint import make_pipeline, make_tokenizer
from split_files import wan_vae_name, write_split_files


def test_wan_names_are_the_inverse_of_diffusers_conversion(small_pipeline: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    ours = load_file(small_pipeline / "vae" / "diffusion_pytorch_model.safetensors")
    renamed = {wan_vae_name(name): value for name, value in ours.items()}
    assert len(renamed) == len(ours)
    back = convert_wan_vae_to_diffusers(dict(renamed))
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)


@torch.inference_mode()
def test_comfyui_decodes_the_split_vae_as_diffusers_does(
    small_pipeline: Path, tmp_path: Path, comfy: ModuleType
) -> None:
    import comfy.sd
    from diffusers import AutoencoderKLQwenImage

    files = write_split_files(small_pipeline, tmp_path, dtype="fp32")
    vae = comfy.sd.VAE(sd=load_file(tmp_path / "vae" / files.vae), dtype=torch.float32)
    reference = AutoencoderKLQwenImage.from_pretrained(small_pipeline / "vae")
    latents = torch.randn(1, 16, 1, 6, 10, generator=torch.Generator().manual_seed(0))
    expected = (reference.decode(latents).sample[:, :, 0] / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    assert (vae.decode(latents).reshape(expected.shape) - expected).abs().max() < 1e-5
    assert 0.05 < expected.std() < 0.4


@pytest.mark.parametrize("full", [False, True])
def test_templates_keep_their_number_of_tokens(full: bool, comfyui_path: Path) -> None:
    template = make_tokenizer(full=full, comfyui=comfyui_path)(
        "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
        "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
    )
    assert len(template["input_ids"]) == 34


@pytest.mark.parametrize("text", ["a cat", "水墨画，一只猫", "(red:1.2) [x] {a|b}", "", "naïve 🙂\n\ttab"])
def test_the_pruned_tokenizer_spells_every_text(text: str, comfyui_path: Path) -> None:
    tokenizer = make_tokenizer(full=False, comfyui=comfyui_path)
    assert len(tokenizer) < 600
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_shards_come_with_an_index(tmp_path: Path, comfyui_path: Path) -> None:
    folder = make_pipeline(tmp_path / "sharded", max_shard_size="200KB", comfyui=comfyui_path)
    index = json.loads((folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1


@pytest.mark.parametrize("dtype", ["fp8_scaled", "fp8_quant"])
def test_comfyui_reads_the_scaled_weights_back(
    dtype: str, small_pipeline: Path, tmp_path: Path, comfy: ModuleType
) -> None:
    import comfy.ops
    import comfy.utils

    files = write_split_files(small_pipeline, tmp_path, dtype=dtype)
    stored, _ = comfy.utils.convert_old_quants(load_file(tmp_path / "diffusion_models" / files.transformer))
    layer = "transformer_blocks.0.img_mlp.net.0.proj"
    original = load_file(small_pipeline / "transformer" / "diffusion_pytorch_model.safetensors")[f"{layer}.weight"]
    operations = comfy.ops.mixed_precision_ops({}, compute_dtype=torch.bfloat16)
    linear = operations.Linear(original.shape[1], original.shape[0], dtype=torch.bfloat16)
    linear.load_state_dict({name.removeprefix(f"{layer}."): t for name, t in stored.items() if name.startswith(layer)})
    error = (linear.weight.dequantize().float() - original).abs().max() / original.abs().max()
    assert error < 0.04  # half a step of three mantissa bits is 1/16 of a value; the largest one has its own scale


def test_plain_fp8_keeps_everything_outside_the_matrices_of_blocks(small_pipeline: Path, tmp_path: Path) -> None:
    files = write_split_files(small_pipeline, tmp_path, dtype="fp8", prefix="model.diffusion_model.")
    stored = load_file(tmp_path / "diffusion_models" / files.transformer)
    assert all(name.startswith("model.diffusion_model.") for name in stored)
    kinds = {name.removeprefix("model.diffusion_model."): tensor.dtype for name, tensor in stored.items()}
    assert kinds["transformer_blocks.0.attn.to_q.weight"] is torch.float8_e4m3fn
    assert kinds["transformer_blocks.0.attn.to_q.bias"] is torch.bfloat16
    assert kinds["img_in.weight"] is torch.bfloat16
