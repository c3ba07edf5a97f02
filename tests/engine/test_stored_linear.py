"""Linear layers that compute on their weights as stored: bit for bit as ComfyUI's own layers do for the same file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from comfy_files import note_bytes, quantized, read_dequantized
from comfyui_layers import comfyuis_linear, compute_as_comfyui
from live_bytes import LiveBytes
from one_layer import an_input, streamed
from qwenimage_lowvram.engine.compute import stored_products
from qwenimage_lowvram.engine.compute.eight_bit_products import Int8Product
from qwenimage_lowvram.engine.compute.four_bit_products import W4a4Product
from qwenimage_lowvram.engine.compute.linear_choice import DECODED, Computing, LinearChoice, choose_linear
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.formats import FORMATS
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.lora.changes import Matrix, Sum
from qwenimage_lowvram.engine.lora.deltas import Delta
from qwenimage_lowvram.engine.lora.weight_patches import LoraPatch
from qwenimage_lowvram.engine.models.qwen_image.branch import Branch
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from safetensors.torch import load_file, save_file
from split_files import write_split_files
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
NO_SCALE = " without a scale of x"
KINDS = ("int8", "int8_row", "int8_convrot", "fp8mixed", "fp8 without a scale of x", "convrot_w4a4")
COMPUTE = [torch.float32, torch.bfloat16, torch.float16]
# products in fp8 answer in 16 bits
IN_DTYPES = [(k, d) for k in KINDS for d in COMPUTE if not (k.startswith("fp8") and d is torch.float32)]
SHAPES = [(5, 256, 96), (150, 512, 96), (1, 256, 64), (70, 256, 288)]  # tokens, columns, rows
REAL_SHAPE = 5, 3072, 12288


@pytest.fixture(scope="session")
def fast(cpu_session: Hardware) -> LinearChoice:
    return choose_linear(Computing.FAST, [cpu_session], torch.bfloat16)


@pytest.fixture(scope="session")
def cpu_session() -> Hardware:
    return Hardware.detect(CPU)


def a_layer(kind: str, columns: int, rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator) * torch.logspace(-2, 0, rows)[:, None] / columns**0.5
    bias = torch.randn(rows, generator=generator)
    parts = {key: value.contiguous() for key, value in quantized(weight, kind.replace(NO_SCALE, "mixed")).items()}
    if NO_SCALE in kind:
        del parts["input_scale"]
    return {f"layer.{key}": value for key, value in parts.items()} | {"layer.bias": bias.to(dtype)}


def require_as_comfyui(
    kind: str, shape: tuple[int, int, int], dtype: torch.dtype, file: Path, choice: LinearChoice, hardware: Hardware
) -> None:
    tokens, columns, rows = shape
    state = a_layer(kind, columns, rows, dtype)
    save_file(state, file)
    x = an_input(tokens, columns, dtype)
    with torch.no_grad(), streamed(file, columns, rows, dtype, choice, hardware) as ours:
        computed = ours(x)
        assert torch.equal(computed, comfyuis_linear(state, "layer", (rows, columns), dtype)(x.clone()))
        third = rows // 3
        part = ours.of_rows(x, third, rows)
        if not kind.startswith("fp8"):
            assert torch.equal(part, computed[..., third:])
        else:  # sums of another product's numbers may be rounded in another order
            torch.testing.assert_close(part, computed[..., third:], rtol=0.01, atol=0.01)


@pytest.mark.parametrize(("kind", "dtype"), IN_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_layer_computes_bit_for_bit_what_comfyuis_does(
    kind: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    tmp_path: Path,
    fast: LinearChoice,
    hardware: Hardware,
    comfy: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stored_products, "SCRATCH_BYTES", 1)  # as few tokens at a time as there ever are
    require_as_comfyui(kind, shape, dtype, tmp_path / "m.safetensors", fast, hardware)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_of_real_size_computes_bit_for_bit_what_comfyuis_does(
    kind: str, tmp_path: Path, fast: LinearChoice, cpu: Hardware, comfy: ModuleType
) -> None:
    require_as_comfyui(kind, REAL_SHAPE, torch.bfloat16, tmp_path / "m.safetensors", fast, cpu)


@pytest.mark.parametrize("kind", ["int8_convrot", "fp8mixed"])
@pytest.mark.parametrize("computing", [Computing.AS_COMFYUI, Computing.FAST])
def test_a_note_for_products_on_decoded_weights_is_followed_unless_fast_is_chosen(
    kind: str, computing: Computing, tmp_path: Path, fast: LinearChoice
) -> None:
    state = a_layer(kind, 256, 64, torch.bfloat16)
    note = json.loads(bytes(state["layer.comfy_quant"].tolist()))
    choice = replace(fast, computing=computing)
    for full in (False, True):
        state["layer.comfy_quant"] = note_bytes(note | {"full_precision_matrix_mult": full})
        save_file(state, tmp_path / "m.safetensors")
        tensors = FORMATS.described_tensors(open_checkpoint(tmp_path / "m.safetensors"))
        product = choice.product_of(FORMATS.stored_param("layer.weight", tensors, "m"))
        assert (product is None) == (full and computing is Computing.AS_COMFYUI)


@pytest.mark.parametrize(("marker", "decoded"), [(0, False), (2, True)])
def test_older_files_say_by_their_marker_that_products_are_on_decoded_weights(
    marker: int, decoded: bool, tmp_path: Path, fast: LinearChoice
) -> None:
    weight = torch.randn(64, 256)
    state = {
        "layer.weight": (weight / weight.abs().max() * 448).to(torch.float8_e4m3fn),
        "layer.scale_weight": weight.abs().max() / 448,
        "scaled_fp8": torch.empty(marker, dtype=torch.float8_e4m3fn),
    }
    save_file(state, tmp_path / "m.safetensors")
    tensors = FORMATS.described_tensors(open_checkpoint(tmp_path / "m.safetensors"))
    choice = replace(fast, computing=Computing.AS_COMFYUI)
    assert (choice.product_of(FORMATS.stored_param("layer.weight", tensors, "m")) is None) == decoded


@pytest.mark.parametrize("rotated", [False, True])
def test_what_a_product_takes_is_what_is_planned_for_it(rotated: bool) -> None:
    from comfy_kitchen.backends.eager import quantization

    tokens, columns, rows = 600, 1024, 512
    product = Int8Product("eager", 256 if rotated else None)
    x, (data, scale) = an_input(tokens, columns, torch.bfloat16)[0], product.some_parts(rows, columns, CPU)
    bias = torch.zeros(rows, dtype=torch.bfloat16)
    with LiveBytes("cpu") as live:
        quantization.int8_linear(x, data, scale, bias, torch.bfloat16, rotated)
    planned = product.fixed_bytes(columns, rows) + tokens * product.row_bytes(columns, rows, 2)
    assert 0.6 * planned < live.peak - tokens * rows * 2 <= planned


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(4096, 1024, 64), (4096, 64, 1024), (64, 1024, 2048)], ids=str)
def test_what_a_product_of_four_bits_takes_is_what_is_planned_for_it(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    tokens, columns, rows = shape
    product = W4a4Product("eager", 64)
    x, parts = an_input(tokens, columns, dtype)[0], product.some_parts(rows, columns, CPU)
    bias = torch.zeros(rows, dtype=dtype)
    product(x[:1], parts, bias)  # what turns x is kept
    with LiveBytes("cpu") as live:
        result = product(x, parts, bias)
    of_weight, of_x = product.fixed_bytes(columns, rows), tokens * product.row_bytes(columns, rows, dtype.itemsize)
    assert 0.6 * max(of_weight, of_x) < live.peak - result.nbytes - x.nbytes <= of_weight + of_x


def test_a_note_for_operands_of_eight_bits_is_followed(tmp_path: Path, fast: LinearChoice) -> None:
    state = a_layer("convrot_w4a4", 256, 64, torch.bfloat16)
    note = json.loads(bytes(state["layer.comfy_quant"].tolist()))
    for more, wide in (({}, False), ({"linear_dtype": "int8"}, True), ({"params": {"linear_dtype": "int8"}}, True)):
        state["layer.comfy_quant"] = note_bytes(note | more)
        save_file(state, tmp_path / "m.safetensors")
        tensors = FORMATS.described_tensors(open_checkpoint(tmp_path / "m.safetensors"))
        param = FORMATS.stored_param("layer.weight", tensors, "m")
        assert fast.product_of(param) == W4a4Product("eager", 256, eight_bits=wide)


# whole models


# the most that quantizing what weights are multiplied with may cost, and by what name
MOST_ERROR = {"int8": 0.05, "int8_convrot": 0.05, "convrot_w4a4": 0.2}
NAMES = {"int8": "int8", "int8_convrot": "int8", "convrot_w4a4": "w4a4"}


@pytest.fixture(scope="module", params=MOST_ERROR)
def file(request: pytest.FixtureRequest, small_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp(request.param)
    outside = request.param != "convrot_w4a4"  # which would cost too much there
    names = write_split_files(small_pipeline, models, dtype=request.param, outside=outside)
    return models / "diffusion_models" / names.transformer


def kind_of(file: Path) -> str:
    return file.stem.removeprefix("small_qwen_image_")


def opened(
    file: Path,
    hardware: Hardware,
    linear: LinearChoice,
    resident: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
) -> QwenImageTransformer:
    transformer = QwenImageTransformer(open_checkpoint(file), dtype=dtype, hardware=hardware, linear=linear)
    transformer.load(resident)
    return transformer


def forward(transformer: QwenImageTransformer) -> Tensor:
    with transformer.session(slots=1) as session:
        return session.forward([a_branch()])[0]


def a_branch() -> Branch:
    generator = torch.Generator().manual_seed(0)
    tokens, prompt = (torch.randn(1, n, 64, generator=generator) for n in (30, 9))
    return Branch(tokens, ((1, 5, 6),), prompt, None, 0.7)


@torch.no_grad()
def comfyuis_layers_in_diffusers_model(file: Path, folder: Path) -> Tensor:
    """diffusers' model with each layer that ComfyUI quantized computed by ComfyUI's own."""
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32)
    model.load_state_dict(read_dequantized(file))
    compute_as_comfyui(model, file)
    branch = a_branch()
    timestep = torch.tensor([branch.timestep])
    answer: Tensor = model(
        hidden_states=branch.tokens,
        encoder_hidden_states=branch.prompt_embeds,
        encoder_hidden_states_mask=None,
        timestep=timestep,
        img_shapes=[list(branch.shapes)],
        return_dict=False,
    )[0]
    return answer


def test_a_model_computes_what_comfyuis_layers_do_wherever_its_blocks_live(
    file: Path, small_pipeline: Path, hardware: Hardware, fast: LinearChoice, comfy: ModuleType
) -> None:
    expected = comfyuis_layers_in_diffusers_model(file, small_pipeline / "transformer")
    streamed = forward(opened(file, hardware, fast, []))
    for resident in ([1, 2], range(4)):
        assert torch.equal(forward(opened(file, hardware, fast, resident)), streamed)
    # the layers are bit-equal; what is around them rounds in another order on some CPUs
    assert ((streamed - expected).norm() / expected.norm()).item() < 1e-5
    exact = forward(opened(file, hardware, DECODED))
    error = ((expected - exact).norm() / exact.norm()).item()
    assert 1e-4 < error < MOST_ERROR[kind_of(file)]


def test_slots_hold_stored_bytes_and_resident_blocks_need_no_slot(
    file: Path, cpu: Hardware, fast: LinearChoice
) -> None:
    computed, exact = (opened(file, cpu, linear, dtype=torch.bfloat16).footprint for linear in (fast, DECODED))
    assert computed.native
    assert not exact.native
    assert computed.slot_bytes == computed.resident_block_bytes < 0.7 * exact.slot_bytes
    assert computed.staging_bytes == computed.decode_bytes == 0
    assert computed.linear.text == f"{NAMES[kind_of(file)]} by comfy-kitchen eager"
    assert not exact.linear.text


def test_a_model_whose_notes_ask_for_products_on_decoded_weights_computes_exactly(
    file: Path, tmp_path: Path, cpu: Hardware, fast: LinearChoice
) -> None:
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(".comfy_quant")]:
        note = json.loads(bytes(tensors[name].tolist()))
        tensors[name] = note_bytes(note | {"full_precision_matrix_mult": True})
    save_file(tensors, tmp_path / "full.safetensors", metadata=dict(open_checkpoint(file).metadata))
    followed = opened(tmp_path / "full.safetensors", cpu, replace(fast, computing=Computing.AS_COMFYUI))
    assert not any(block.computed for block in followed.store.blocks)
    assert torch.equal(forward(followed), forward(opened(file, cpu, DECODED)))


# LoRAs beside stored weights

RANK = 4


def a_lora(folder: Path, shapes: Mapping[str, tuple[int, ...]], rows: Mapping[str, range]) -> dict[str, Delta]:
    """For each of the weights a product of two matrices; `rows`: that it changes alone."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, (count, columns) in shapes.items():
        count = len(rows.get(name, range(count)))
        tensors[f"{name}.up"] = torch.randn(count, RANK, generator=generator)
        tensors[f"{name}.down"] = torch.randn(RANK, columns, generator=generator) * 0.1
    save_file(tensors, folder / "lora.safetensors")
    entries = open_checkpoint(folder / "lora.safetensors").tensors
    return {
        name: Delta(name, shape, Sum(Matrix((entries[f"{name}.up"], entries[f"{name}.down"]))), part=rows.get(name))
        for name, shape in shapes.items()
    }


def patches(deltas: Mapping[str, Delta], strength: float) -> dict[str, LoraPatch]:
    return {name: LoraPatch(name, ((delta, strength),)) for name, delta in deltas.items()}


def some_weights(transformer: QwenImageTransformer) -> dict[str, tuple[int, ...]]:
    ends = ("attn.to_q.weight", "img_mlp.net.2.weight", "txt_mod.1.weight", "txt_in.weight", "proj_out.weight")
    return {name: shape for name, shape in transformer.weights.items() if name.endswith(ends)}


def test_a_lora_beside_stored_weights_makes_the_image_that_it_makes_within_them(
    file: Path, tmp_path: Path, hardware: Hardware, fast: LinearChoice
) -> None:
    exact, computed = opened(file, hardware, DECODED), opened(file, hardware, fast, [1])
    shapes = some_weights(exact)
    lora = a_lora(tmp_path, shapes, {name: range(16, 48) for name in shapes if "to_q" in name})
    plain = [forward(exact), forward(computed)]
    for transformer in (exact, computed):
        transformer.patch(patches(lora, 0.8))
        transformer.load([1])
    merged, beside = forward(exact), forward(computed)
    error, without = ((b - a).norm() / a.norm() for a, b in ((merged, beside), plain))
    assert error < 2 * without
    assert (merged - plain[0]).norm() / plain[0].norm() > error / MOST_ERROR[kind_of(file)]


def test_another_strength_reads_no_block_that_is_there(
    file: Path, tmp_path: Path, cpu: Hardware, fast: LinearChoice
) -> None:
    computed = opened(file, cpu, fast)
    lora = a_lora(tmp_path, some_weights(computed), {})
    computed.patch(patches(lora, 0.3))
    computed.load(range(4))
    forward(computed)
    read = computed.store.fetched_blocks
    computed.patch(patches(lora, 0.9))
    computed.load(range(4))
    changed = forward(computed)
    assert computed.store.fetched_blocks == read
    anew = opened(file, cpu, fast)
    anew.patch(patches(lora, 0.9))
    assert torch.equal(changed, forward(anew))


def test_what_is_no_product_of_two_matrices_is_added_to_the_decoded_weight(
    file: Path, tmp_path: Path, cpu: Hardware, fast: LinearChoice
) -> None:
    exact, computed = opened(file, cpu, DECODED), opened(file, cpu, fast)
    name = "transformer_blocks.2.attn.to_k.weight"
    save_file({"diff": torch.randn(exact.weights[name])}, tmp_path / "diff.safetensors")
    entry = open_checkpoint(tmp_path / "diff.safetensors").tensors["diff"]
    delta = {name: Delta(name, exact.weights[name], Sum(Matrix((entry,))))}
    for transformer in (exact, computed):
        transformer.patch(patches(delta, 0.1))
    decoded = [name for name, _ in computed.store.blocks[1].computed]
    assert [one for one, _ in computed.store.blocks[2].computed] == [one for one in decoded if "to_k" not in one]
    merged, beside = forward(exact), forward(computed)
    assert ((beside - merged).norm() / merged.norm()).item() < MOST_ERROR[kind_of(file)]
