"""A LoRA on weights of any format, wherever they live, equals the LoRA merged into the decoded weights."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from qwenimage_lowvram.engine.caches.requantized_weights import RequantizedWeights
from qwenimage_lowvram.engine.files.checkpoint import Checkpoint, open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.lora.lora_file import match, open_lora
from qwenimage_lowvram.engine.lora.weight_patches import lora_patches
from qwenimage_lowvram.engine.models.qwen_image.tensors import sort_transformer
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer, TimestepRounding
from qwenimage_lowvram.engine.streaming import read_params
from safetensors.torch import save_file
from torch import Tensor

from .test_transformer import LAYERS, Tiny, diffusers_forward, make_branch, run

RANK = 4


@pytest.fixture
def lora_file(tiny: Tiny, tmp_path: Path) -> Path:
    """Of every matrix in the blocks, the modulation's too, with alpha. fp32 holds its products without rounding."""
    model, _ = tiny(torch.float32)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, weight in model.named_parameters():
        if name.startswith("transformer_blocks.") and weight.ndim == 2:
            layer = name.removesuffix(".weight")
            for part, shape in (("up", (weight.shape[0], RANK)), ("down", (RANK, weight.shape[1]))):
                few_bits = torch.randint(-8, 9, shape, generator=generator) / 32
                tensors[f"{layer}.lora_{part}.weight"] = few_bits
            tensors[f"{layer}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


def in_format(folder: Path, name: str, cache: Path) -> Checkpoint:
    checkpoint = open_checkpoint(folder)
    if name == "as stored":
        return checkpoint
    weights = RequantizedWeights.of(checkpoint, name, cache)
    assert weights is not None
    return weights.make(torch.device("cpu"))


def decoded(checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    result = {}
    for i, block in enumerate(sort_transformer(checkpoint).blocks):
        prefix = f"transformer_blocks.{i}."
        inside = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        for name, weight in read_params(block, inside, torch.float32, "cache").items():
            result[prefix + name] = weight
    return result


def merge(weights: dict[str, Tensor], file: Path, strength: float) -> None:
    from safetensors.torch import load_file

    tensors = load_file(file)
    for key, down in tensors.items():
        if key.endswith(".lora_down.weight"):
            layer = key.removesuffix(".lora_down.weight")
            delta = tensors[f"{layer}.lora_up.weight"] @ down
            weights[f"{layer}.weight"] += strength * 2.0 / RANK * delta


@pytest.mark.slow
@pytest.mark.parametrize("name", ["as stored", "fp8_e4m3fn_scaled", "int8", "nf4"])
def test_a_lora_on_any_format_equals_the_merged_weights(
    name: str, tiny: Tiny, hardware: Hardware, lora_file: Path, tmp_path: Path
) -> None:
    model, folder = tiny(torch.float32)
    checkpoint = in_format(folder, name, tmp_path / "cache")
    transformer = QwenImageTransformer(
        checkpoint, dtype=torch.float32, hardware=hardware, rounding=TimestepRounding.DIFFUSERS
    )
    lora = match(open_lora(lora_file), transformer.weights)
    shapes = {key: tuple(weight.shape) for key, weight in model.named_parameters()}
    branches = [make_branch(9), make_branch(5)]
    for strength in (1.0, -0.6, 0.0):
        weights = decoded(checkpoint, shapes)
        merge(weights, lora_file, strength)
        reference = copy.deepcopy(model)
        reference.load_state_dict({**reference.state_dict(), **weights})
        expected = [diffusers_forward(reference, branch) for branch in branches]
        transformer.patch(lora_patches([(lora, strength)]))
        for resident, held in (((), ()), ((0, 2), (1, 4)), (range(LAYERS), ())):
            transformer.load(resident, held)
            for result, wanted in zip(run(transformer, branches), expected, strict=True):
                assert (result - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_stacked_loras_are_rounded_once(tiny: Tiny, cpu: Hardware, lora_file: Path) -> None:
    """In bf16, two halves of a LoRA are the whole one, which two roundings would not be."""
    _, folder = tiny(torch.bfloat16)
    transformer = QwenImageTransformer(open_checkpoint(folder), dtype=torch.bfloat16, hardware=cpu)
    lora = match(open_lora(lora_file), transformer.weights)
    results = []
    for stack in ([(lora, 1.0)], [(lora, 0.5), (lora, 0.5)]):
        transformer.patch(lora_patches(stack))
        transformer.load(range(LAYERS))
        results.append(run(transformer, [make_branch(9, dtype=torch.bfloat16)])[0])
    assert torch.equal(*results)


def test_the_modulation_table_is_kept_where_a_lora_leaves_it_alone(tiny: Tiny, cpu: Hardware, lora_file: Path) -> None:
    _, folder = tiny(torch.float32)
    transformer = QwenImageTransformer(open_checkpoint(folder), dtype=torch.float32, hardware=cpu)
    whole = match(open_lora(lora_file), transformer.weights)
    spared = {name: delta for name, delta in whole.deltas.items() if "_mod." not in name}
    without = replace(whole, deltas=spared)
    transformer.load([])
    transformer.modulation.announce([0.5])
    once = transformer.modulation.fetched_bytes
    transformer.patch(lora_patches([(without, 1.0)]))
    transformer.modulation.announce([0.5])
    assert transformer.modulation.fetched_bytes == once
    transformer.patch(lora_patches([(whole, 1.0)]))
    transformer.modulation.announce([0.5])
    assert transformer.modulation.fetched_bytes > 2 * once  # the LoRA's own bytes come with them
