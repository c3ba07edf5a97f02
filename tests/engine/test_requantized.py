"""Blocks are quantized once, in little memory, into a file that is whole or not there; the next load starts from it."""

import errno
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import full_size
import pytest
import torch
from bnb_folder import dequantized, load_quantized
from devtools.cache import REPOSITORY
from diffusers import BitsAndBytesConfig, QwenImageTransformer2DModel
from live_bytes import LiveBytes
from qwenimage_lowvram.engine.caches import requantized_files as quantized_files
from qwenimage_lowvram.engine.caches.requantized_files import (
    State,
    cache_path,
    cached_files,
    clear,
    remove_dead,
    whole_file,
)
from qwenimage_lowvram.engine.caches.requantized_layout import FORMATS
from qwenimage_lowvram.engine.caches.requantized_weights import RequantizedWeights
from qwenimage_lowvram.engine.errors import CacheError, DamagedFile, InvalidRequest
from qwenimage_lowvram.engine.files import atomic_files
from qwenimage_lowvram.engine.files.checkpoint import Checkpoint, open_checkpoint
from qwenimage_lowvram.engine.formats import decode_alone, stored_param
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen_image.branch import Branch
from qwenimage_lowvram.engine.models.qwen_image.tensors import sort_transformer
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.streaming import TensorReader, read_params
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_checkpoint import make_transformer
from torch._subclasses.fake_tensor import FakeTensorMode

CPU = torch.device("cpu")
LAYERS = 3
every_format = pytest.mark.parametrize("name", FORMATS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's transformer folder in bf16, as the real one is."""
    folder = tmp_path_factory.mktemp("plain") / "transformer"
    make_transformer(layers=LAYERS, text_dim=64).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture
def source(folder: Path) -> Checkpoint:
    return open_checkpoint(folder)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "models" / "cache"


def weights_of(source: Checkpoint, name: str, cache: Path) -> RequantizedWeights:
    weights = RequantizedWeights.of(source, name, cache)
    assert weights is not None
    return weights


def quantize(source: Checkpoint, name: str, cache: Path) -> Checkpoint:
    return weights_of(source, name, cache).make(CPU)


def is_quantized(name: str) -> bool:
    linear = name.endswith(".weight") and "norm" not in name and "_mod." not in name
    return name.startswith("transformer_blocks.") and linear


def parts_in(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.endswith(".part")] if folder.exists() else []


# what is stored


@every_format
def test_the_cache_decodes_to_what_the_codec_makes_of_the_source(
    name: str, source: Checkpoint, folder: Path, cache: Path
) -> None:
    held = quantize(source, name, cache)
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    shapes = {key: tuple(weight.shape) for key, weight in weights.items()}
    decoded: dict[str, torch.Tensor] = {}
    for i, block in enumerate(sort_transformer(held).blocks):
        prefix = f"transformer_blocks.{i}."
        inside = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
        for key, weight in read_params(block, inside, torch.float32, "cache").items():
            decoded[prefix + key] = weight
            assert (held.tensors[prefix + key].file == cache_path(source, name, cache)) == is_quantized(prefix + key)
    assert sum(is_quantized(key) for key in decoded) == LAYERS * 12
    for key, weight in decoded.items():
        expected = weights[key].float()
        if is_quantized(key):
            codec = FORMATS[name]
            decode_alone(codec, expected, codec.encode(weights[key]))
            assert not torch.equal(expected, weights[key].float())
        assert torch.equal(weight, expected), key


@every_format
def test_nothing_but_the_matrices_of_the_blocks_comes_from_the_cache(
    name: str, source: Checkpoint, cache: Path
) -> None:
    held = quantize(source, name, cache)
    for key, entry in source.tensors.items():
        if not is_quantized(key):
            assert held.tensors[key] == entry
    assert {path.name for path in cache.iterdir()} == {cache_path(source, name, cache).name}


def test_every_format_has_an_identity_of_its_own(source: Checkpoint, cache: Path) -> None:
    identities = {quantize(source, name, cache).identity for name in FORMATS}
    assert len(identities | {source.identity}) == 1 + len(FORMATS)


@every_format
def test_the_file_alone_is_read_by_the_reader_of_others_files(name: str, source: Checkpoint, cache: Path) -> None:
    held = quantize(source, name, cache)
    alone = open_checkpoint(cache_path(source, name, cache))
    merged = replace(source, tensors={**source.tensors, **alone.tensors})
    ours, others = sort_transformer(held), sort_transformer(merged)
    for mine, other in zip(ours.blocks, others.blocks, strict=True):
        for key in mine:
            if key.endswith(".weight"):
                assert stored_param(key, mine, "ours") == stored_param(key, other, "others")


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_bitsandbytes_itself_reads_the_file(name: str, source: Checkpoint, folder: Path, cache: Path) -> None:
    quantize(source, name, cache)
    stored = load_file(cache_path(source, name, cache))
    key = "transformer_blocks.1.img_mlp.net.0.proj.weight"
    state = {part.removeprefix(f"{key}."): tensor for part, tensor in stored.items() if part.startswith(f"{key}.")}
    param = bitsandbytes.nn.Params4bit.from_prequantized(stored[key], state, device="cpu")
    weight = load_file(folder / "diffusion_pytorch_model.safetensors")[key]
    packed, quant_state = bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type=name)
    assert torch.equal(stored[key], packed)
    assert param.quant_state.dtype == torch.bfloat16
    assert torch.equal(
        bitsandbytes.functional.dequantize_4bit(param.data, param.quant_state),
        bitsandbytes.functional.dequantize_4bit(packed, quant_state),
    )


def test_int8_is_what_bitsandbytes_stores(source: Checkpoint, folder: Path, cache: Path) -> None:
    quantize(source, "int8", cache)
    stored = load_file(cache_path(source, "int8", cache))
    key = "transformer_blocks.0.attn.to_q"
    weight = load_file(folder / "diffusion_pytorch_model.safetensors")[f"{key}.weight"]
    data, maxima, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.half())
    assert torch.equal(stored[f"{key}.weight"], data)
    assert torch.equal(stored[f"{key}.SCB"], maxima)


@every_format
def test_every_tensor_of_the_file_is_aligned(name: str, source: Checkpoint, cache: Path) -> None:
    quantize(source, name, cache)
    entries = open_checkpoint(cache_path(source, name, cache)).tensors.values()
    assert all(entry.offset % 4 == 0 for entry in entries if entry.dtype == "F32")


def test_a_prefixed_file_keeps_its_prefix(source: Checkpoint, folder: Path, tmp_path: Path, cache: Path) -> None:
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    file = tmp_path / "模型 v1.safetensors"
    config = json.dumps(source.config)
    save_file({f"model.diffusion_model.{k}": w for k, w in weights.items()}, file, metadata={"config": config})
    prefixed = open_checkpoint(file)
    held = quantize(prefixed, "nf4", cache)
    assert held.tensors["model.diffusion_model.transformer_blocks.0.attn.to_q.weight"].dtype == "NF4"
    assert cache_path(prefixed, "nf4", cache).name == f"模型_v1.nf4.{prefixed.identity}.safetensors"


@every_format
@pytest.mark.parametrize("letter", ["x", "é", "白", "\U0001d538"])
def test_the_unfinished_file_of_a_long_name_has_a_name_that_disks_take(
    name: str, letter: str, source: Checkpoint, cache: Path
) -> None:
    given = replace(source, path=cache / f"{letter * 60}.safetensors")
    path = cache_path(given, name, cache)
    with whole_file(path, mtime_s=0) as stream:
        (part,) = parts_in(cache)
        assert len(part.name.encode()) <= 255
        stream.write(b"0")
    assert path.name.startswith(letter * 30)


# what it computes


def forward(checkpoint: Checkpoint, hardware: Hardware) -> torch.Tensor:
    transformer = QwenImageTransformer(checkpoint, dtype=torch.float32, hardware=hardware)
    transformer.load([1])
    with transformer.session(slots=1) as session:
        return session.forward([a_branch()])[0]


def a_branch() -> Branch:
    generator = torch.Generator().manual_seed(0)
    tokens, prompt = torch.randn(1, 30, 64, generator=generator), torch.randn(1, 9, 64, generator=generator)
    return Branch(tokens, ((1, 5, 6),), prompt, None, 0.7)


@torch.no_grad()
def diffusers_forward(model: Any) -> torch.Tensor:
    branch = a_branch()
    return model(
        hidden_states=branch.tokens,
        encoder_hidden_states=branch.prompt_embeds,
        timestep=torch.tensor([branch.timestep]),
        img_shapes=[list(branch.shapes)],
        return_dict=False,
    )[0]


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


OTHER_LAYERS = ["proj_out", "norm_out", "img_in", "txt_in", "time_text_embed", "img_mod", "txt_mod"]
CONFIGS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_it_computes_what_diffusers_and_bitsandbytes_do_with_the_same_layers_quantized(
    name: str, source: Checkpoint, folder: Path, cache: Path, hardware: Hardware
) -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    model = load_quantized(folder, BitsAndBytesConfig(**CONFIGS[name], llm_int8_skip_modules=OTHER_LAYERS))
    linears = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    assert {f"{key}.weight" for key, module in model.named_modules() if isinstance(module, linears)} == {
        key for key in source.tensors if is_quantized(key)
    }
    if name == "int8":  # bitsandbytes' own layers also round what they multiply with
        config = {key: value for key, value in model.config.items() if not key.startswith(("_", "quant"))}
        state = dequantized(model)
        model = QwenImageTransformer2DModel(**config)
        model.load_state_dict(state)
    assert relative(forward(quantize(source, name, cache), hardware), diffusers_forward(model)) < 1e-5


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("fp8_e4m3fn_scaled", 0.005, 0.02), ("int8", 0.001, 0.005), ("nf4", 0.02, 0.05), ("fp4", 0.03, 0.06)],
)
def test_the_result_has_the_error_of_its_format(
    name: str, least: float, most: float, source: Checkpoint, cache: Path, cpu: Hardware
) -> None:
    assert least < relative(forward(quantize(source, name, cache), cpu), forward(source, cpu)) < most


# memory and size


@pytest.mark.slow
@every_format
def test_quantizing_holds_less_than_a_block(name: str, tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "transformer"
    make_transformer(layers=2, heads=10, head_dim=128, text_dim=64).bfloat16().save_pretrained(folder)
    source = open_checkpoint(folder)
    weights = weights_of(source, name, cache)
    with LiveBytes("cpu") as live:
        weights.make(CPU)
    block = sum(entry.nbytes for key, entry in source.tensors.items() if is_quantized(key)) // 2
    assert live.peak <= weights.working_bytes < block
    assert live.now == 0


@every_format
def test_encoding_in_chunks_changes_nothing_and_leaves_the_weight_alone(name: str) -> None:
    weight = torch.randn(1100, 2048, generator=torch.Generator().manual_seed(0))
    before = weight.clone()
    whole, rows = torch.empty_like(weight), torch.empty_like(weight)
    decode_alone(FORMATS[name], whole, FORMATS[name].encode(weight))
    assert torch.equal(weight, before)
    for i in range(0, 1100, 100):
        part = weight[i : i + 100]
        if name.startswith("fp8"):  # one scale for all: the largest number has to be in each part
            part = torch.cat([part, weight[weight.abs().amax(dim=1).argmax()][None]])
        out = torch.empty_like(part)
        decode_alone(FORMATS[name], out, FORMATS[name].encode(part))
        rows[i : i + 100] = out[:100]
    assert torch.equal(whole, rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "block_bytes", "all_bytes"),
    [
        (None, 0.455e9, 27.4e9),
        ("fp8_e4m3fn_scaled", 0.229e9, 13.8e9),
        ("int8", 0.229e9, 13.8e9),
        ("nf4", 0.128e9, 7.8e9),
        ("fp4", 0.128e9, 7.8e9),
    ],
)
def test_the_whole_transformer_takes_its_formats_size(
    name: str | None, block_bytes: float, all_bytes: float, cache: Path
) -> None:
    source = full_size.transformer_checkpoint()
    held = source
    if name is not None:
        weights = weights_of(source, name, cache)
        held = weights.checkpoint(data_start=0)
        assert 0.9 * all_bytes < weights.nbytes < all_bytes
        assert weights.working_bytes < 0.455e9
    with FakeTensorMode(), torch.inference_mode():
        footprint = QwenImageTransformer(
            held, dtype=torch.bfloat16, hardware=full_size.fake_gpu(), source=full_size.EmptySource
        ).footprint
    assert footprint.blocks == 60
    assert 0.9 * block_bytes < footprint.stored_bytes <= block_bytes
    assert 60 * footprint.stored_bytes + footprint.outside_bytes < all_bytes


# the second load


class CountingReader(TensorReader):
    read_bytes = 0

    def read_into(self, *args: Any, **kwargs: Any) -> None:
        CountingReader.read_bytes += 1
        super().read_into(*args, **kwargs)


@every_format
def test_the_second_load_reads_nothing_of_the_source(
    name: str, source: Checkpoint, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwenimage_lowvram.engine.caches.requantized_weights.TensorReader", CountingReader)
    monkeypatch.setattr(CountingReader, "read_bytes", 0)
    first = quantize(source, name, cache)
    assert CountingReader.read_bytes == LAYERS * 12
    second = weights_of(source, name, cache).open()
    assert second == first
    assert CountingReader.read_bytes == LAYERS * 12


def test_a_copy_of_the_cache_is_believed_once_its_data_has_been_compared(source: Checkpoint, cache: Path) -> None:
    first = quantize(source, "nf4", cache)
    file = cache_path(source, "nf4", cache)
    made = file.stat().st_mtime_ns
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data)
    assert file.stat().st_mtime_ns != made
    assert weights_of(source, "nf4", cache).open() == first
    assert file.stat().st_mtime_ns == made


# what is not believed


def cut(data: bytes) -> bytes:
    return data[:-1]


def flipped(data: bytes) -> bytes:
    middle = len(data) - len(data) // 3
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut off": cut,
    "half": lambda data: data[: len(data) // 2],
    "only the header": lambda data: data[: 8 + int.from_bytes(data[:8], "little")],
    "a bit": flipped,
    "zeros": lambda data: data[: 8 + int.from_bytes(data[:8], "little")].ljust(len(data), b"\0"),
    "another source": lambda data: data.replace(b'"source_identity": "', b'"source_identity": "0', 1),
    "another version": lambda data: data.replace(b'"version": "1"', b'"version": "0"', 1),
    "another format": lambda data: data.replace(b'"weight_format": "nf4"', b'"weight_format": "fp4"', 1),
    "no checksum": lambda data: data.replace(b'"crc32": "', b'"crc31": "', 1),
    "a tensor's name": lambda data: data.replace(b"attn.to_q.weight", b"attn.to_X.weight", 1),
    "no header": lambda data: data[:8] + b"?" + data[9:],
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_cache_is_made_again(
    damage: Callable[[bytes], bytes], source: Checkpoint, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = quantize(source, "nf4", cache)
    file = cache_path(source, "nf4", cache)
    data = file.read_bytes()
    changed = damage(data)
    assert changed != data
    file.write_bytes(changed)
    weights = weights_of(source, "nf4", cache)
    with caplog.at_level(logging.WARNING):
        assert weights.open() is None
    assert "will be made again" in caplog.text
    assert unstamped(weights.make(CPU)) == unstamped(first)
    assert tail(file) == tail_of(data)


def unstamped(checkpoint: Checkpoint) -> Checkpoint:
    """Without the times of its files."""
    tensors = {name: replace(entry, stamp=None) for name, entry in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=tensors)


def tail(file: Path) -> bytes:
    return tail_of(file.read_bytes())


def tail_of(data: bytes) -> bytes:
    return data[8 + int.from_bytes(data[:8], "little") :]


def test_a_source_that_changed_gets_a_cache_of_its_own(source: Checkpoint, folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    file, cache = tmp_path / "m.safetensors", tmp_path / "cache"
    metadata = {"config": json.dumps(source.config)}
    save_file(weights, file, metadata=metadata)
    first = open_checkpoint(file)
    quantize(first, "int8", cache)
    save_file({key: 2 * weight for key, weight in weights.items()}, file, metadata=metadata)
    os.utime(file, (1, 1))
    changed = open_checkpoint(file)
    assert weights_of(changed, "int8", cache).open() is None
    quantize(changed, "int8", cache)
    assert {f.path: f.state for f in cached_files(cache)} == {
        cache_path(first, "int8", cache): State.CHANGED,
        cache_path(changed, "int8", cache): State.USABLE,
    }


def test_a_source_that_changes_while_it_is_read_is_noticed(source: Checkpoint, folder: Path, tmp_path: Path) -> None:
    file, cache = tmp_path / "m.safetensors", tmp_path / "cache"
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    save_file(weights, file, metadata={"config": json.dumps(source.config)})
    with pytest.raises(DamagedFile, match="was changed after it was opened"):
        weights_of(open_checkpoint(file), "nf4", cache).make(CPU, lambda done, total: os.utime(file, (done, done)))
    assert list(cache.iterdir()) == []


# every other way out


class Interrupted(BaseException):
    """As ComfyUI's own is."""


@pytest.mark.parametrize("after", [0, 1, LAYERS])
def test_an_interruption_leaves_nothing(after: int, source: Checkpoint, cache: Path, open_handles: Any) -> None:
    def on_block(done: int, total: int) -> None:
        assert total == LAYERS
        if done == after:
            raise Interrupted

    weights = weights_of(source, "nf4", cache)
    with pytest.raises(Interrupted):
        weights.make(CPU, on_block)
    assert list(cache.iterdir()) == []
    assert weights.open() is None
    assert not any(open_handles(entry.file) for entry in source.tensors.values())


def test_progress_counts_every_block(source: Checkpoint, cache: Path) -> None:
    seen: list[tuple[int, int]] = []
    weights_of(source, "int8", cache).make(CPU, lambda done, total: seen.append((done, total)))
    assert seen == [(i, LAYERS) for i in range(LAYERS + 1)]


@pytest.mark.parametrize("at", ["a write", "a flush to the disk", "the end"])
def test_a_full_disk_leaves_nothing_and_says_so(
    at: str, source: Checkpoint, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"a write": 30, "a flush to the disk": 2, "the end": LAYERS + 1}
    count, claim = 0, atomic_files._claim

    def full(*args: Any) -> None:
        nonlocal count
        count += 1
        if count == calls[at]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def claim_full(path: Path) -> Any:
        part, stream = claim(path)
        return part, Writing(stream, full)

    if at == "a write":
        monkeypatch.setattr(atomic_files, "_claim", claim_full)
    else:
        monkeypatch.setattr(os, "fsync", full)
    weights = weights_of(source, "nf4", cache)
    with pytest.raises(CacheError, match=r"(?s)cannot be written .*No space left.*What to do: free space"):
        weights.make(CPU)
    assert count == calls[at]
    assert list(cache.iterdir()) == []
    monkeypatch.undo()
    assert weights.make(CPU).identity != source.identity


class Writing:
    """A file whose writes can fail."""

    def __init__(self, stream: Any, before: Callable[[], None]) -> None:
        self._stream, self._before = stream, before

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> "Writing":
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()

    def write(self, data: Any) -> int:
        self._before()
        return self._stream.write(data)


def test_a_disk_without_room_is_refused_before_anything_is_read(
    source: Checkpoint, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = weights_of(source, "nf4", cache)
    usage = type("Usage", (), {"free": weights.nbytes})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    for attempt in (weights.check_room, lambda: weights.make(CPU)):
        with pytest.raises(CacheError, match=r"(?s)needs 0.3 GB of free space and has 0.0 GB.*free 0.3 GB there"):
            attempt()
    assert not cache.exists()
    monkeypatch.undo()
    weights.check_room()
    quantize(source, "nf4", cache)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    weights.check_room()  # the file is there: nothing has to be written


def test_a_folder_that_cannot_be_written_to_is_named(source: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(CacheError, match=r"cache cannot be read \(.*Not a directory"):
        quantize(source, "nf4", tmp_path / "cache")


# several processes

CHILD = """
import sys
from pathlib import Path
import torch
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.caches.requantized_weights import RequantizedWeights
def on_block(done, total):
    if done == 1:
        print("one block done", flush=True)
        sys.stdin.readline()
source = open_checkpoint(Path(sys.argv[1]))
RequantizedWeights.of(source, "nf4", Path(sys.argv[2])).make(torch.device("cpu"), on_block)
"""
# a network drive whose locks stay on the machine that took them, and another machine
ELSEWHERE = """
from qwenimage_lowvram.engine.files import atomic_files
atomic_files._lock = lambda stream: True
atomic_files._this_machine = lambda: "0123abcd"
"""


@pytest.fixture
def child(folder: Path, cache: Path) -> Any:
    """`child(before="")` -> a process that runs that, quantizes, waits after the first block until told to go on."""
    children: list[subprocess.Popen[str]] = []

    def start(before: str = "") -> "subprocess.Popen[str]":
        paths = os.pathsep.join(str(REPOSITORY / path) for path in ("tools/alias", "tools"))
        process = subprocess.Popen(
            [sys.executable, "-c", before + CHILD, str(folder), str(cache)],
            env={**os.environ, "PYTHONPATH": paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        children.append(process)
        return process

    yield start
    for process in children:
        process.kill()
        process.communicate()


def wait_for_a_block(process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "one block done\n"


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_that_is_believed(child: Any, source: Checkpoint, cache: Path) -> None:
    process = child()
    weights = weights_of(source, "nf4", cache)
    wait_for_a_block(process)
    (part,) = parts_in(cache)
    remove_dead(cache)
    assert parts_in(cache) == [part]  # its process lives
    assert [file.state for file in cached_files(cache)] == [State.UNFINISHED]
    process.kill()
    process.wait()
    assert parts_in(cache) == [part]
    assert weights.open() is None
    weights.make(CPU)
    assert [path.name for path in cache.iterdir()] == [weights.path.name]


@pytest.mark.slow
def test_two_processes_at_once_both_end_well(child: Any, source: Checkpoint, cache: Path) -> None:
    children = [child(), child()]
    for process in children:
        wait_for_a_block(process)
    assert len(parts_in(cache)) == 2
    held = quantize(source, "nf4", cache)
    time.sleep(2.1)  # the time that a file carries has steps of two seconds: another one's would differ
    for process in children:
        process.communicate("go on\n", timeout=60)
    assert [process.returncode for process in children] == [0, 0]
    assert weights_of(source, "nf4", cache).open() == held
    assert [path.name for path in cache.iterdir()] == [cache_path(source, "nf4", cache).name]


@pytest.mark.slow
def test_two_machines_at_a_network_drive_that_passes_no_locks_on_both_end_well(
    child: Any, source: Checkpoint, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic_files, "_lock", lambda stream: True)
    process = child(ELSEWHERE)
    wait_for_a_block(process)
    (part,) = parts_in(cache)
    assert ".0123abcd-" in part.name
    remove_dead(cache)
    held = quantize(source, "nf4", cache)  # which looks for dead ones, too
    assert parts_in(cache) == [part]
    process.communicate("go on\n", timeout=60)
    assert process.returncode == 0
    assert weights_of(source, "nf4", cache).open() == held
    assert [path.name for path in cache.iterdir()] == [cache_path(source, "nf4", cache).name]


@pytest.mark.slow
def test_what_a_machine_leaves_on_a_network_drive_goes_after_a_day(child: Any, cache: Path) -> None:
    process = child(ELSEWHERE)
    wait_for_a_block(process)
    process.kill()
    process.wait()
    (part,) = parts_in(cache)
    remove_dead(cache)
    assert parts_in(cache) == [part]
    os.utime(part, (time.time() - 86500,) * 2)
    remove_dead(cache)
    assert parts_in(cache) == []


def test_where_another_process_holds_its_file_that_one_is_used(
    source: Checkpoint, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = quantize(source, "nf4", cache)

    def refused(*args: object) -> None:
        raise PermissionError(errno.EACCES, "The process cannot access the file")  # as on Windows

    monkeypatch.setattr(os, "replace", refused)
    monkeypatch.setattr(quantized_files, "PATIENCE_SECONDS", 0.1)
    assert weights_of(source, "nf4", cache).make(CPU) == first
    assert parts_in(cache) == []
    cache_path(source, "nf4", cache).unlink()
    with pytest.raises(
        CacheError, match=r"(?s)was written completely, but another program is using it.*exclude that folder"
    ):
        quantize(source, "nf4", cache)


def test_a_scanner_that_holds_the_finished_file_for_seconds_costs_no_quantizing(
    source: Checkpoint, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_file, attempts = os.replace, []

    def scanned(*args: Any) -> None:
        attempts.append(time.monotonic())
        if len(attempts) < 5:
            raise PermissionError(errno.EACCES, "The process cannot access the file")  # as on Windows
        replace_file(*args)

    monkeypatch.setattr(os, "replace", scanned)
    made = quantize(source, "nf4", cache)
    assert len(attempts) == 5
    assert weights_of(source, "nf4", cache).open() == made
    assert parts_in(cache) == []


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "a" / "f.safetensors"
    with whole_file(file, mtime_s=1000) as stream:
        stream.write(b"one")
        assert not file.exists()
    assert (file.read_bytes(), file.stat().st_mtime_ns) == (b"one", 1000 * 10**9)
    with pytest.raises(TypeError), whole_file(file, mtime_s=2000) as stream:
        stream.write(b"two" + "no bytes")  # type: ignore[operator]
    assert file.read_bytes() == b"one"
    assert list(file.parent.iterdir()) == [file]


# sources that are quantized


def write_fp8(folder: Path, file: Path, *, scaled: bool) -> Path:
    stored = {}
    for key, weight in load_file(folder / "diffusion_pytorch_model.safetensors").items():
        stored[key] = weight.to(torch.float8_e4m3fn) if is_quantized(key) else weight
        if scaled and is_quantized(key):
            stored[key.removesuffix("weight") + "scale_weight"] = torch.tensor(1.0)
    save_file(stored, file, metadata={"config": (folder / "config.json").read_text(encoding="utf-8")})
    return file


def test_a_quantized_source_is_refused_by_its_name(folder: Path, tmp_path: Path, cache: Path) -> None:
    plain = open_checkpoint(write_fp8(folder, tmp_path / "plain.safetensors", scaled=False))
    scaled = open_checkpoint(write_fp8(folder, tmp_path / "scaled.safetensors", scaled=True))
    for source, name, stored in [
        (plain, "nf4", r"fp8_e4m3fn\)"),
        (plain, "fp8_e4m3fn_scaled", r"fp8_e4m3fn\)"),
        (scaled, "int8", r"fp8_e4m3fn_scaled\)"),
    ]:
        with pytest.raises(InvalidRequest, match=rf"quantized already \({stored}.*\n\nWhat to do: .*auto"):
            RequantizedWeights.of(source, name, cache)
    assert RequantizedWeights.of(scaled, "fp8_e4m3fn_scaled", cache) is None


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_of_bitsandbytes_is_taken_as_it_is_in_its_own_format(
    name: str, folder: Path, tmp_path: Path, cache: Path
) -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    load_quantized(folder, BitsAndBytesConfig(**CONFIGS[name])).save_pretrained(tmp_path / "transformer")
    source = open_checkpoint(tmp_path / "transformer")
    assert RequantizedWeights.of(source, name, cache) is None
    with pytest.raises(InvalidRequest, match="quantized already"):
        RequantizedWeights.of(source, "fp8_e4m3fn_scaled", cache)


def test_a_quantized_checkpoint_is_not_quantized_again(source: Checkpoint, cache: Path) -> None:
    held = quantize(source, "nf4", cache)
    assert RequantizedWeights.of(held, "nf4", cache) is None
    with pytest.raises(InvalidRequest, match="nf4"):
        RequantizedWeights.of(held, "int8", cache)


def test_a_cut_source_is_named(source: Checkpoint, folder: Path, tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "m.safetensors"
    save_file(
        load_file(folder / "diffusion_pytorch_model.safetensors"), file, metadata={"config": json.dumps(source.config)}
    )
    opened = open_checkpoint(file)
    weights = weights_of(opened, "nf4", cache)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(DamagedFile, match=r"m\.safetensors was changed after it was opened \(\d+ bytes then"):
        weights.make(CPU)
    assert list(cache.iterdir()) == []


# the folder


def test_the_folder_is_listed_and_cleared(source: Checkpoint, folder: Path, tmp_path: Path, cache: Path) -> None:
    gone = tmp_path / "gone.safetensors"
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    save_file(weights, gone, metadata={"config": json.dumps(source.config)})
    quantize(open_checkpoint(gone), "int8", cache)
    damaged = cache_path(open_checkpoint(gone), "nf4", cache)
    damaged.write_bytes(b"nothing")
    quantize(source, "nf4", cache)
    gone.unlink()
    others = [cache / "mine.safetensors", cache / "notes.txt", cache / "theirs.part"]
    save_file(weights, others[0])
    for other in others[1:]:
        other.write_text("not ours")
    states = {file.path.name.split(".")[1]: file.state for file in cached_files(cache) if file.path != damaged}
    assert states == {"int8": State.GONE, "nf4": State.USABLE}
    (usable,) = (file for file in cached_files(cache) if file.state is State.USABLE)
    assert (usable.source, usable.weight_format) == (str(source.path), "nf4")
    assert usable.nbytes == usable.path.stat().st_size
    assert abs(usable.made - time.time()) < 600
    removed = clear(cache, quantized_files.UNUSED).removed
    assert {file.state for file in removed} == {State.GONE, State.DAMAGED}
    assert set(cache.iterdir()) == {usable.path, *others}
    assert [file.path for file in clear(cache, quantized_files.FINISHED).removed] == [usable.path]
    assert set(cache.iterdir()) == set(others)


def odd_things(folder: Path) -> list[Path]:
    """What nobody expects under names like those of our files."""
    name = "model.nf4.0123456789abcdef"
    a_folder, a_link, a_part, theirs, unreadable = (
        folder / name
        for name in (
            f"a{name}.safetensors",
            f"b{name}.safetensors",
            f"c{name}.01234567.safetensors.part",
            "download.safetensors.part",
            f"e{name}.safetensors",
        )
    )
    a_folder.mkdir(parents=True)
    a_part.mkdir()
    (folder.parent / "elsewhere").write_bytes(b"somebody's")
    a_link.symlink_to(folder.parent / "elsewhere")
    theirs.write_bytes(b"of a download")
    unreadable.write_bytes(b"")
    made = [a_folder, a_link, a_part, theirs, unreadable]
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / f"f{name}.safetensors")
        os.mkfifo(folder / f"g{name}.01234567.safetensors.part")
        made += [folder / f"f{name}.safetensors", folder / f"g{name}.01234567.safetensors.part"]
    return made


def test_odd_things_are_shown_and_left_alone(source: Checkpoint, cache: Path, forbid: Callable[[Path], None]) -> None:
    odd = odd_things(cache)
    unreadable = odd[4]
    forbid(unreadable)
    quantize(source, "nf4", cache)
    states = {file.path: file.state for file in cached_files(cache)}
    assert {path: states.get(path) for path in odd} == {
        path: State.UNREADABLE if path == unreadable else State.FOREIGN for path in odd
    }
    cleared = clear(cache, list(State))
    assert [file.state for file in cleared.removed] == [State.USABLE]
    assert cleared.failed == ()
    assert set(cache.iterdir()) == set(odd)
    assert (cache.parent / "elsewhere").read_bytes() == b"somebody's"


@pytest.mark.parametrize(
    "record", ["a\0b", "\ud800", "x" * 300, "/" + "y/" * 3000, "", "line\nbreak", "a pipe"], ids=ascii
)
def test_a_record_that_names_no_file_is_shown_and_cleared(record: str, tmp_path: Path, cache: Path) -> None:
    if record == "a pipe":
        if not hasattr(os, "mkfifo"):
            pytest.skip("Windows has no pipes among its files")
        record = str(tmp_path / "pipe.safetensors")
        os.mkfifo(record)
    header = {"__metadata__": {"quantized_by": quantized_files.MAKER, "source": record, "weight_format": "n\0"}}
    raw = json.dumps(header).encode()
    file = cache / "odd.nf4.0123456789abcdef.safetensors"
    cache.mkdir(parents=True)
    file.write_bytes(len(raw).to_bytes(8, "little") + raw)
    (shown,) = cached_files(cache)
    assert (shown.source, shown.state) == (record, State.GONE if record else shown.state)
    assert clear(cache, quantized_files.UNUSED).removed == (shown,)
    assert not file.exists()


@pytest.mark.parametrize("kind", ["a folder", "a pipe", "a link"])
def test_what_is_in_the_way_of_a_file_is_named_before_the_run_and_left_alone(
    kind: str, source: Checkpoint, cache: Path
) -> None:
    file = cache_path(source, "nf4", cache)
    cache.mkdir(parents=True)
    if kind == "a pipe" and not hasattr(os, "mkfifo"):
        pytest.skip("Windows has no pipes among its files")
    make = {"a folder": Path.mkdir, "a pipe": getattr(os, "mkfifo", None), "a link": lambda at: at.symlink_to("none")}
    make[kind](file)
    before = file.lstat()
    weights = weights_of(source, "nf4", cache)
    with pytest.raises(CacheError, match=r"(?s)not a plain file.*left as it is.*move it away"):
        weights.check_room()
    assert weights.open() is None
    with pytest.raises(CacheError, match=r"(?s)not a plain file.*left as it is.*move it away"):
        weights.make(CPU)
    assert file.lstat() == before
    assert list(cache.iterdir()) == [file]


def test_clearing_goes_on_after_a_file_that_cannot_be_removed(
    source: Checkpoint, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("fp4", "int8", "nf4"):
        quantize(source, name, cache)
    files = [cache_path(source, name, cache) for name in ("fp4", "int8", "nf4")]
    unlink = Path.unlink

    def held(path: Path, **options: Any) -> None:
        if path == files[1]:
            raise PermissionError(errno.EACCES, "The process cannot access the file")
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", held)
    cleared = clear(cache, quantized_files.FINISHED)
    assert [file.path for file in cleared.removed] == [files[0], files[2]]
    assert [(file.path, why) for file, why in cleared.failed] == [(files[1], "The process cannot access the file")]


def test_a_folder_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert cached_files(tmp_path / "none") == []
    assert clear(tmp_path / "none", quantized_files.FINISHED) == quantized_files.Cleared((), ())
    remove_dead(tmp_path / "none")


def test_the_header_says_what_the_file_is(source: Checkpoint, cache: Path) -> None:
    quantize(source, "int8", cache)
    with safe_open(cache_path(source, "int8", cache), framework="pt") as file:
        metadata = file.metadata()
    assert metadata["source"] == str(source.path)
    assert metadata["source_identity"] == source.identity
    assert (metadata["weight_format"], metadata["version"]) == ("int8", "1")
