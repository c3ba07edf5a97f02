"""LoRAs of Qwen-Image-2.1's gate and projection, through our node and ComfyUI's loaders, on both kinds of its files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import make_parts, write_lora
from qwenimage_lowvram.engine.errors import Unsupported, WrongModel
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.lora.lora_file import match_model, open_lora
from qwenimage_lowvram.engine.models.qwen_image_21.tensors import JOINED_LAYER, SPLIT_LAYERS
from qwenimage_lowvram.engine.models.qwen_image_21.transformer import QwenImage21Transformer
from safetensors.torch import load_file, save_file
from small_transformer_21 import random_weights, write_file, write_folder
from torch import Tensor

from .test_model import ksampler
from .test_model_21 import latent, prompt
from .test_whole_lora import parts_of

LAYERS = [f"transformer_blocks.{i}.{name}" for i in (0, 2, 4) for name in (*SPLIT_LAYERS, "attn.to_q")]
GATE, PROJ = SPLIT_LAYERS


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, weights = tmp_path_factory.mktemp("small"), random_weights()
    return {
        "joined": write_file(folder / "qwen_image_2.1.safetensors", weights),
        "apart": write_folder(folder / "transformer", weights),
    }


def model_of(path: Path) -> Any:
    from qwenimage_lowvram.nodes.adapters.model_21 import make_model_21

    hardware = Hardware.detect(torch.device("cpu"))
    return make_model_21(QwenImage21Transformer(open_checkpoint(path), dtype=torch.float32, hardware=hardware), None)


@pytest.fixture
def lora(models: Any, tmp_path: Path) -> Path:
    """In models/loras, by the names of diffusers' folder."""
    models("loras", str(tmp_path / "loras"))
    (tmp_path / "loras").mkdir()
    weights = random_weights()
    layers = {
        name: make_parts("lora", weights[f"{name}.weight"].shape, seed=i) | {"alpha": torch.tensor(2.0)}
        for i, name in enumerate(LAYERS)
    }
    return write_lora(tmp_path / "loras" / "halves.safetensors", layers, "diffusion_model, down and up")


def run(model: Any) -> Tensor:
    return ksampler(model, prompt(1), prompt(2), latent(), steps=2)


def by_our_node(model: Any, file: Path, strength: float) -> tuple[Any, str]:
    from qwenimage_lowvram.nodes.lora import QwenLowVRAMLoadLora

    patched, report = QwenLowVRAMLoadLora().load(model, file.name, strength)["result"]
    return patched, report


def by_comfyui(model: Any, tensors: dict[str, Tensor], strength: float) -> Any:
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, tensors, strength, 0.0)[0]


def tensors_of(file: Path) -> dict[str, Tensor]:
    with torch.inference_mode(False):
        return load_file(file)


def test_every_key_is_used_and_both_files_make_the_same_image(comfy: Any, paths: dict[str, Path], lora: Path) -> None:
    images = {}
    for layout, path in paths.items():
        model = model_of(path)
        plain = run(model)
        ours, report = by_our_node(model, lora, 0.8)
        keys = len(LAYERS) * 3
        assert f"{keys} of {keys} keys of" in report
        assert f"are used; they change {len(LAYERS)} weights." in report
        images[layout] = run(ours)
        assert not torch.equal(images[layout], plain)
        assert torch.equal(run(by_comfyui(model, tensors_of(lora), 0.8)), images[layout])
        assert torch.equal(run(model), plain)
    assert torch.equal(images["joined"], images["apart"])


@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_"])
@pytest.mark.parametrize("layout", ["joined", "apart"])
def test_comfyuis_loaders_take_both_spellings(
    layout: str, prefix: str, comfy: Any, paths: dict[str, Path], lora: Path, tmp_path: Path
) -> None:
    import comfy.sd

    spelled = {}
    for key, value in tensors_of(lora).items():
        name, end = key.removeprefix("diffusion_model."), ""
        for part in (".lora_up.weight", ".lora_down.weight", ".alpha"):
            if name.endswith(part):
                name, end = name.removesuffix(part), part
        spelled[prefix + (name.replace(".", "_") if prefix == "lora_unet_" else name) + end] = value
    model = model_of(paths[layout])
    expected = run(by_our_node(model, lora, 0.8)[0])
    assert torch.equal(run(by_comfyui(model, spelled, 0.8)), expected)
    bypassed = comfy.sd.load_bypass_lora_for_models(model, None, tensors_of(lora), 0.8, 0.0)[0]
    assert torch.equal(run(bypassed), expected)


@pytest.mark.parametrize("kind", ["lora", "OFT"])
def test_rows_as_newer_comfyuis_name_them_are_their_layers(
    kind: str, comfy: Any, paths: dict[str, Path], tmp_path: Path
) -> None:
    """There the keys of gate and projection are parts of the joined weight: (name, (0, first row, rows))."""
    import comfy.lora

    rows, columns = random_weights()[f"transformer_blocks.0.{GATE}.weight"].shape
    generator = torch.Generator().manual_seed(3)
    layers = [f"transformer_blocks.{i}.{half}" for i in (0, 3) for half in SPLIT_LAYERS]
    tensors = {}
    for i, layer in enumerate(layers):
        parts = (
            make_parts("lora", (rows, columns), seed=i)
            if kind == "lora"
            else parts_of(kind, (rows, columns), generator)
        )
        names = {"up": "lora_up.weight", "down": "lora_down.weight"}
        tensors |= {f"{layer}.{names.get(part, part)}": value for part, value in parts.items()}
    file, folder = model_of(paths["joined"]), model_of(paths["apart"])
    expected = run(by_comfyui(folder, {f"diffusion_model.{key}": value for key, value in tensors.items()}, 0.7))
    to_load = {
        layer: (f"diffusion_model.{layer.replace(half, JOINED_LAYER)}.weight", (0, start, rows))
        for layer in layers
        for half, start in ((GATE, 0), (PROJ, rows))
        if layer.endswith(half)
    }
    patches = comfy.lora.load_lora(tensors, to_load, log_missing=False)
    assert len(patches) == len(layers)
    patched = file.clone()
    assert len(patched.add_patches(patches, 0.7)) == len(layers)
    assert torch.equal(run(patched), expected)
    with pytest.raises(Unsupported) as refused:
        file.clone().add_patches({(key[0], (0, 1, rows)): patch for key, patch in patches.items()}, 0.7)
    assert refused.value.code == "graph.lora_of_a_part"


@pytest.mark.parametrize("kind", ["OFT", "BOFT", "GLoRA"])
def test_kinds_that_comfyui_computes_reach_halves_too(
    kind: str, comfy: Any, paths: dict[str, Path], models: Any, tmp_path: Path
) -> None:
    models("loras", str(tmp_path))
    weights, generator = random_weights(), torch.Generator().manual_seed(1)
    tensors = {}
    for layer in LAYERS:
        rows, columns = weights[f"{layer}.weight"].shape
        parts = parts_of(kind, (rows, columns), generator)
        # LyCORIS' own prefix is one that ComfyUI knows of its own classes of models alone
        tensors |= {f"lora_unet_{layer.replace('.', '_')}.{part}": value for part, value in parts.items()}
    # SimpleTuner's spelling is one that ComfyUI maps for its own classes of models alone
    save_file(
        {key.replace("lycoris_", "lora_unet_"): value for key, value in tensors.items()}, tmp_path / "m.safetensors"
    )
    images = []
    for path in paths.values():
        ours, report = by_our_node(model_of(path), tmp_path / "m.safetensors", 0.7)
        assert f"{len(tensors)} of {len(tensors)} keys" in report
        images.append(run(ours))
    assert torch.equal(*images)


@pytest.mark.parametrize("keys", ["attention alone", "all layers"])
def test_a_lora_of_the_20b_family_is_refused_by_name(
    keys: str, comfy: Any, paths: dict[str, Path], models: Any, tmp_path: Path
) -> None:
    models("loras", str(tmp_path))
    dim, wide = 128, 384
    layers = {f"transformer_blocks.{i}.attn.to_q": (dim + 64, dim + 64) for i in range(2)}
    if keys == "all layers":  # of a width that would fit
        layers = dict.fromkeys(layers, (dim, dim))
        layers |= {f"transformer_blocks.{i}.img_mlp.net.2": (dim, wide) for i in range(2)}
        layers |= {f"transformer_blocks.{i}.attn.add_k_proj": (dim, dim) for i in range(2)}
    parts = {name: make_parts("lora", shape) for name, shape in layers.items()}
    write_lora(tmp_path / "20b.safetensors", parts, "ai-toolkit")
    model = model_of(paths["joined"])
    with pytest.raises(WrongModel, match=r"hoose a LoRA for Qwen-Image-2\.1") as refused:
        by_our_node(model, tmp_path / "20b.safetensors", 1.0)
    if keys == "all layers":
        assert "made for the 20B Qwen-Image family" in str(refused.value)
        return
    with pytest.raises(WrongModel, match=r"hoose a LoRA for Qwen-Image-2\.1"):
        by_comfyui(model, tensors_of(tmp_path / "20b.safetensors"), 1.0)


def test_a_lora_of_2_1_on_the_20b_family_is_refused_by_name(
    model: Any, small_pipeline: Path, models: Any, tmp_path: Path
) -> None:
    models("loras", str(tmp_path))
    layers = {"transformer_blocks.0.attn.to_q": (64, 64), f"transformer_blocks.0.{GATE}": (128, 64)}
    parts = {name: make_parts("lora", shape) for name, shape in layers.items()}
    write_lora(tmp_path / "21.safetensors", parts, "ai-toolkit")
    with pytest.raises(WrongModel, match=r"made for Qwen-Image-2\.1\. Choose a LoRA for Qwen-Image\.$"):
        by_our_node(model, tmp_path / "21.safetensors", 1.0)


def test_another_lora_computes_the_kept_prefix_again(comfy: Any, paths: dict[str, Path], lora: Path) -> None:
    model = model_of(paths["joined"])
    kept = model.model.transformer.store.kept
    run(model)
    run(model)
    once = kept.made_tokens
    patched = model.clone()
    patched.add_lora(match_model(open_lora(lora), model.model.transformer), 0.5)
    image = run(patched)
    assert kept.made_tokens == 2 * once
    fresh = model_of(paths["joined"])
    fresh.add_lora(match_model(open_lora(lora), fresh.model.transformer), 0.5)
    assert torch.equal(run(fresh), image)
