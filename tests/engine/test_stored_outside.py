"""Linear layers outside a transformer's blocks compute on their weights as stored, as those of the blocks do."""

from collections.abc import Callable
from math import prod
from pathlib import Path
from types import ModuleType

import pytest
import torch
from comfy_files import quantized
from comfyui_layers import comfyuis_linear
from one_layer import an_input
from qwenimage_lowvram.engine.compute.linear_choice import DECODED, Computing, LinearChoice, choose_linear
from qwenimage_lowvram.engine.compute.stored_linear import StoredLinear
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.lora.changes import Matrix, Sum
from qwenimage_lowvram.engine.lora.deltas import Delta
from qwenimage_lowvram.engine.lora.weight_patches import LoraPatch
from qwenimage_lowvram.engine.models.qwen_image.branch import Branch
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")

Tiny = Callable[..., tuple[nn.Module, Path]]
LAYERS = {"img_in": "int8", "proj_out": "int8_convrot", "norm_out.linear": "fp8mixed", "txt_in": "int8_row"}
RANK = 2


@pytest.fixture
def file(tiny: Tiny, tmp_path: Path) -> Path:
    """Some layers outside the blocks quantized, each in a format of its own; all else in bf16."""
    folder = tiny()[1]
    tensors = {name: value for part in folder.glob("*.safetensors") for name, value in load_file(part).items()}
    for layer, kind in LAYERS.items():
        parts = quantized(tensors.pop(f"{layer}.weight"), kind)
        tensors |= {f"{layer}.{name}": value.contiguous() for name, value in parts.items()}
    save_file(
        {
            name: value.bfloat16() if value.dtype == torch.float32 and value.ndim else value
            for name, value in tensors.items()
        },
        tmp_path / "outside.safetensors",
        metadata={"config": (folder / "config.json").read_text()},
    )
    return tmp_path / "outside.safetensors"


@pytest.fixture(scope="module")
def fast() -> LinearChoice:
    return choose_linear(Computing.FAST, [Hardware.detect(torch.device("cpu"))], torch.bfloat16)


def opened(file: Path, linear: LinearChoice, hardware: Hardware) -> QwenImageTransformer:
    transformer = QwenImageTransformer(open_checkpoint(file), dtype=torch.bfloat16, hardware=hardware, linear=linear)
    transformer.load(())
    return transformer


def forward(transformer: QwenImageTransformer) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens, prompt = (torch.randn(1, *size, generator=generator).bfloat16() for size in ((30, 64), (9, 32)))
    with transformer.session(slots=1) as session:
        return session.forward([Branch(tokens, ((1, 5, 6),), prompt, None, 0.7)])[0]


def error(ours: Tensor, other: Tensor) -> float:
    return ((ours - other).norm() / other.norm()).item()


def a_patch(name: str, shape: tuple[int, int], strength: float, folder: Path, *, thin: bool = True) -> LoraPatch:
    """A product of two matrices, or one that can only be added to the weight."""
    (rows, columns), generator = shape, torch.Generator().manual_seed(3)
    parts = {"up": (rows, RANK), "down": (RANK, columns)} if thin else {"diff": shape}
    file = folder / f"{thin}.safetensors"
    save_file({part: torch.randn(size, generator=generator) * 0.2 for part, size in parts.items()}, file)
    entries = open_checkpoint(file).tensors
    return LoraPatch(name, ((Delta(name, shape, Sum(Matrix(tuple(entries[part] for part in parts)))), strength),))


def test_a_layer_outside_computes_bit_for_bit_what_comfyuis_does(
    file: Path, fast: LinearChoice, hardware: Hardware, comfy: ModuleType
) -> None:
    computed, exact, weights = opened(file, fast, hardware), opened(file, DECODED, hardware), load_file(file)
    for name in LAYERS:
        layer = computed.outside.get_submodule(name)
        assert isinstance(layer, StoredLinear)
        x = an_input(30, layer.in_features, torch.bfloat16)
        shape = layer.out_features, layer.in_features
        with torch.no_grad():
            assert torch.equal(layer(x), comfyuis_linear(weights, name, shape, torch.bfloat16)(x.clone()))
    assert 1e-4 < error(forward(computed), forward(exact)) < 0.1
    assert not any(isinstance(layer, StoredLinear) for layer in exact.outside.modules())


def test_the_plan_knows_what_layers_outside_hold_and_take(
    file: Path, fast: LinearChoice, cpu: Hardware, tmp_path: Path
) -> None:
    computed, exact = opened(file, fast, cpu), opened(file, DECODED, cpu)
    numbers = sum(prod(computed.weights[f"{name}.weight"]) for name in LAYERS)
    assert 0.9 * numbers < exact.loaded_bytes - computed.loaded_bytes < numbers
    name = "img_in.weight"
    patch = a_patch(name, computed.weights[name], 0.5, tmp_path)
    for transformer, more in ((computed, sum(computed.weights[name]) * RANK * 4), (exact, 0)):
        for patches, added in (({}, 0), ({name: patch}, more)):
            before = transformer.footprint.outside_bytes
            transformer.patch(patches)
            assert transformer.footprint.outside_bytes == before + added
            assert sum(p.nbytes for p in transformer.outside.parameters()) == before + added
    assert computed.footprint.linear.text == "fp8 by comfy-kitchen eager and int8 by comfy-kitchen eager"
    assert not exact.footprint.linear.text
    assert not any(block.computed for block in computed.store.blocks)


@pytest.mark.parametrize("thin", [True, False])
def test_a_lora_outside_makes_the_image_that_it_makes_within_the_weights(
    thin: bool, file: Path, fast: LinearChoice, cpu: Hardware, tmp_path: Path
) -> None:
    computed, exact = opened(file, fast, cpu), opened(file, DECODED, cpu)
    plain = forward(computed)
    for strength in (0.5, 2.0):
        for transformer in (computed, exact):
            patch = a_patch("proj_out.weight", exact.weights["proj_out.weight"], strength, tmp_path, thin=thin)
            transformer.patch({patch.name: patch})
            transformer.load(())
        assert isinstance(computed.outside.proj_out, StoredLinear) == thin
        assert error(forward(computed), forward(exact)) < 0.1 < error(forward(computed), plain)
    computed.patch({})
    computed.load(())
    assert torch.equal(forward(computed), plain)
