"""Linear layers that compute on asym_w4a8_int8 as stored: bit for bit as ComfyUI's do. This comfy-kitchen may be older
than the format (0.2.27), and this ComfyUI: what its layers call is compared with, too."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import full_size
import pytest
import torch
from comfy_files import note_bytes
from comfyui_layers import comfyuis_formats, comfyuis_linear
from full_size_run import once_a_shape, require_planned_peaks
from kitchen_w4a8 import has_w4a8
from one_layer import an_input, streamed
from qwenimage_lowvram.engine.compute import four_bit_products, stored_products
from qwenimage_lowvram.engine.compute.four_bit_products import W4a8Product
from qwenimage_lowvram.engine.compute.linear_choice import Computing, LinearChoice, choose_linear
from qwenimage_lowvram.engine.compute.linear_layers import LayerScratch
from qwenimage_lowvram.engine.compute.product_trials import W4A8
from qwenimage_lowvram.engine.files.checkpoint import Checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from safetensors.torch import save_file
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "asym_w4a8_int8"
REAL_SHAPE = 5, 3072, 12288
SHAPES = [(5, 256, 16), (70, 512, 288), (1, 256, 64)]  # tokens, columns, rows; of 16 as the codebook
CPU = torch.device("cpu")


with_format = pytest.mark.skipif(not has_w4a8(), reason="this comfy-kitchen is older than the format (0.2.27)")


@pytest.fixture(scope="module")
def fast() -> LinearChoice:
    return choose_linear(Computing.FAST, [Hardware.detect(CPU)], torch.bfloat16, [W4A8])


def a_layer(columns: int, rows: int, dtype: torch.dtype, *, codebook: bool) -> dict[str, Tensor]:
    from comfy_kitchen.tensor import AsymW4A8Int8Layout

    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator) * torch.logspace(-2, 0, rows)[:, None] / columns**0.5
    data, params = AsymW4A8Int8Layout.quantize(weight, codebook=codebook)
    parts = AsymW4A8Int8Layout.state_dict_tensors(data, params)
    note = {"format": NAME, "group_size": 16, "convrot_groupsize": 256}
    bias = torch.randn(rows, generator=generator).to(dtype)
    return {f"layer.weight{suffix}": part for suffix, part in parts.items()} | {
        "layer.comfy_quant": note_bytes(note),
        "layer.bias": bias,
    }


def kitchens_linear(state: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype, x: Tensor) -> Tensor:
    """What ComfyUI's layer calls."""
    from comfy_kitchen.tensor import AsymW4A8Int8Layout, QuantizedTensor

    rel, channel = state["layer.weight_s_rel"], state["layer.weight_s_channel"]
    params = AsymW4A8Int8Layout.Params(
        scale=rel, s_channel=channel, codebook=state.get("layer.weight_codebook"), orig_dtype=dtype, orig_shape=shape
    )
    weight = QuantizedTensor(state["layer.weight"], "AsymW4A8Int8Layout", params)
    return torch.nn.functional.linear(x, weight, state["layer.bias"])


def require_as_comfyui(
    shape: tuple[int, int, int], dtype: torch.dtype, file: Path, choice: LinearChoice, *, codebook: bool = True
) -> None:
    tokens, columns, rows = shape
    state = a_layer(columns, rows, dtype, codebook=codebook)
    save_file(state, file)
    x = an_input(tokens, columns, dtype)
    with torch.no_grad(), streamed(file, columns, rows, dtype, choice, Hardware.detect(CPU)) as ours:
        computed = ours(x)
        assert torch.equal(computed, kitchens_linear(state, (rows, columns), dtype, x))
        if NAME in comfyuis_formats():
            assert torch.equal(computed, comfyuis_linear(state, "layer", (rows, columns), dtype)(x.clone()))
        assert torch.equal(ours.of_rows(x, rows // 2, rows), computed[..., rows // 2 :])


@with_format
@pytest.mark.parametrize("codebook", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_layer_computes_bit_for_bit_what_comfyuis_does(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    codebook: bool,
    tmp_path: Path,
    fast: LinearChoice,
    comfy: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stored_products, "SCRATCH_BYTES", 1)  # as few tokens and rows at a time as there ever are
    require_as_comfyui(shape, dtype, tmp_path / "m.safetensors", fast, codebook=codebook)


@with_format
@pytest.mark.slow
def test_a_layer_of_real_size_computes_bit_for_bit_what_comfyuis_does(
    tmp_path: Path, fast: LinearChoice, comfy: ModuleType
) -> None:
    require_as_comfyui(REAL_SHAPE, torch.bfloat16, tmp_path / "m.safetensors", fast)


@with_format
def test_a_slot_holds_the_stored_bytes(tmp_path: Path, fast: LinearChoice) -> None:
    state = a_layer(512, 96, torch.bfloat16, codebook=True)
    save_file(state, tmp_path / "m.safetensors")
    with streamed(tmp_path / "m.safetensors", 512, 96, torch.bfloat16, fast, Hardware.detect(CPU)) as ours:
        parts = [part.data for name, part in ours.named_parameters() if name != "bias"]
        names = ("weight", "weight_s_rel", "weight_s_channel", "weight_codebook")
        for part, name in zip(parts, names, strict=True):
            assert torch.equal(part.view(torch.uint8), state[f"layer.{name}"].view(torch.uint8))


@with_format
@pytest.mark.parametrize("shape", [(512, 512, 16), (512, 64, 512), (8, 512, 512)], ids=str)
def test_what_a_product_takes_is_what_is_planned_for_it(shape: tuple[int, int, int]) -> None:
    from live_bytes import LiveBytes

    tokens, columns, rows = shape
    product = W4a8Product("eager", 64)
    x, parts = an_input(tokens, columns, torch.bfloat16)[0], product.some_parts(rows, columns, CPU)
    product(x[:1], parts, None)  # what turns x is kept
    with LiveBytes("cpu") as live:
        result = product(x, parts, None)
    planned = LayerScratch(
        product.row_bytes(columns, rows, 2),
        product.fixed_bytes(columns, rows),
        None,
        product.unpacking_bytes(columns, rows),
    ).bytes(tokens)
    assert 0.6 * planned < live.peak - result.nbytes <= planned


def full_size_checkpoint() -> Checkpoint:
    """A block of the 20 B transformer with its matrices in it."""
    checkpoint = full_size.transformer_checkpoint(torch.float8_e4m3fn, layers=1)
    tensors = dict(checkpoint.tensors)
    for name, entry in checkpoint.tensors.items():
        if entry.dtype == "F8_E4M3":
            rows, columns = entry.shape
            tensors[name] = replace(entry, dtype="ASYM_W4A8_INT8_256", nbytes=rows * columns // 2)
            by_group = replace(entry, shape=(rows, columns // 16), nbytes=rows * columns // 16)
            tensors[f"{name}_s_rel"] = by_group
            tensors[f"{name}_s_channel"] = replace(entry, dtype="F32", shape=(rows,), nbytes=4 * rows)
            tensors[f"{name}_codebook"] = replace(entry, dtype="F32", shape=(16,), nbytes=64)
    return replace(checkpoint, tensors=tensors)


@with_format
def test_a_full_size_transformer_takes_what_is_planned_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from comfy_kitchen.backends.eager import w4a8_int8
    from comfy_kitchen.tensor import int8_utils

    # the function itself: torch does not look into comfy-kitchen's operators when tensors are fake
    kitchens = once_a_shape(w4a8_int8.w4a8_int8_linear)
    monkeypatch.setattr(four_bit_products, "load_w4a8", lambda: kitchens)
    monkeypatch.setattr(int8_utils, "_HADAMARD_CACHE", {})  # it would keep what is no tensor outside this test
    linear = LinearChoice(Computing.FAST, {"w4a8": "eager"})
    footprint = require_planned_peaks(full_size_checkpoint(), 1.0, linear)
    assert footprint.native
    assert footprint.slot_bytes < 0.14e9  # 0.45e9 decoded


@pytest.mark.skipif(has_w4a8(), reason="this comfy-kitchen has the format")
def test_a_comfy_kitchen_without_it_is_named() -> None:
    choice = choose_linear(Computing.FAST, [Hardware.detect(CPU)], torch.bfloat16, [W4A8])
    assert not choice.backends
    assert "comfy-kitchen is missing or too old for w4a8 products" in choice.why_not
