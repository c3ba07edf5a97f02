"""LoRAs on our MODEL: through our node and through ComfyUI's, the same image as with weights merged beforehand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from qwenimage_lowvram.engine.errors import InvalidRequest, WrongModel
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.lora.lora_file import match, open_lora
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.planning.draft import least_bytes
from qwenimage_lowvram.engine.planning.request import SamplingRequest
from safetensors.torch import load_file, save_file
from torch import Tensor

from .conftest import cond, empty_latent
from .test_model import ksampler

RANK = 4
IN_BLOCKS = ("attn.to_q", "attn.add_k_proj", "attn.to_out.0", "img_mlp.net.2", "txt_mlp.net.0.proj")
OUTSIDE = ("img_in", "proj_out", "time_text_embed.timestep_embedder.linear_1")
MODULATION = ("img_mod.1", "txt_mod.1")


def layers(kind: str) -> list[str]:
    blocks = [f"transformer_blocks.{i}.{name}" for i in (0, 2, 3) for name in IN_BLOCKS]
    modulation = [f"transformer_blocks.{i}.{name}" for i in range(4) for name in MODULATION]
    return {"blocks": blocks, "outside": list(OUTSIDE), "modulation": modulation}[kind]


@pytest.fixture(scope="module")
def folder(small_pipeline: Path) -> Path:
    return small_pipeline / "transformer"


@pytest.fixture
def lora(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a LoRA file as Lightning's: `lora("blocks", seed=0)`."""
    with torch.inference_mode(False):
        weights = load_file(next(folder.glob("*.safetensors")))

    def write(*kinds: str, seed: int = 0) -> Path:
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for layer in (layer for kind in kinds for layer in layers(kind)):
            rows, columns = weights[f"{layer}.weight"].shape
            tensors[f"{layer}.lora_up.weight"] = torch.randn(rows, RANK, generator=generator)
            tensors[f"{layer}.lora_down.weight"] = torch.randn(RANK, columns, generator=generator) / columns**0.5
            tensors[f"{layer}.alpha"] = torch.tensor(2.0)
        file = tmp_path / f"{'-'.join(kinds)}-{seed}.safetensors"
        save_file(tensors, file)
        return file

    return write


def merged(folder: Path, target: Path, *loras: tuple[Path, float]) -> Path:
    """The transformer with LoRAs added to its weights in fp32, as a folder."""
    with torch.inference_mode(False):
        model = QwenImageTransformer2DModel.from_pretrained(folder)
        weights = dict(model.named_parameters())
        for file, strength in loras:
            tensors = load_file(file)
            for key, down in tensors.items():
                if key.endswith(".lora_down.weight"):
                    layer = key.removesuffix(".lora_down.weight")
                    scale = strength * float(tensors[f"{layer}.alpha"]) / RANK
                    weights[f"{layer}.weight"].data += scale * tensors[f"{layer}.lora_up.weight"] @ down
        model.save_pretrained(target)
    return target


def model_of(folder: Path) -> Any:
    from qwenimage_lowvram.nodes.adapters.model import make_model

    hardware = Hardware.detect(torch.device("cpu"))
    return make_model(QwenImageTransformer(open_checkpoint(folder), dtype=torch.float32, hardware=hardware), None)


def with_lora(model: Any, file: Path, strength: float) -> Any:
    patched = model.clone()
    patched.add_lora(match(open_lora(file), model.model.transformer.weights), strength)
    return patched


def run(model: Any) -> Tensor:
    return ksampler(model, cond(), cond(5, 2), empty_latent(), steps=2)


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-5 * other.abs().max())


@pytest.mark.parametrize("kinds", [("blocks",), ("outside",), ("modulation",), ("blocks", "outside", "modulation")])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_lora_makes_the_image_of_merged_weights(
    streamed: bool, kinds: tuple[str, ...], model: Any, folder: Path, lora: Callable[..., Path], tmp_path: Path
) -> None:
    plain = run(model)
    first, second = lora(*kinds), lora("blocks", seed=1)
    if streamed:
        model.model.limit_bytes = int(
            1.3 * least_bytes(model.model.transformer.footprint, SamplingRequest(96, 64, 2, 9))
        )
    for stack in ([(first, 1.0)], [(first, -0.5), (second, 0.7)], [(second, 2.0)]):
        patched = model
        for file, strength in stack:
            patched = with_lora(patched, file, strength)
        image = run(patched)
        report = model.model.last_report
        assert (len(report.plan.resident) < report.plan.blocks) == streamed
        assert report.plan.peak_bytes <= report.plan.limit_bytes
        expected = run(model_of(merged(folder, tmp_path / f"{len(stack)}{stack[0][1]}", *stack)))
        assert close(image, expected)
        assert not close(image, plain)
    assert torch.equal(run(model), plain)  # the base comes back bit for bit


def test_another_strength_reads_only_what_it_changes(model: Any, lora: Callable[..., Path]) -> None:
    file = lora("blocks")
    run(with_lora(model, file, 1.0))
    run(with_lora(model, file, 0.5))
    report = model.model.last_report
    assert report.modulation_bytes == 0
    assert report.fetched_blocks == 3  # block 1 has no LoRA, and stayed
    assert run(with_lora(model, file, 0.5)) is not None
    assert model.model.last_report.fetched_blocks == 0


def test_a_lora_of_the_modulation_computes_its_table_again(model: Any, lora: Callable[..., Path]) -> None:
    run(model)
    run(with_lora(model, lora("modulation"), 1.0))
    assert model.model.last_report.modulation_bytes > 0


PREFIXES = ["", "diffusion_model.", "transformer.", "lora_unet_"]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_comfyuis_own_loader_does_the_same(prefix: str, model: Any, lora: Callable[..., Path]) -> None:
    import comfy.sd

    file = lora("blocks", "modulation")
    with torch.inference_mode(False):
        tensors = load_file(file)
    named = {}
    for key, tensor in tensors.items():
        layer, _, part = key.partition(".lora_") if ".lora_" in key else (key.removesuffix(".alpha"), "", "")
        spelling = layer.replace(".", "_") if prefix == "lora_unet_" else layer
        named[f"{prefix}{spelling}" + (f".lora_{part}" if part else ".alpha")] = tensor
    native, clip = comfy.sd.load_lora_for_models(model, None, named, 0.8, 0.0)
    assert clip is None
    assert torch.equal(run(native), run(with_lora(model, file, 0.8)))


def test_a_lora_of_another_model_is_an_error(model: Any, tmp_path: Path) -> None:
    import comfy.sd

    foreign = {
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.zeros(8, 2),
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.zeros(2, 8),
    }
    with pytest.raises(InvalidRequest, match="None of the LoRA's keys fits"):
        comfy.sd.load_lora_for_models(model, None, foreign, 1.0, 0.0)
    save_file(foreign, tmp_path / "flux.safetensors")
    with pytest.raises(WrongModel, match="Flux"):
        with_lora(model, tmp_path / "flux.safetensors", 1.0)


def test_scales_in_the_metadata_alone_are_told_on_the_node(
    model: Any, lora: Callable[..., Path], models: Any, tmp_path: Path
) -> None:
    from qwenimage_lowvram.nodes.lora import QwenLowVRAMLoadLora

    models("loras", str(tmp_path))
    tensors = {key: value for key, value in load_file(lora("blocks")).items() if not key.endswith("alpha")}
    patched = {}
    for name, settings in (
        ("none", {}),
        ("even", {"lora_alpha": 6}),
        ("by layer", {"alpha_pattern": {"attn.to_q": 2}}),
    ):
        metadata = {"lora_adapter_metadata": json.dumps(settings)}
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata)
        patched[name] = QwenLowVRAMLoadLora().load(model, f"{name}.safetensors", 1.0)["result"]
    assert "metadata" not in patched["none"][1]
    assert "diffusers would multiply the LoRA by 1.5: multiply the strength by it." in patched["even"][1]
    assert "diffusers would multiply the LoRA by 0.5 to 1, layer by layer." in patched["by layer"][1]
    image = run(patched["none"][0])
    assert all(torch.equal(run(one), image) for one, _ in patched.values())
