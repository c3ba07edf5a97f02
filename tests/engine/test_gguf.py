"""GGUF's blocks decode to what the gguf package says, bit for bit, and whole models compute with those weights."""

import json
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import full_size
import gguf
import numpy as np
import pytest
import torch
from full_size_run import require_planned_peaks
from gguf import GGMLQuantizationType
from gguf_files import llama_name, read_gguf, write_gguf_text_encoder, write_gguf_transformer
from live_bytes import LiveBytes
from qwenimage_lowvram.engine.errors import WrongModel
from qwenimage_lowvram.engine.files.checkpoint import Checkpoint, open_checkpoint
from qwenimage_lowvram.engine.formats import CODECS, decode_alone
from qwenimage_lowvram.engine.formats.chunks import CHUNK_WEIGHTS
from qwenimage_lowvram.engine.formats.gguf import GGUF, GgufCodec
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen25_vl.component import TEXT_ENCODER
from qwenimage_lowvram.engine.models.qwen25_vl.tensors import sort_text_encoder
from qwenimage_lowvram.engine.models.qwen25_vl.text_encoder import TextEncoder
from qwenimage_lowvram.engine.models.qwen_image.branch import Branch
from qwenimage_lowvram.engine.models.qwen_image.tensors import sort_transformer
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.models.recognition import require
from qwenimage_lowvram.engine.planning.request import GIB
from qwenimage_lowvram.engine.planning.text_encoder import plan_text_encoder, text_encoder_peak_bytes
from safetensors.torch import load_file
from small_checkpoint import TextSize, make_text_encoder, make_tokenizer, make_transformer
from torch._subclasses.fake_tensor import FakeTensorMode

# where a type's fp16 numbers lie in its block
HALVES = {
    "Q8_0": [0], "Q4_0": [0], "Q5_0": [0], "Q4_1": [0, 2], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2],
    "Q2_K": [80, 82], "Q3_K": [108], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0],
    "IQ3_S": [0], "IQ3_XXS": [0], "IQ2_S": [0], "IQ2_XS": [0], "IQ2_XXS": [0], "IQ1_S": [0],
    "TQ1_0": [52], "TQ2_0": [64],
    "MXFP4": [-1],  # its byte 0 is an exponent, and the highest ones make no numbers
    "IQ1_M": [54],  # the highest bits of its number, among others
}  # fmt: skip
BOTH_WAYS = [codec for codec in GGUF if not codec.type.endswith("_K") and not codec.type.startswith("IQ")]
BOTH_WAYS = [codec for codec in BOTH_WAYS if not codec.type.startswith("TQ")]
by_name = pytest.mark.parametrize("codec", GGUF, ids=lambda codec: codec.name)


def blocks_of(codec: GgufCodec, count: int, *, finite: bool = True) -> np.ndarray:
    """(count, bytes of a block): every bit random, but for fp16 numbers that are no numbers."""
    blocks = np.random.default_rng(count).integers(0, 256, (count, codec.block_bytes), dtype=np.uint8)
    if finite:
        for at in HALVES[codec.type]:
            blocks[:, at + 1] &= 0xBF
    return blocks


def decoded(codec: GgufCodec, raw: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    weights = raw.shape[-1] // codec.block_bytes * codec.block_weights
    out = torch.full((*raw.shape[:-1], weights), float("nan"), dtype=dtype)
    tables = codec.table_parts(Path())
    beside = [torch.frombuffer(bytearray(table.data), dtype=torch.int8).view(table.shape) for table in tables]
    decode_alone(CODECS[codec.name], out, [torch.from_numpy(raw), *beside])
    return out


def test_every_type_that_the_common_files_use_is_read() -> None:
    assert {codec.type for codec in GGUF} == set(HALVES)


@by_name
def test_random_blocks_decode_bit_for_bit_as_the_gguf_package_does(codec: GgufCodec) -> None:
    raw = blocks_of(codec, 3000)
    expected = gguf.quants.dequantize(raw, GGMLQuantizationType[codec.type])
    assert np.isfinite(expected).all()
    assert np.array_equal(decoded(codec, raw).numpy(), expected)


@by_name
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_compute_dtype_is_reached_in_one_rounding(codec: GgufCodec, dtype: torch.dtype) -> None:
    raw = blocks_of(codec, 500)
    expected = torch.from_numpy(gguf.quants.dequantize(raw, GGMLQuantizationType[codec.type])).to(dtype)
    assert torch.equal(decoded(codec, raw, dtype), expected)


@pytest.mark.slow
@by_name
def test_a_weight_of_several_chunks_has_no_seam(codec: GgufCodec) -> None:
    columns = 4 * codec.block_weights
    rows = CHUNK_WEIGHTS // columns * 2 + 7
    raw = blocks_of(codec, rows * 4).reshape(rows, -1)
    expected = gguf.quants.dequantize(raw, GGMLQuantizationType[codec.type])
    assert np.array_equal(decoded(codec, raw).numpy(), expected)


@by_name
def test_no_bit_pattern_breaks_decoding(codec: GgufCodec) -> None:
    assert decoded(codec, blocks_of(codec, 200, finite=False)).shape == (200, codec.block_weights)


@pytest.mark.parametrize("codec", BOTH_WAYS, ids=lambda codec: codec.name)
def test_a_weight_quantized_by_the_gguf_package_comes_back_within_the_types_error(codec: GgufCodec) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    raw = gguf.quants.quantize(weight.numpy(), GGMLQuantizationType[codec.type])
    assert raw.shape == codec.raw_shape(weight.shape)
    error = (decoded(codec, raw) - weight).norm() / weight.norm()
    assert error < {"Q8_0": 0.006, "Q5_1": 0.05, "Q5_0": 0.05, "Q4_1": 0.09, "Q4_0": 0.1, "MXFP4": 0.13}[codec.type]


# whole models


@pytest.fixture(scope="module")
def transformer_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """diffusers' transformer with the weights that a GGUF file stores, and the file."""
    model = make_transformer(layers=3, text_dim=32)
    file = tmp_path_factory.mktemp("gguf") / "transformer.gguf"
    write_gguf_transformer(file, model.state_dict(), dict(model.config), "Q5_1", "Q8_0", "Q4_0")
    model.load_state_dict(read_gguf(file))
    return model, file


def a_branch(dtype: torch.dtype = torch.float32, device: str = "cpu", side: int = 6, text_dim: int = 32) -> Branch:
    generator = torch.Generator().manual_seed(0)
    return Branch(
        torch.randn(1, side * side, 64, generator=generator).to(dtype).to(device),
        ((1, side, side),),
        torch.randn(1, 9, text_dim, generator=generator).to(dtype).to(device),
        None,
        0.7,
    )


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("resident", [(), (1,), (0, 1, 2)])
def test_a_gguf_transformer_computes_what_diffusers_does_with_its_decoded_weights(
    transformer_file: tuple[Any, Path], hardware: Hardware, resident: tuple[int, ...]
) -> None:
    model, file = transformer_file
    branch = a_branch()
    expected = model(
        hidden_states=branch.tokens,
        encoder_hidden_states=branch.prompt_embeds,
        timestep=torch.tensor([branch.timestep]),
        img_shapes=[list(branch.shapes)],
        return_dict=False,
    )[0]
    transformer = QwenImageTransformer(open_checkpoint(file), dtype=torch.float32, hardware=hardware)
    formats = [tuple(param.codec for param in block.params) for block in transformer.store.blocks]
    assert len(set(formats)) == len(formats) > 1  # as in K_M files, the same weight differs from block to block
    transformer.load(resident)
    with transformer.session(slots=2) as session:
        assert torch.equal(session.forward([branch])[0], expected)


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory: pytest.TempPathFactory, comfyui_path: Path) -> tuple[Any, Path]:
    """transformers' text encoder with the weights that a GGUF file stores, and the file."""
    model = make_text_encoder(make_tokenizer(full=False, comfyui=comfyui_path), TextSize(), seed=2)
    folder = tmp_path_factory.mktemp("gguf")
    model.save_pretrained(folder / "encoder")
    config = json.loads((folder / "encoder" / "config.json").read_text(encoding="utf-8"))
    weights = load_file(folder / "encoder" / "model.safetensors")
    write_gguf_text_encoder(folder / "encoder.gguf", weights, config, "Q8_0")
    stored = read_gguf(folder / "encoder.gguf")
    parameters = dict(model.named_parameters())
    for name in weights:
        if (llama := llama_name(name)) is not None:
            own = name.replace("model.", "model.language_model.", 1)
            parameters[own if own in parameters else name].data = stored.pop(llama)
    assert not stored
    return model, folder / "encoder.gguf"


@torch.no_grad()
def test_a_gguf_encoder_computes_what_transformers_does_with_its_decoded_weights(
    encoder_file: tuple[Any, Path], hardware: Hardware
) -> None:
    model, file = encoder_file
    ids = [5, 17, 300, 17, 2]
    encoder = TextEncoder(open_checkpoint(file), dtype=torch.float32, hardware=hardware)
    expected = model.model(input_ids=torch.tensor([ids])).last_hidden_state
    difference = (encoder.encode([ids])[0] - expected).abs().max() / expected.abs().max()
    assert difference < 1e-6


def test_low_bit_files_of_transformer_and_encoder_compute_with_their_decoded_weights(
    tmp_path: Path, hardware: Hardware, comfyui_path: Path
) -> None:
    model = make_transformer(layers=3, heads=4, head_dim=64, text_dim=32)  # rows of whole blocks of 256
    file = tmp_path / "transformer.gguf"
    write_gguf_transformer(file, model.state_dict(), dict(model.config), "IQ2_XXS", "TQ1_0", "IQ3_S", "IQ1_S", "TQ2_0")
    model.load_state_dict(read_gguf(file))
    branch = a_branch()
    with torch.no_grad():
        expected = model(
            hidden_states=branch.tokens,
            encoder_hidden_states=branch.prompt_embeds,
            timestep=torch.tensor([branch.timestep]),
            img_shapes=[list(branch.shapes)],
            return_dict=False,
        )[0]
    transformer = QwenImageTransformer(open_checkpoint(file), dtype=torch.float32, hardware=hardware)
    used = {param.codec for block in transformer.store.blocks for param in block.params}
    assert {"gguf_iq2_xxs", "gguf_tq1_0", "gguf_iq3_s", "gguf_iq1_s", "gguf_tq2_0"} <= used
    with transformer.session(slots=2) as session:
        assert torch.equal(session.forward([branch])[0], expected)
    # an i1 file of the encoder, with embeddings of another type, as such files have them
    size = TextSize(hidden=256, intermediate=256)
    text_model = make_text_encoder(make_tokenizer(full=False, comfyui=comfyui_path), size, seed=2)
    text_model.save_pretrained(tmp_path / "encoder")
    config = json.loads((tmp_path / "encoder" / "config.json").read_text(encoding="utf-8"))
    weights = load_file(tmp_path / "encoder" / "model.safetensors")
    write_gguf_text_encoder(tmp_path / "encoder.gguf", weights, config, "IQ3_XXS")
    stored = read_gguf(tmp_path / "encoder.gguf")
    parameters = dict(text_model.named_parameters())
    for name in weights:
        if (llama := llama_name(name)) is not None:
            own = name.replace("model.", "model.language_model.", 1)
            parameters[own if own in parameters else name].data = stored[llama]
    encoder = TextEncoder(open_checkpoint(tmp_path / "encoder.gguf"), dtype=torch.float32, hardware=hardware)
    ids = [5, 17, 300, 17, 2]
    with torch.no_grad():
        reference = text_model.model(input_ids=torch.tensor([ids])).last_hidden_state
    assert (encoder.encode([ids])[0] - reference).abs().max() / reference.abs().max() < 1e-6


def test_a_gguf_encoders_settings_are_those_of_its_header(encoder_file: tuple[Any, Path]) -> None:
    model, file = encoder_file
    config, text = sort_text_encoder(open_checkpoint(file)).config, model.config.text_config
    assert config["num_attention_heads"] == text.num_attention_heads
    assert config["num_key_value_heads"] == text.num_key_value_heads
    rope = getattr(text, "rope_parameters", None) or text.rope_scaling  # transformers 4
    assert config["mrope_section"] == tuple(rope["mrope_section"])
    assert config["rope_theta"] == 1e6
    assert abs(config["rms_norm_eps"] - 1e-6) < 1e-12


# the plan


def in_format(checkpoint: Checkpoint, codec: GgufCodec) -> Checkpoint:
    """The checkpoint with its fp8 matrices in a GGUF type."""
    tensors = {
        name: replace(entry, dtype=codec.type, nbytes=prod(codec.raw_shape(entry.shape)))
        if entry.dtype == "F8_E4M3"
        else entry
        for name, entry in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=tensors)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "limit_gib"), [("Q4_K", 1.2), ("Q8_0", 3.0), ("IQ2_XXS", 1.1)])
def test_the_plan_of_a_full_size_gguf_transformer_is_what_its_run_takes(kind: str, limit_gib: float) -> None:
    codec = next(codec for codec in GGUF if codec.type == kind)
    checkpoint = in_format(full_size.transformer_checkpoint(torch.float8_e4m3fn, layers=3), codec)
    footprint = require_planned_peaks(checkpoint, limit_gib)
    assert footprint.scratch_bytes == codec.scratch_bytes((3072, 12288), on_host=False)


@pytest.mark.slow
def test_the_plan_of_a_full_size_gguf_encoder_is_what_its_run_takes() -> None:
    codec = next(codec for codec in GGUF if codec.type == "Q4_K")
    lengths = [60, 40]
    with FakeTensorMode(), LiveBytes("cuda") as live, torch.inference_mode():
        encoder = TextEncoder(
            in_format(full_size.text_encoder_checkpoint(torch.float8_e4m3fn, layers=2), codec),
            dtype=torch.bfloat16,
            hardware=full_size.fake_gpu(),
            source=full_size.EmptySource,
        )
        encoder._embed = lambda prompts, images: [  # type: ignore[method-assign]  # its rows are read from the file
            torch.empty(1, len(ids), encoder.hidden_size, dtype=torch.bfloat16, device="cuda") for ids in prompts
        ]
        assert plan_text_encoder(encoder.footprint, lengths, 2 * GIB) == 2
        live.reset_peak()
        encoder.encode([[0] * length for length in lengths], slots=2)
        assert abs(live.peak / text_encoder_peak_bytes(encoder.footprint, lengths, 2) - 1) < 0.1


# what is refused


def renamed(file: Path, architecture: str) -> Path:
    """The file with another architecture of the same length."""
    raw = file.read_bytes()
    assert raw.count(b"qwen2vl") > 1
    (file.parent / "other.gguf").write_bytes(raw.replace(b"qwen2vl", architecture.encode()))
    return file.parent / "other.gguf"


def test_the_text_only_sister_of_the_encoder_is_refused(encoder_file: tuple[Any, Path]) -> None:
    other = open_checkpoint(renamed(encoder_file[1], "qwen2xx"))
    with pytest.raises(WrongModel, match=r"is the text encoder of another model \(GGUF architecture 'qwen2xx', \d+"):
        require(other, TEXT_ENCODER)
    with pytest.raises(WrongModel, match="text encoder of another model"):
        sort_text_encoder(other)


def test_files_in_each_others_places_are_named(
    transformer_file: tuple[Any, Path], encoder_file: tuple[Any, Path]
) -> None:
    with pytest.raises(WrongModel, match=r"is a Qwen2.5-VL text encoder .*belongs in models/text_encoders"):
        sort_transformer(open_checkpoint(encoder_file[1]))
    with pytest.raises(WrongModel, match=r"is a Qwen-Image transformer .*belongs in models/diffusion_models"):
        sort_text_encoder(open_checkpoint(transformer_file[1]))
