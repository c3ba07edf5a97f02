"""Files that ComfyUI quantized decode as ComfyUI decodes them, layer by layer as their notes say."""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import full_size
import pytest
import torch
from comfy_files import KINDS, note_bytes, read_dequantized
from full_size_run import once_a_shape, require_planned_peaks
from qwenimage_lowvram.engine.compute import four_bit_products
from qwenimage_lowvram.engine.compute.linear_choice import Computing, LinearChoice
from qwenimage_lowvram.engine.errors import CheckpointError, DamagedFile, MissingPackage, WrongModel
from qwenimage_lowvram.engine.files.checkpoint import Checkpoint, TensorEntry, open_checkpoint
from qwenimage_lowvram.engine.formats import COMFY_QUANT, decode_alone
from qwenimage_lowvram.engine.formats.chunks import CHUNK_WEIGHTS
from qwenimage_lowvram.engine.formats.int8_convrot import INT8_CONVROT, load_operator
from qwenimage_lowvram.engine.formats.kitchen import CONVROT_W4A4, MXFP8, NVFP4
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen25_vl.text_encoder import TextEncoder
from qwenimage_lowvram.engine.models.qwen_image.branch import Branch
from qwenimage_lowvram.engine.models.qwen_image.tensors import sort_transformer
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.streaming import read_params
from safetensors.torch import load_file, save_file
from small_checkpoint import write_split_files

COMPUTE = [torch.float32, torch.bfloat16, torch.float16]
compute = pytest.mark.parametrize("dtype", COMPUTE, ids=str)
SHAPES = [(96, 512), (7, 256), (1100, 2048), (3, 1024)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)

Weights = dict[str, torch.Tensor]


def a_weight(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, columns, generator=generator) * torch.logspace(-2, 0, rows)[:, None]


# single layers, written and read by ComfyUI's own classes

ROTATED = {"per_channel": True, "convrot": True}
LAYERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "int8": ("int8_tensorwise", "TensorWiseINT8Layout", {}),
    "int8 by row": ("int8_tensorwise", "TensorWiseINT8Layout", {"per_channel": True}),
    "int8 rotated in 256": ("int8_tensorwise", "TensorWiseINT8Layout", ROTATED),
    "int8 rotated in 64": ("int8_tensorwise", "TensorWiseINT8Layout", {**ROTATED, "convrot_groupsize": 64}),
    "int8 rotated in 16": ("int8_tensorwise", "TensorWiseINT8Layout", {**ROTATED, "convrot_groupsize": 16}),
    "fp8 e4m3": ("float8_e4m3fn", "TensorCoreFP8E4M3Layout", {"scale": "recalculate"}),
    "fp8 e5m2": ("float8_e5m2", "TensorCoreFP8E5M2Layout", {"scale": "recalculate"}),
}
# sides of whole tiles of scales, with a tile that is not full, and of several chunks
KITCHEN_LAYERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "nvfp4": ("nvfp4", "TensorCoreNVFP4Layout", {}),
    "mxfp8": ("mxfp8", "TensorCoreMXFP8Layout", {}),
    "w4a4 rotated in 256": ("convrot_w4a4", "TensorCoreConvRotW4A4Layout", {}),
    "w4a4 rotated in 64": ("convrot_w4a4", "TensorCoreConvRotW4A4Layout", {"convrot_groupsize": 64}),
}
LAYERS |= KITCHEN_LAYERS
KITCHEN_SHAPES = [(96, 512), (160, 256), (1184, 2048), (128, 1024)]
INT8_LAYERS = [name for name in LAYERS if name.startswith("int8")]
FP8_LAYERS = [name for name in LAYERS if name.startswith("fp8")]


def make_linear(shape: tuple[int, int], dtype: torch.dtype) -> Any:
    import comfy.ops

    operations = comfy.ops.mixed_precision_ops({}, compute_dtype=dtype)
    return operations.Linear(shape[1], shape[0], bias=False, dtype=dtype)


def written_by_comfyui(name: str, shape: tuple[int, int], dtype: torch.dtype, **changes: Any) -> Weights:
    """The state of a ComfyUI layer that was quantized, under the name "layer"."""
    from comfy.quant_ops import QuantizedTensor

    kind, layout, options = LAYERS[name]
    linear = make_linear(shape, dtype)
    linear.quant_format = kind
    quantized = QuantizedTensor.from_float(a_weight(*shape).to(dtype), layout, **{**options, **changes})
    linear.weight = torch.nn.Parameter(quantized, requires_grad=False)
    state = linear.state_dict(prefix="layer.")
    return {key: value.detach().clone() for key, value in state.items()}


def dequantized_by_comfyui(
    state: Mapping[str, torch.Tensor], dtype: torch.dtype, shape: tuple[int, int] | None = None
) -> torch.Tensor:
    linear = make_linear(shape or tuple(state["layer.weight"].shape), dtype)
    linear.load_state_dict({key.removeprefix("layer."): value for key, value in state.items()})
    result = linear.weight.dequantize()
    assert result.dtype is dtype
    return result


def ours(file: Path, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    checkpoint = open_checkpoint(file)
    tensors = COMFY_QUANT.describe(checkpoint.tensors, checkpoint.metadata, checkpoint.path)
    return read_params(tensors, {"layer.weight": shape}, dtype, file.name)["layer.weight"]


@pytest.mark.parametrize("name", INT8_LAYERS)
@compute
@shapes
def test_an_int8_layer_decodes_bit_for_bit_as_comfyui_does(
    name: str, dtype: torch.dtype, shape: tuple[int, int], tmp_path: Path, comfy: ModuleType
) -> None:
    state = written_by_comfyui(name, shape, dtype)
    save_file(state, tmp_path / "m.safetensors")
    decoded = ours(tmp_path / "m.safetensors", shape, dtype)
    assert torch.equal(decoded, dequantized_by_comfyui(state, dtype))
    # rotation spreads a row over its group, so that its scale is a row's, too
    scale = a_weight(*shape).abs().max() if name == "int8" else a_weight(*shape).abs().amax(1, keepdim=True)
    assert ((decoded - a_weight(*shape)).abs() <= scale * 0.05).all()


@pytest.mark.parametrize("name", KITCHEN_LAYERS)
@pytest.mark.parametrize("shape", KITCHEN_SHAPES, ids=str)
@compute
def test_a_layer_in_blocks_or_4_bits_decodes_bit_for_bit_as_comfyui_does(
    name: str, dtype: torch.dtype, shape: tuple[int, int], tmp_path: Path, comfy: ModuleType
) -> None:
    state = written_by_comfyui(name, shape, dtype)
    save_file(state, tmp_path / "m.safetensors")
    decoded = ours(tmp_path / "m.safetensors", shape, dtype)
    assert torch.equal(decoded, dequantized_by_comfyui(state, dtype, shape))
    error = (decoded.float() - a_weight(*shape)).norm() / a_weight(*shape).norm()
    assert error < (0.04 if name == "mxfp8" else 0.2)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8"])
def test_block_scales_written_as_bytes_are_read_as_well(name: str, tmp_path: Path, comfy: ModuleType) -> None:
    state = written_by_comfyui(name, (160, 256), torch.bfloat16)
    expected = dequantized_by_comfyui(state, torch.bfloat16, (160, 256))
    state["layer.weight_scale"] = state["layer.weight_scale"].view(torch.uint8)
    save_file(state, tmp_path / "m.safetensors")
    assert torch.equal(ours(tmp_path / "m.safetensors", (160, 256), torch.bfloat16), expected)


def an_entry(dtype: str, shape: tuple[int, int]) -> TensorEntry:
    return TensorEntry(Path("m.safetensors"), 0, 0, dtype, shape)


@pytest.mark.parametrize("name", FP8_LAYERS)
@compute
@shapes
def test_an_fp8_layer_is_what_comfyui_decodes_in_fp32_rounded_once(
    name: str, dtype: torch.dtype, shape: tuple[int, int], tmp_path: Path, comfy: ModuleType
) -> None:
    # which is what its kernel for GPUs computes; elsewhere ComfyUI rounds the scale to the compute dtype before it
    # multiplies, an error that all weights of a layer share
    state = written_by_comfyui(name, shape, dtype)
    save_file(state, tmp_path / "m.safetensors")
    decoded = ours(tmp_path / "m.safetensors", shape, dtype)
    assert torch.equal(decoded, dequantized_by_comfyui(state, torch.float32).to(dtype))


@pytest.mark.parametrize("name", FP8_LAYERS)
@compute
def test_an_fp8_layer_whose_scale_needs_no_rounding_decodes_bit_for_bit_as_comfyui_does(
    name: str, dtype: torch.dtype, tmp_path: Path, comfy: ModuleType
) -> None:
    state = written_by_comfyui(name, (96, 512), dtype, scale=torch.tensor(2.0**-7 * 1.5))
    save_file(state, tmp_path / "m.safetensors")
    assert torch.equal(
        ours(tmp_path / "m.safetensors", (96, 512), dtype),
        dequantized_by_comfyui(state, dtype),
    )


def test_notes_in_the_header_say_what_notes_beside_the_weights_do(tmp_path: Path, comfy: ModuleType) -> None:
    for name in LAYERS:
        state = written_by_comfyui(name, (96, 512), torch.bfloat16)
        save_file(state, tmp_path / "beside.safetensors")
        note = json.loads(bytes(state.pop("layer.comfy_quant").tolist()))
        header = json.dumps({"format_version": "1.0", "layers": {"layer": note, "another": note}})
        save_file(state, tmp_path / "header.safetensors", metadata={"_quantization_metadata": header})
        read = [
            ours(tmp_path / file, (96, 512), torch.bfloat16) for file in ("beside.safetensors", "header.safetensors")
        ]
        assert torch.equal(*read), name


PREFIX = "model.diffusion_model."


@pytest.mark.parametrize(("written", "noted"), [("", ""), (PREFIX, PREFIX), (PREFIX, "")])
def test_notes_in_the_header_find_their_layers_with_and_without_the_prefix(
    written: str, noted: str, tmp_path: Path
) -> None:
    layer = f"{written}transformer_blocks.0.attn.to_q"
    save_file(
        {f"{layer}.weight": torch.ones(8, 64, dtype=torch.int8), f"{layer}.weight_scale": torch.ones(8, 1)},
        tmp_path / "m.safetensors",
        metadata={
            "_quantization_metadata": json.dumps(
                {"layers": {f"{noted}transformer_blocks.0.attn.to_q": {"format": "int8_tensorwise"}}}
            )
        },
    )
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    tensors = COMFY_QUANT.describe(checkpoint.tensors, checkpoint.metadata, checkpoint.path)
    assert tensors[f"{layer}.weight"].dtype == "INT8"


def test_settings_that_other_programs_put_elsewhere_are_found(tmp_path: Path, comfy: ModuleType) -> None:
    state = written_by_comfyui("int8 rotated in 64", (96, 512), torch.float32)
    expected = dequantized_by_comfyui(state, torch.float32)
    state["layer.comfy_quant"] = note_bytes(
        {
            "format": "int8_tensorwise",
            "orig_dtype": "torch.bfloat16",
            "orig_shape": [96, 512],
            "per_row": True,
            "params": {"convrot": True, "convrot_groupsize": 64},
        }
    )
    save_file(state, tmp_path / "m.safetensors")
    assert torch.equal(ours(tmp_path / "m.safetensors", (96, 512), torch.float32), expected)
    assert torch.equal(dequantized_by_comfyui(state, torch.float32), expected)


def test_a_format_that_always_rotates_is_rotated_whatever_its_note_says_of_that(
    tmp_path: Path, comfy: ModuleType
) -> None:
    state = written_by_comfyui("w4a4 rotated in 64", (96, 512), torch.float32)
    expected = dequantized_by_comfyui(state, torch.float32, (96, 512))
    state["layer.comfy_quant"] = note_bytes({"format": "convrot_w4a4", "convrot": False, "convrot_groupsize": 64})
    save_file(state, tmp_path / "m.safetensors")
    assert torch.equal(ours(tmp_path / "m.safetensors", (96, 512), torch.float32), expected)
    assert torch.equal(dequantized_by_comfyui(state, torch.float32, (96, 512)), expected)


# memory


@pytest.mark.parametrize("rows", [1, CHUNK_WEIGHTS // 256, CHUNK_WEIGHTS // 256 + 1])
def test_chunks_of_rotated_weights_are_even(rows: int) -> None:
    # one row left over would be multiplied by another kernel, in another order
    codec = INT8_CONVROT[256]
    data = torch.randint(-127, 128, (rows, 256), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    scale, out = torch.linspace(0.001, 0.1, rows)[:, None], torch.empty(rows, 256)
    decode_alone(codec, out, [data, scale])
    assert torch.equal(out, load_operator()(data, scale, 256, 0))


def full_size_checkpoint(layers: int) -> Checkpoint:
    """The 20 B transformer with the blocks' matrices in rotated int8, rows scaled."""
    checkpoint = full_size.transformer_checkpoint(torch.float8_e4m3fn, layers=layers)
    tensors = dict(checkpoint.tensors)
    for name, entry in checkpoint.tensors.items():
        if entry.dtype == "F8_E4M3":
            tensors[name] = replace(entry, dtype="INT8_CONVROT256")
            rows = entry.shape[0]
            tensors[f"{name}_scale"] = replace(entry, dtype="F32", shape=(rows, 1), nbytes=4 * rows)
    return replace(checkpoint, tensors=tensors)


def in_four_bits(checkpoint: Checkpoint) -> Checkpoint:
    """The same with these matrices in rotated int4."""
    tensors = dict(checkpoint.tensors)
    for name, entry in checkpoint.tensors.items():
        if entry.dtype == "INT8_CONVROT256":
            tensors[name] = replace(entry, dtype=CONVROT_W4A4[256].dtype, nbytes=entry.nbytes // 2)
    return replace(checkpoint, tensors=tensors)


def in_nvfp4(checkpoint: Checkpoint) -> Checkpoint:
    """The same with these matrices in nvfp4."""
    tensors = dict(checkpoint.tensors)
    for name, entry in checkpoint.tensors.items():
        if entry.dtype == "INT8_CONVROT256":
            rows, columns = entry.shape
            tensors[name] = replace(entry, dtype=NVFP4.dtype, nbytes=entry.nbytes // 2)
            shape = (rows, columns // 16)
            tensors[f"{name}_scale"] = replace(entry, dtype="F8_E4M3", shape=shape, nbytes=rows * columns // 16)
            tensors[f"{name}_scale_2"] = replace(entry, dtype="F32", shape=(), nbytes=4)
    return replace(checkpoint, tensors=tensors)


def in_mxfp8(checkpoint: Checkpoint) -> Checkpoint:
    """The same with these matrices in mxfp8."""
    tensors = dict(checkpoint.tensors)
    for name, entry in checkpoint.tensors.items():
        if entry.dtype == "INT8_CONVROT256":
            rows, columns = entry.shape
            tensors[name] = replace(entry, dtype=MXFP8.dtype)
            scales = (rows, columns // 32)
            tensors[f"{name}_scale"] = replace(entry, dtype="F8_E8M0", shape=scales, nbytes=rows * columns // 32)
    return replace(checkpoint, tensors=tensors)


@pytest.mark.slow
def test_the_plan_of_a_full_size_rotated_transformer_is_what_its_run_takes() -> None:
    footprint = require_planned_peaks(full_size_checkpoint(3), 1.5)
    assert footprint.scratch_bytes == INT8_CONVROT[256].scratch_bytes((3072, 12288), on_host=False)


@pytest.mark.slow
def test_the_plan_of_a_full_size_transformer_on_stored_weights_is_what_its_run_takes() -> None:
    linear = LinearChoice(Computing.FAST, {"int8": "cuda"})
    footprint = require_planned_peaks(full_size_checkpoint(3), 1.0, linear)
    assert footprint.native
    assert footprint.slot_bytes < 0.24e9  # 0.45e9 decoded


@pytest.mark.slow
def test_the_plan_of_a_full_size_transformer_on_stored_codes_of_four_bits_is_what_its_run_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from comfy_kitchen.backends.eager import convrot_w4a4

    kitchens = once_a_shape(four_bit_products.load_w4a4())
    monkeypatch.setattr(four_bit_products, "load_w4a4", lambda: kitchens)
    monkeypatch.setattr(convrot_w4a4, "_HADAMARD_CACHE", {})  # it would keep what is no tensor outside this test
    linear = LinearChoice(Computing.FAST, {"w4a4": "eager"})
    footprint = require_planned_peaks(in_four_bits(full_size_checkpoint(3)), 1.5, linear)
    assert footprint.native
    assert footprint.slot_bytes < 0.12e9  # 0.45e9 decoded


@pytest.mark.slow
def test_the_plan_of_a_full_size_transformer_on_stored_nvfp4_is_what_its_run_takes() -> None:
    linear = LinearChoice(Computing.FAST, {"nvfp4": "cuda"})
    footprint = require_planned_peaks(in_nvfp4(full_size_checkpoint(3)), 1.5, linear)
    assert footprint.native
    assert footprint.slot_bytes < 0.13e9  # 0.45e9 decoded
    assert footprint.mlp_chunks == (None,)  # all tokens share a scale


# whole models


@pytest.fixture(scope="module", params=KINDS)
def models(request: pytest.FixtureRequest, small_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with a transformer and a text encoder in one of ComfyUI's formats."""
    models = tmp_path_factory.mktemp(request.param)
    write_split_files(small_pipeline, models, dtype=request.param, text_dtype=request.param)
    return models


def only_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def decoded_by_comfyui(file: Path, to: Path, dtype: torch.dtype) -> Path:
    """The file's weights as comfy-kitchen decodes them, stored plainly."""
    metadata = open_checkpoint(file).metadata
    save_file(read_dequantized(file, dtype), to / "plain.safetensors", metadata=dict(metadata))
    return to / "plain.safetensors"


def forward(file: Path, dtype: torch.dtype, hardware: Hardware) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens, prompt = (torch.randn(1, n, 64, generator=generator).to(dtype) for n in (30, 9))
    transformer = QwenImageTransformer(open_checkpoint(file), dtype=dtype, hardware=hardware)
    transformer.load([1])
    with transformer.session(slots=1) as session:
        return session.forward([Branch(tokens, ((1, 5, 6),), prompt, None, 0.7)])[0]


def test_a_quantized_transformer_computes_what_its_decoded_weights_do(
    models: Path, tmp_path: Path, hardware: Hardware
) -> None:
    file = only_file(models / "diffusion_models")
    kinds = {entry.dtype for entry in open_checkpoint(file).tensors.values()}
    assert {"BF16", "U8"} < kinds  # some layers are plain
    computed = forward(file, torch.float32, hardware)
    assert torch.equal(computed, forward(decoded_by_comfyui(file, tmp_path, torch.float32), torch.float32, hardware))
    assert computed.std() > 0.01


def test_a_quantized_transformer_computes_in_bf16_what_its_decoded_weights_do(
    models: Path, tmp_path: Path, cpu: Hardware
) -> None:
    file = only_file(models / "diffusion_models")
    # rounded once when they are read, as ours are; nvfp4 is multiplied in the compute dtype, as ComfyUI does
    dtype = torch.bfloat16 if "nvfp4" in file.name else torch.float32
    plain = decoded_by_comfyui(file, tmp_path, dtype)
    assert torch.equal(forward(file, torch.bfloat16, cpu), forward(plain, torch.bfloat16, cpu))


def test_a_quantized_text_encoder_computes_what_its_decoded_weights_do(
    models: Path, tmp_path: Path, cpu: Hardware
) -> None:
    file = only_file(models / "text_encoders")
    plain = decoded_by_comfyui(file, tmp_path, torch.float32)
    prompts = [[5, 9, 100, 7, 9], [3]]
    encoded, expected = (
        TextEncoder(open_checkpoint(f), dtype=torch.float32, hardware=cpu).encode(prompts) for f in (file, plain)
    )
    for one, wanted in zip(encoded, expected, strict=True):
        # single rows of a rotated embedding are summed in another order than the whole matrix
        assert (one - wanted).abs().max() <= (2e-5 if "convrot" in file.name else 0)
        assert wanted.std() > 0.1


# what is refused

WEIGHT = "transformer_blocks.0.attn.to_q"
Change = Callable[[Weights, dict[str, Any]], Any]
REFUSED: dict[str, tuple[Change, type[CheckpointError], str]] = {
    "no JSON": (lambda t, n: b"{", DamagedFile, "not valid JSON"),
    "no object": (lambda t, n: b"[1]", DamagedFile, "not an object"),
    "too long": (lambda t, n: b" " * 5000, DamagedFile, "5000 bytes"),
    "no format": (lambda t, n: n.pop("format"), DamagedFile, "without a format"),
    "a format that is no text": (lambda t, n: n.update(format=[1]), DamagedFile, "without a format"),
    "a format of tomorrow": (
        lambda t, n: n.update(format="nvfp2"),
        WrongModel,
        r"ComfyUI's 'nvfp2'.*float8_e4m3fn, .*int8_tensorwise, nvfp4",
    ),
    "nvfp4": (lambda t, n: n.update(format="nvfp4"), DamagedFile, r"do not match its quantization note \(nvfp4\)"),
    "mxfp8": (lambda t, n: n.update(format="mxfp8"), DamagedFile, r"do not match its quantization note \(mxfp8\)"),
    "w4a4 of another group": (
        lambda t, n: n.update(format="convrot_w4a4", convrot_groupsize=4096),
        WrongModel,
        "groups of 4096",
    ),
    "another dtype": (
        lambda t, n: n.update(format="float8_e4m3fn"),
        DamagedFile,
        r"I8\[64, 64\].* do not match its quantization note",
    ),
    "no scale": (lambda t, n: t.pop(f"{WEIGHT}.weight_scale"), DamagedFile, "do not match its quantization note"),
    "another group": (lambda t, n: n.update(convrot_groupsize=4096), WrongModel, "groups of 4096.*16, 64, 256, 1024"),
    "no power of four": (lambda t, n: n.update(convrot_groupsize=32), WrongModel, "groups of 32, which"),
    "a group of text": (lambda t, n: n.update(convrot_groupsize="64"), DamagedFile, "groups of '64'"),
    "a group of truth": (lambda t, n: n.update(convrot_groupsize=True), DamagedFile, "groups of True"),
    "a group wider than the row": (lambda t, n: n.update(convrot_groupsize=256), DamagedFile, r"\[64, 64\] cannot be"),
}


def changed(file: Path, to: Path, change: Change) -> Path:
    """A file with its tensors, and the note of one of them, changed by `change(tensors, note)`."""
    tensors, note = load_file(file), None
    note = json.loads(bytes(tensors[f"{WEIGHT}.comfy_quant"].tolist()))
    raw = change(tensors, note)
    raw = raw if isinstance(raw, bytes) else json.dumps(note).encode()
    tensors[f"{WEIGHT}.comfy_quant"] = torch.tensor(list(raw), dtype=torch.uint8)
    save_file(tensors, to / "m.safetensors", metadata=dict(open_checkpoint(file).metadata))
    return to / "m.safetensors"


@pytest.fixture(scope="module")
def rotated_file(small_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("rotated")
    return models / "diffusion_models" / write_split_files(small_pipeline, models, dtype="int8_convrot").transformer


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_a_note_that_does_not_fit_is_refused(
    case: tuple[Change, type[CheckpointError], str], rotated_file: Path, tmp_path: Path
) -> None:
    change, error, words = case
    with pytest.raises(error, match=words):
        sort_transformer(open_checkpoint(changed(rotated_file, tmp_path, change)))


SCALES = {
    "too many": torch.ones(65, 1),
    "one for each column and row": torch.ones(64, 64),
    "integers": torch.ones(64, 1, dtype=torch.int32),
}


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES.keys())
def test_a_scale_of_another_kind_is_refused(
    scale: torch.Tensor, rotated_file: Path, tmp_path: Path, cpu: Hardware
) -> None:
    file = changed(rotated_file, tmp_path, lambda t, n: t.update({f"{WEIGHT}.weight_scale": scale}))
    with pytest.raises(WrongModel, match=r"to_q.weight is stored as INT8_CONVROT64\[64, 64\] in a quantization"):
        QwenImageTransformer(open_checkpoint(file), dtype=torch.bfloat16, hardware=cpu)


@pytest.mark.parametrize("header", ["{", "[]", "{}", '{"layers": []}', '{"layers": {"a": 1}}'])
def test_a_header_whose_notes_are_damaged_is_refused(header: str, rotated_file: Path, tmp_path: Path) -> None:
    metadata = {**open_checkpoint(rotated_file).metadata, "_quantization_metadata": header}
    save_file(load_file(rotated_file), tmp_path / "m.safetensors", metadata=metadata)
    with pytest.raises(DamagedFile, match="_quantization_metadata"):
        sort_transformer(open_checkpoint(tmp_path / "m.safetensors"))


def test_a_rotated_file_names_the_package_that_is_missing(
    rotated_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    load_operator.cache_clear()
    monkeypatch.setitem(sys.modules, "comfy_kitchen", None)
    with pytest.raises(MissingPackage, match=r"m\.safetensors holds rotated .*`pip install comfy-kitchen`"):
        sort_transformer(open_checkpoint(changed(rotated_file, tmp_path, lambda t, n: None)))
    sort_transformer(open_checkpoint(changed(rotated_file, tmp_path, without_rotation)))


def without_rotation(tensors: Weights, note: dict[str, Any]) -> None:
    """Every layer as int8 that is not rotated."""
    for name in [name for name in tensors if name.endswith(".comfy_quant")]:
        tensors[name] = note_bytes({"format": "int8_tensorwise"})
    note.pop("convrot")


@pytest.mark.slow
def test_the_plan_of_a_full_size_transformer_on_stored_mxfp8_is_what_its_run_takes() -> None:
    linear = LinearChoice(Computing.FAST, {"mxfp8": "cuda"})
    footprint = require_planned_peaks(in_mxfp8(full_size_checkpoint(3)), 1.5, linear)
    assert footprint.native
    assert footprint.slot_bytes < 0.24e9  # 0.45e9 decoded
    assert len(footprint.mlp_chunks) > 1  # each token has scales of its own
