"""Linear layers that compute on nunchaku's int4 as stored: SVDQuant's formula, of numbers in four bits."""

from functools import partial
from pathlib import Path

import pytest
import torch
from live_bytes import LiveBytes
from nunchaku_files import SHIFT, pack_scales, svdq, write_nunchaku_transformer
from one_layer import an_input
from qwenimage_lowvram.engine.compute import svdquant_products
from qwenimage_lowvram.engine.compute.linear_choice import DECODED, Computing, LinearChoice, choose_linear, linear_of
from qwenimage_lowvram.engine.compute.product_trials import SVDQUANT, backend_of
from qwenimage_lowvram.engine.compute.stored_linear import StoredLinear
from qwenimage_lowvram.engine.compute.svdquant_products import SvdquantProduct
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.formats.nunchaku_layers import with_nunchaku_layers
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.lora.changes import Matrix, Sum
from qwenimage_lowvram.engine.lora.deltas import Delta
from qwenimage_lowvram.engine.lora.weight_patches import LoraPatch
from qwenimage_lowvram.engine.models.qwen_image.branch import Branch
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.streaming import BlockFiles, BlockStreamer
from safetensors.torch import save_file
from small_checkpoint import make_transformer
from torch import Tensor, nn

CPU = torch.device("cpu")
CARD = Hardware(torch.device("meta"), streams=False, pinned=False, prefetch=False, host_device=False)
QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
# the file's layer, those that it stands for, its rows and columns
LAYERS = {
    "attn.to_qkv": (QKV, 384, 256),
    "img_mlp.net.2": (("img_mlp.net.2",), 256, 384),
}


@pytest.fixture(scope="module")
def fast() -> LinearChoice:
    return choose_linear(Computing.FAST, [Hardware.detect(CPU)], torch.bfloat16, [SVDQUANT])


def error(ours: Tensor, other: Tensor) -> float:
    return ((ours.float() - other).norm() / other.norm()).item()


def make_layers(names: tuple[str, ...], columns: int, rows: int) -> nn.Module:
    module = nn.Module()
    with torch.device("meta"):
        for name in names:
            *owners, attribute = name.split(".")
            owner = module
            for part in owners:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.add_module(attribute, nn.Linear(columns, rows))
    return module


def in_four_bits(x: Tensor, shift: float) -> Tensor:
    """Smoothed numbers as the format quantizes them: by groups of 64, symmetric, or from 0 to 15 where shifted."""
    groups = x.unflatten(-1, (-1, 64))
    most, least = (15, 0) if shift else (7, -7)
    scale = groups.abs().amax(-1, keepdim=True) / most
    return ((groups / scale).round().clamp(least, most) * scale).flatten(-2)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_the_formula_of_numbers_in_four_bits(
    name: str, dtype: torch.dtype, tmp_path: Path, fast: LinearChoice, hardware: Hardware
) -> None:
    names, rows, columns = LAYERS[name]
    shift = SHIFT if name == "img_mlp.net.2" else 0.0
    layer = svdq(torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) / 16, 32)
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(2)).bfloat16()
    parts = layer.packed() | {"bias": pack_scales(bias[:, None]).view(-1)}
    save_file({f"{name}.{part}": value.contiguous() for part, value in parts.items()}, tmp_path / "m.safetensors")
    tensors = with_nunchaku_layers(open_checkpoint(tmp_path / "m.safetensors").tensors)
    make = partial(make_layers, names, columns, rows // len(names))
    store = BlockFiles([tensors], make, dtype, "m", product_of=fast.product_of).open(hardware)
    x = an_input(70, columns, dtype)
    x = torch.nn.functional.gelu(x, approximate="tanh") if shift else x
    with BlockStreamer(store, slots=1) as streamer:
        for _, block in streamer.visit():
            layers = [block.get_submodule(one) for one in names]
            assert all(isinstance(one, StoredLinear) for one in layers)
            ours = torch.cat([one(x) for one in layers], -1)
            tile = layers[0].of_rows(x, 64, 128)
    assert ours.dtype == dtype
    wide, smooth = x.float(), layer.smooth.float()
    main = in_four_bits((wide + shift) / smooth, shift) @ layer.matrix().T
    expected = main + (wide @ layer.down.float().T) @ layer.up.float().T + bias.float()
    assert error(ours, expected) < (1e-5 if dtype == torch.float32 else 0.02)
    assert error(tile, ours[..., 64:128]) < (1e-5 if dtype == torch.float32 else 0.01)
    assert 0.01 < error(ours, layer.output(wide, bias.float(), shift)) < 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("shape", [(4096, 1024, 128), (4096, 128, 1024), (64, 1024, 2048)], ids=str)
def test_what_a_product_takes_is_what_is_planned_for_it(
    shape: tuple[int, int, int], shifted: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfy_kitchen.backends.eager import svdquant

    # as one operator their own would not be seen
    functions = svdquant.quantize_svdquant_w4a4, svdquant.scaled_mm_svdquant_w4a4
    monkeypatch.setattr(svdquant_products, "load_svdquant", lambda: functions)
    tokens, columns, rows = shape
    product = SvdquantProduct("eager", 32, shifted)
    x, parts = an_input(tokens, columns, dtype)[0], product.some_parts(rows, columns, CPU)
    bias = torch.zeros(rows, dtype=dtype)
    with LiveBytes("cpu") as live:
        result = product(x, parts, bias)
    of_weight, of_x = product.fixed_bytes(columns, rows), tokens * product.row_bytes(columns, rows, dtype.itemsize)
    assert 0.5 * max(of_weight, of_x) < live.peak - result.nbytes - x.nbytes <= of_weight + of_x


def test_auto_decodes_what_comfyui_does_not_read(file: Path) -> None:
    checkpoint = open_checkpoint(file)
    assert linear_of(Computing.AS_COMFYUI, checkpoint, [CARD], torch.bfloat16) == DECODED
    assert linear_of(Computing.FAST, checkpoint, [Hardware.detect(CPU)], torch.bfloat16).backends == {
        "svdquant": "eager"
    }


def test_a_card_without_a_kernel_and_an_older_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found, why = backend_of(SVDQUANT, [CARD], torch.bfloat16)
    assert not found
    assert "svdquant products do not work on 'meta'" in why
    assert "from RTX 30 on" in why
    assert "16 bits" in backend_of(SVDQUANT, [CARD], torch.float32)[1]

    def missing() -> None:
        raise AttributeError("module 'comfy_kitchen' has no attribute 'quantize_svdquant_w4a4'")

    monkeypatch.setattr("qwenimage_lowvram.engine.compute.product_trials.load_svdquant", missing)
    assert "comfy-kitchen is missing or too old for svdquant" in backend_of(SVDQUANT, [CARD], torch.bfloat16)[1]


# whole models


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_transformer(layers=2, head_dim=64, text_dim=32)
    file = tmp_path_factory.mktemp("nunchaku") / "svdq-int4_r32-qwen-image.safetensors"
    write_nunchaku_transformer(file, model.state_dict(), dict(model.config), rank=32)
    return file


def opened(
    file: Path, linear: LinearChoice, hardware: Hardware, resident: tuple[int, ...] = ()
) -> QwenImageTransformer:
    transformer = QwenImageTransformer(open_checkpoint(file), dtype=torch.bfloat16, hardware=hardware, linear=linear)
    transformer.load(resident)
    return transformer


def forward(transformer: QwenImageTransformer) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens, prompt = (torch.randn(1, *size, generator=generator).bfloat16() for size in ((30, 64), (9, 32)))
    with transformer.session(slots=1) as session:
        return session.forward([Branch(tokens, ((1, 5, 6),), prompt, None, 0.7)])[0].float()


def test_a_model_computes_on_stored_weights_wherever_its_blocks_live(
    file: Path, fast: LinearChoice, hardware: Hardware
) -> None:
    streamed, resident, exact = (
        opened(file, linear, hardware, where) for linear, where in ((fast, ()), (fast, (0, 1)), (DECODED, ()))
    )
    made = forward(streamed)
    assert torch.equal(forward(resident), made)
    assert 0.01 < error(made, forward(exact)) < 0.3
    names = {name for name, _ in streamed.store.blocks[0].computed}
    assert len(names) == 12  # all but modulation, which is stored in AWQ
    assert not any(block.computed for block in streamed.modulation._store.blocks)


def test_slots_and_resident_blocks_hold_the_stored_bytes(file: Path, fast: LinearChoice, cpu: Hardware) -> None:
    computed, exact = (opened(file, linear, cpu).footprint for linear in (fast, DECODED))
    assert computed.slot_bytes < 1.02 * computed.stored_bytes
    assert computed.stored_bytes < exact.stored_bytes  # whose shifted biases read the thin matrices again
    assert computed.slot_bytes < 0.7 * exact.slot_bytes  # thin matrices of rank 32 are much of layers so small
    assert computed.resident_block_bytes == computed.stored_bytes
    assert computed.linear.text == "svdquant by comfy-kitchen eager"


def test_a_lora_is_added_beside_and_its_strength_changes_without_reading(
    file: Path, fast: LinearChoice, cpu: Hardware, tmp_path: Path
) -> None:
    computed, exact = opened(file, fast, cpu, (0, 1)), opened(file, DECODED, cpu)
    ends = ("attn.to_q.weight", "img_mlp.net.2.weight", "txt_mod.1.weight")
    shapes = {name: shape for name, shape in exact.weights.items() if name.endswith(ends)}
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, (rows, columns) in shapes.items():
        tensors[f"{name}.up"] = torch.randn(rows, 4, generator=generator)
        tensors[f"{name}.down"] = torch.randn(4, columns, generator=generator) * 0.1
    save_file(tensors, tmp_path / "lora.safetensors")
    entries = open_checkpoint(tmp_path / "lora.safetensors").tensors
    deltas = {
        name: Delta(name, shape, Sum(Matrix((entries[f"{name}.up"], entries[f"{name}.down"]))))
        for name, shape in shapes.items()
    }
    plain, before = [forward(exact), forward(computed)], computed.store.fetched_blocks
    for strength in (0.2, 0.5):
        for transformer, where in ((exact, ()), (computed, (0, 1))):
            transformer.patch({name: LoraPatch(name, ((delta, strength),)) for name, delta in deltas.items()})
            transformer.load(where)
        merged, beside = forward(exact), forward(computed)
        if strength == 0.2:
            before = computed.store.fetched_blocks
    assert computed.store.fetched_blocks == before
    assert error(beside, merged) < 2 * error(plain[1], plain[0])
    assert error(merged, plain[0]) > 5 * error(beside, merged)
