"""Products in fp16 between activations in fp32: finite however large these become, and nearer to fp32 than bf16 is."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from branches_21 import BRANCHES
from lora_files import change_of, make_parts, write_lora
from qwenimage_lowvram.engine.compute.half_products import (
    HalfLinear,
    half_attention,
    half_linear,
    in_half,
    joined,
    narrowed,
)
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.lora.lora_file import match, open_lora
from qwenimage_lowvram.engine.lora.weight_patches import lora_patches
from qwenimage_lowvram.engine.models.qwen_image.branch import Branch
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.models.qwen_image_21.layers import Attention, Block, HalfAttention, Run
from qwenimage_lowvram.engine.models.qwen_image_21.positions import RotaryTables
from qwenimage_lowvram.engine.models.qwen_image_21.tensors import TransformerConfig
from qwenimage_lowvram.engine.models.qwen_image_21.transformer import QwenImage21Transformer
from qwenimage_lowvram.engine.models.streamed_transformer import StreamedTransformer
from safetensors.torch import load_file, save_file
from small_transformer_21 import LAYERS, random_weights, write_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

LARGE = 2e7  # that activations of the published 20B model reach
HALF = torch.float16
RESIDENT = [(), (0,), (1, 3), tuple(range(LAYERS))]


class Largest(TorchFunctionMode):
    """The largest number that a linear layer makes within it."""

    seen = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.linear:
            self.seen = max(self.seen, out.abs().max().item())
        return out


def grown(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights whose values, MLPs and results are far beyond fp16, as fine-tunes may have them."""
    factors = {
        **dict.fromkeys(("to_v.", "add_v_proj."), 3e3),
        **dict.fromkeys(("to_out.0.", "to_add_out."), 3e3),
        **dict.fromkeys(("gate_layer.", "img_mlp.proj.", "mlp.net.0.proj."), 300.0),
        **dict.fromkeys(("img_mlp.out.", "mlp.net.2."), 1e4),
    }
    blocks = {name: weight for name, weight in weights.items() if name.startswith("transformer_blocks.")}
    larger = {
        name: weight * factor for name, weight in blocks.items() for part, factor in factors.items() if part in name
    }
    return {**weights, **larger}


@pytest.fixture(scope="module")
def grown_21(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_file(tmp_path_factory.mktemp("grown") / "2.1.safetensors", grown(random_weights()))


@pytest.fixture(scope="module")
def grown_20b(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., tuple[Any, Path]]) -> Path:
    _, folder = tiny(torch.float32)
    made = tmp_path_factory.mktemp("grown")
    (made / "config.json").write_text((folder / "config.json").read_text())
    name = "diffusion_pytorch_model.safetensors"
    save_file(grown(load_file(folder / name)), made / name)
    return made


def branch_20b(dtype: torch.dtype) -> Branch:
    generator = torch.Generator().manual_seed(5)
    tokens, prompt = (torch.randn(1, n, width, generator=generator) for n, width in ((63, 64), (13, 32)))
    return Branch(tokens.to(dtype), ((1, 7, 9),), prompt.to(dtype), None, 0.7)


Make = Callable[[torch.dtype, Hardware], tuple[StreamedTransformer[Any, Any], list[Any]]]


@pytest.fixture(params=["20B", "2.1"])
def make(request: pytest.FixtureRequest) -> Make:
    """`make(dtype, hardware)` -> a transformer with grown weights, and branches for it."""
    path = request.getfixturevalue({"20B": "grown_20b", "2.1": "grown_21"}[request.param])

    def made(dtype: torch.dtype, hardware: Hardware) -> tuple[StreamedTransformer[Any, Any], list[Any]]:
        if request.param == "20B":
            transformer = QwenImageTransformer(open_checkpoint(path), dtype=dtype, hardware=hardware)
            return transformer, [branch_20b(transformer.dtype)]
        other = QwenImage21Transformer(open_checkpoint(path), dtype=dtype, hardware=hardware)
        return other, BRANCHES["two references"](other.dtype)

    return made


def run(
    transformer: StreamedTransformer[Any, Any], branches: Sequence[Any], resident: Sequence[int] = (), **options: Any
) -> Tensor:
    transformer.load(resident)
    with transformer.session(**{"slots": 2, **options}) as session:
        return torch.cat(session.forward(branches)).float()


@contextmanager
def plainly_in_fp16(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything in fp16, as other programs have it."""
    with monkeypatch.context() as patched:
        patched.setattr("qwenimage_lowvram.engine.models.network.in_half", lambda module: module)
        patched.setattr("qwenimage_lowvram.engine.models.qwen_image_21.network.HalfAttention", Attention)
        patched.setattr("qwenimage_lowvram.engine.models.streamed_transformer.activations_dtype", lambda dtype: dtype)
        yield


def error(made: Tensor, expected: Tensor) -> float:
    return ((made - expected).norm() / expected.norm()).item()


def test_activations_of_20_million_stay_finite_and_are_nearer_to_fp32_than_bf16s(
    make: Make, cpu: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Largest() as largest:
        expected = run(*make(torch.float32, cpu))
    assert largest.seen > LARGE
    made, bf16 = run(*make(HALF, cpu)), run(*make(torch.bfloat16, cpu))
    assert made.isfinite().all()
    assert error(made, expected) < error(bf16, expected) / 2
    with plainly_in_fp16(monkeypatch):
        assert not run(*make(HALF, cpu)).isfinite().all()


@pytest.mark.slow
def test_whatever_way_the_blocks_take_the_result_is_the_same(make: Make, hardware: Hardware, cpu: Hardware) -> None:
    transformer, branches = make(HALF, cpu)
    expected = run(transformer, branches, RESIDENT[-1])
    transformer, _ = make(HALF, hardware)
    for resident in RESIDENT:
        for slots in (1, 2, 3):
            assert torch.equal(run(transformer, branches, resident, slots=slots), expected)


def test_loras_are_added_to_weights_in_fp16(tmp_path: Path, grown_21: Path, cpu: Hardware) -> None:
    """What they make of a layer may be far beyond fp16, too."""
    layer = "transformer_blocks.2.attn.to_out.0"
    weights = grown(random_weights())
    parts = make_parts("lora", tuple(weights[f"{layer}.weight"].shape), seed=1)
    lora = open_lora(write_lora(tmp_path / "lora.safetensors", {layer: parts}, "OneTrainer"))

    def patched(file: Path, strength: float) -> Tensor:
        transformer = QwenImage21Transformer(open_checkpoint(file), dtype=HALF, hardware=cpu)
        found = match(lora, transformer.weights, transformer.other_names)
        transformer.patch(lora_patches([(found, strength)]))
        return run(transformer, BRANCHES["one"](torch.float32))

    weights[f"{layer}.weight"] += 1e4 * change_of(parts)
    merged = write_file(tmp_path / "merged.safetensors", weights)
    expected, made = patched(merged, 0.0), patched(grown_21, 1e4)
    assert made.isfinite().all()
    assert error(patched(grown_21, 0.0), expected) > 0.01
    assert error(made, expected) < 1e-3


def test_residuals_are_added_to_the_wide_stream(grown_20b: Path, cpu: Hardware) -> None:
    generator = torch.Generator().manual_seed(1)
    added = [3e7 * torch.randn(1, 63, 64, generator=generator) for _ in range(LAYERS)]

    def computed(dtype: torch.dtype) -> Tensor:
        transformer = QwenImageTransformer(open_checkpoint(grown_20b), dtype=dtype, hardware=cpu)
        return run(transformer, [replace(branch_20b(transformer.dtype), residuals=(added,))])

    expected = computed(torch.float32)
    assert error(computed(HALF), expected) < error(computed(torch.bfloat16), expected) / 2


def test_blocks_hold_weights_in_fp16(make: Make, cpu: Hardware) -> None:
    half, wide, narrow = (make(dtype, cpu)[0].footprint for dtype in (HALF, torch.float32, torch.bfloat16))
    assert half.slot_bytes == narrow.slot_bytes < wide.slot_bytes
    assert half.outside_bytes == narrow.outside_bytes
    assert (half.element_bytes, half.in_half) == (4, True)
    assert not wide.in_half
    assert not narrow.in_half


NUMBERS = {
    "usual": (1.0, 1.0),
    "large": (3e7, 1.0),
    "weights as large as fp16 holds": (1.0, 6e4),
    "both": (3e7, 6e4),
    "small": (1e-12, 1e-4),
}


@pytest.mark.parametrize("case", NUMBERS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_as_exact_as_fp16_at_any_size(case: str, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    size, weight_size = NUMBERS[case]
    layer = nn.Linear(512, 96, bias=bias)
    layer.weight.data = torch.rand(96, 512, generator=generator).sub(0.5).mul(2 * weight_size)
    x = torch.randn(2, 20, 512, generator=generator) * size * torch.logspace(0, 6, 20)[:, None]  # token by token
    x[0, 3] = 0
    half = HalfLinear.of(layer).to(HALF)
    expected = F.linear(x.double(), half.weight.double(), None if half.bias is None else half.bias.double())
    made = half(x).detach()
    assert made.dtype == torch.float32
    tokens = (made - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)
    assert tokens.max() < 1e-3  # bf16's: 3e-3
    assert error(half.of_rows(x, 32, 64).detach(), made[..., 32:64]) < 1e-3


def test_sums_that_all_have_one_sign_stay_finite() -> None:
    """Nothing but the bound itself is left between them and infinity."""
    weight, x = torch.full((8, 4096), 6e4, dtype=HALF), torch.full((1, 4096), 1e6)
    made = half_linear(x, weight)
    assert error(made, F.linear(x, weight.float())) < 1e-3


def test_attention_answers_in_fp32_whatever_the_values_are() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 40, 32, generator=generator) for _ in range(3))
    value = value.transpose(1, 2).contiguous().transpose(1, 2) * 3e7
    expected = F.scaled_dot_product_attention(query, key, value)
    with half_attention():
        made = F.scaled_dot_product_attention(query, key, value)
        assert F.scaled_dot_product_attention(query.half(), key.half(), (value / 3e7).half()).dtype == HALF
    assert made.dtype == torch.float32
    assert error(made, expected) < 2e-3


def test_values_in_range_are_joined_with_others() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(1, n, 2, 8, generator=generator) * size for n, size in ((5, 1e7), (3, 1e-3), (4, 3e2))]
    numbers, factor = joined([narrowed(part) for part in parts], dim=1)
    whole = torch.cat(parts, dim=1)
    assert numbers.dtype == HALF
    assert (numbers * factor - whole).abs().max() < 1e-3 * whole.abs().max()
    assert error(numbers[:, 8:] * factor, parts[2]) < 0.01  # what is much smaller than others is less exact beside them


def test_layers_keep_their_parameters_when_they_compute_in_fp16() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.SiLU(), nn.Linear(4, 2, bias=False)))
    before = dict(module.named_parameters())
    after = dict(in_half(module).named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is before[name] for name in before)


REAL_21 = TransformerConfig(
    layers=1, heads=32, head_dim=128, prompt_dim=4096, mlp_dim=12288, rope_axes=(16, 56, 56), joined=True
)


@pytest.mark.slow
@torch.no_grad()
def test_a_block_of_the_real_size_is_nearer_to_fp32_than_bf16s() -> None:
    tokens, dim, shape = 128, REAL_21.inner_dim, (8, 16)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, tokens, dim, generator=generator) * torch.logspace(3, 7, tokens)[:, None]
    modulation = torch.randn(1, 1, 4 * dim, generator=generator)
    rotary = RotaryTables(REAL_21.rope_axes).factors([shape])
    block, half = Block(REAL_21), in_half(Block(REAL_21, HalfAttention))
    for name, weight in block.named_parameters():
        if weight.ndim > 1:
            weight.normal_(std=weight.shape[1] ** -0.5, generator=generator)
            weight *= 300 if "gate_up" in name else 3e3 if "mlp.out" in name else 1
    block.to(torch.bfloat16)  # which all of the dtypes hold

    def computed(by: nn.Module, dtype: torch.dtype) -> Tensor:
        out: Tensor = by(hidden.to(dtype), modulation.to(dtype), rotary, [Run(0, tokens, tokens)], [])
        return out.float()

    half.load_state_dict(block.state_dict())
    made, in_bf16 = computed(half.to(HALF), torch.float32), computed(block, torch.bfloat16)
    del half
    with Largest() as largest:
        expected = computed(block.to(torch.float32), torch.float32)
    assert largest.seen > LARGE
    assert error(made, expected) < error(in_bf16, expected) / 2
