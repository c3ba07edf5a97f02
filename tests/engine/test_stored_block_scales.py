"""Linear layers that compute on nvfp4 and mxfp8 as stored.

torch has their products on cards of the newest kind alone. Here a stand-in multiplies what those are given, decoded,
for ComfyUI's own layers too: the same bits show that both give the same numbers and scales, not what a card makes of
them.
"""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from block_scaled_stand_ins import stand_in
from comfy_files import quantized
from comfyui_layers import comfyuis_linear
from live_bytes import LiveBytes
from one_layer import an_input, streamed
from qwenimage_lowvram.engine.compute import stored_products
from qwenimage_lowvram.engine.compute.block_scaled_products import Mxfp8Product, Nvfp4Product
from qwenimage_lowvram.engine.compute.linear_choice import Computing, LinearChoice, choose_linear
from qwenimage_lowvram.engine.compute.linear_layers import LayerScratch, LinearLayers
from qwenimage_lowvram.engine.compute.product_trials import MXFP8, NVFP4
from qwenimage_lowvram.engine.hardware import Hardware
from safetensors.torch import save_file
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
KINDS = ("nvfp4", "nvfp4 with a scale of x", "mxfp8")
SHAPES = [(5, 256, 96), (70, 512, 288), (33, 256, 128)]  # tokens, columns, rows
REAL_SHAPE = 17, 3072, 12288


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for torch's."""
    stand_in(monkeypatch)


def chosen() -> LinearChoice:
    return choose_linear(Computing.FAST, [Hardware.detect(CPU)], torch.bfloat16, [NVFP4, MXFP8])


def a_layer(kind: str, columns: int, rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator) * torch.logspace(-2, 0, rows)[:, None] / columns**0.5
    parts = quantized(weight, kind.split()[0])
    if "with" in kind:
        parts["input_scale"] = torch.tensor(0.05)
    bias = torch.randn(rows, generator=generator).to(dtype)
    return {f"layer.{key}": value.contiguous() for key, value in parts.items()} | {"layer.bias": bias}


def require_as_comfyui(kind: str, shape: tuple[int, int, int], dtype: torch.dtype, file: Path) -> None:
    tokens, columns, rows = shape
    state = a_layer(kind, columns, rows, dtype)
    save_file(state, file)
    x = an_input(tokens, columns, dtype)
    own = comfyuis_linear(state, "layer", (rows, columns), dtype)
    with torch.inference_mode():  # as ComfyUI runs; elsewhere its nvfp4 decodes what has a bias
        expected = own(x.clone())
        with streamed(file, columns, rows, dtype, chosen(), Hardware.detect(CPU)) as ours:
            computed = ours(x)
            assert torch.equal(computed, expected)
            third = rows // 3
            assert torch.equal(ours.of_rows(x, third, 2 * third), computed[..., third : 2 * third])
            for name, part in ours.named_parameters():
                if name == "weight":
                    assert torch.equal(part.view(torch.uint8), state["layer.weight"].view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_gives_a_product_bit_for_bit_what_comfyuis_does(
    kind: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    tmp_path: Path,
    products: None,
    comfy: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stored_products, "SCRATCH_BYTES", 1)  # as few tokens at a time as there ever are
    require_as_comfyui(kind, shape, dtype, tmp_path / "m.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_of_real_size_gives_a_product_bit_for_bit_what_comfyuis_does(
    kind: str, tmp_path: Path, products: None, comfy: ModuleType
) -> None:
    require_as_comfyui(kind, REAL_SHAPE, torch.bfloat16, tmp_path / "m.safetensors")


def test_a_cpu_has_no_such_products_and_that_is_said() -> None:
    choice = chosen()
    assert not choice.backends
    for name in ("nvfp4", "mxfp8"):
        assert f"comfy-kitchen's {name} products do not work on 'cpu'" in choice.why_not


def test_tokens_that_share_a_scale_are_not_given_to_an_mlp_in_chunks() -> None:
    assert Nvfp4Product("cuda").of_all_tokens
    assert not Nvfp4Product("cuda", scaled=True).of_all_tokens
    assert not Mxfp8Product("cuda").of_all_tokens
    scratch = [LayerScratch(1, 1, None)]
    assert LinearLayers.of(["nvfp4"], scratch, of_all_tokens=True).of_all_tokens


@pytest.mark.parametrize("product", [Nvfp4Product("eager", scaled=True), Mxfp8Product("eager")], ids=str)
def test_what_quantizing_takes_is_what_is_planned_for_it(
    product: Nvfp4Product | Mxfp8Product,
) -> None:
    from comfy_kitchen.backends.eager import quantization

    x = an_input(1024, 1024, torch.bfloat16)[0]
    with LiveBytes("cpu") as live:
        if isinstance(product, Nvfp4Product):
            quantization.quantize_nvfp4(x, torch.ones(()))
        else:
            quantization.quantize_mxfp8(x)
    assert 0.6 < (live.peak - x.nbytes) / (1024 * product.row_bytes(1024, 128, 2)) <= 1


def test_a_product_that_is_wrong_is_not_used(products: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy_kitchen

    assert chosen().backends == {"nvfp4": "eager", "mxfp8": "eager"}
    right = comfy_kitchen.scaled_mm_nvfp4
    monkeypatch.setattr(comfy_kitchen, "scaled_mm_nvfp4", lambda *args, **of: 1.2 * right(*args, **of))
    choice = chosen()
    assert choice.backends == {"mxfp8": "eager"}
    assert "nvfp4 products are wrong on 'cpu'" in choice.why_not
