"""Damaged files: a clear error that names the file, never a crash, a hang or gigabytes of memory. 500 of them."""

import json
import struct
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from gguf_files import write_gguf_text_encoder, write_gguf_transformer, write_gguf_vision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qwenimage_lowvram.engine.errors import QwenLowVRAMError
from qwenimage_lowvram.engine.files.checkpoint import Checkpoint, open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen25_vl.text_encoder import TextEncoder
from qwenimage_lowvram.engine.models.qwen25_vl.vision_tensors import sort_vision
from qwenimage_lowvram.engine.models.qwen_image.branch import Branch
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.models.qwen_image_vae.image_vae import ImageVAE
from qwenimage_lowvram.engine.models.qwen_image_vae.tensor_names import require_image_vae
from qwenimage_lowvram.engine.streaming import read_params
from safetensors.torch import save
from small_checkpoint import TextSize, make_text_encoder, make_tokenizer, make_transformer

pytestmark = pytest.mark.slow

MiB = 1024**2
CPU = Hardware.detect(torch.device("cpu"))


# what the nodes do with a file, and the least that can be computed with it


def _as_transformer(checkpoint: Checkpoint) -> None:
    transformer = QwenImageTransformer(checkpoint, dtype=torch.float32, hardware=CPU)
    transformer.load(())
    prompt = torch.zeros(1, 3, transformer.config.joint_attention_dim)
    with transformer.session(slots=1) as session:
        session.forward([Branch(torch.zeros(1, 4, 64), ((1, 2, 2),), prompt, None, 0.5)])


def _as_text_encoder(checkpoint: Checkpoint) -> None:
    TextEncoder(checkpoint, dtype=torch.float32, hardware=CPU).encode([[0, 1, 0]])


def _as_vision_part(checkpoint: Checkpoint) -> None:
    vision = sort_vision(checkpoint)
    for tensors in (vision.outside, *vision.blocks):
        shapes = {name: entry.shape for name, entry in tensors.items()}
        read_params(tensors, shapes, torch.float32, str(vision.checkpoint.path))


def _as_vae(checkpoint: Checkpoint) -> None:
    require_image_vae(checkpoint)
    shapes = {name: entry.shape for name, entry in checkpoint.tensors.items()}
    tensors = read_params(checkpoint.tensors, shapes, torch.float32, str(checkpoint.path))
    ImageVAE.from_state_dict(tensors, dtype=torch.float32).decode(torch.zeros(1, 16, 1, 2, 2))


PLACES = {
    "transformer": _as_transformer,
    "text encoder": _as_text_encoder,
    "vision part": _as_vision_part,
    "vae": _as_vae,
}


def use(path: Path, *places: str) -> dict[str, str]:
    """What is said of the file in each place that does not take it. Fails for another error than ours, and for one
    that does not name the file or has no end."""
    said: dict[str, str] = {}
    for place in places:
        try:
            PLACES[place](open_checkpoint(path))
        except QwenLowVRAMError as error:
            said[place] = str(error)
            assert path.parent.name in said[place]
            assert len(said[place]) < 2000
            said[place].encode()  # no half of a character, which no log could write
    return said


@contextmanager
def within_memory(limit_bytes: int) -> Iterator[None]:
    """Fails if Python's objects, or the process as a whole, ever take more than that in addition."""
    before = _peak_rss()
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit_bytes
    finally:
        tracemalloc.stop()
    assert _peak_rss() - before < limit_bytes


def _peak_rss() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def damaged(examples: int) -> Callable[[Any], Any]:
    """The same examples in every run; each may take 5 seconds, of which it needs a tenth."""
    limits = settings(
        max_examples=examples,
        deadline=timedelta(seconds=5),
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: limits(given(data=st.data())(test))


# whole files


@dataclass(frozen=True)
class Whole:
    """A file that is whole: its bytes, the place that takes it, and what lies beside it."""

    name: str
    raw: bytes
    place: str
    beside: tuple[tuple[str, bytes], ...] = ()

    def write(self, folder: Path, raw: bytes | None = None) -> Path:
        folder.mkdir(exist_ok=True)
        for name, contents in self.beside:
            (folder / name).write_bytes(contents)
        (folder / self.name).write_bytes(self.raw if raw is None else raw)
        return folder / self.name


@pytest.fixture(scope="module")
def whole(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Whole]:
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        num_layers=2, num_attention_heads=1, attention_head_dim=32, joint_attention_dim=16, axes_dims_rope=(4, 14, 14)
    )
    weights = {name: value.half() for name, value in transformer.state_dict().items()}
    config = {"config": json.dumps(dict(transformer.config))}
    encoder = make_text_encoder(make_tokenizer(full=False, comfyui=comfyui_path), TextSize(), seed=0)
    encoder_config = encoder.config.to_dict()
    text = {name.replace("model.language_model.", "model.", 1): value for name, value in encoder.state_dict().items()}
    text = {name.replace("model.visual.", "visual.", 1): value for name, value in text.items()}
    vae = AutoencoderKLQwenImage(base_dim=8, z_dim=16).state_dict()

    folder = tmp_path_factory.mktemp("whole")
    even = make_transformer(layers=2, text_dim=32)
    write_gguf_transformer(folder / "t.gguf", even.state_dict(), dict(even.config), "Q8_0", "Q4_0")
    write_gguf_text_encoder(folder / "e.gguf", text, encoder_config, "Q8_0")
    write_gguf_vision(folder / "mmproj-e.gguf", text, encoder_config, "F16")
    gguf_files = {file.name: file.read_bytes() for file in folder.iterdir()}
    mmproj = (("mmproj-e.gguf", gguf_files["mmproj-e.gguf"]),)

    single = json.dumps(encoder_config, default=str)
    return {
        "transformer": Whole("m.safetensors", save(weights, config), "transformer"),
        "text encoder": Whole("m.safetensors", save(text, {"config": single}), "text encoder"),
        "vision part": Whole("m.safetensors", save(text, {"config": single}), "vision part"),
        "vae": Whole("m.safetensors", save(vae), "vae"),
        "fp8 with notes": Whole("m.safetensors", save(_noted(weights, _fp8_note), config), "transformer"),
        "int8 with notes": Whole("m.safetensors", save(_noted(weights, _int8_note), config), "transformer"),
        "nf4": Whole("m.safetensors", save(_noted(weights, _nf4_note), config), "transformer"),
        "gguf transformer": Whole("t.gguf", gguf_files["t.gguf"], "transformer"),
        "gguf encoder": Whole("e.gguf", gguf_files["e.gguf"], "text encoder", mmproj),
        "gguf encoder with vision part": Whole("e.gguf", gguf_files["e.gguf"], "vision part", mmproj),
        "mmproj": Whole("mmproj-e.gguf", mmproj[0][1], "vision part", (("e.gguf", gguf_files["e.gguf"]),)),
    }


def _noted(
    weights: dict[str, torch.Tensor], parts: Callable[[torch.Tensor], dict[str, Any]]
) -> dict[str, torch.Tensor]:
    """The weights with every matrix of the attention as `parts` stores it: endings of its name to tensors."""
    stored = {}
    for name, value in weights.items():
        if value.ndim == 2 and ".attn." in name:
            for ending, part in parts(value).items():
                stored[name.removesuffix("weight") + ending] = part if isinstance(part, torch.Tensor) else _text(part)
        else:
            stored[name] = value
    return stored


def _text(note: Any) -> torch.Tensor:
    return torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)


def _fp8_note(weight: torch.Tensor) -> dict[str, Any]:
    note = {"format": "float8_e4m3fn"}
    return {"weight": weight.to(torch.float8_e4m3fn), "weight_scale": torch.ones(()), "comfy_quant": note}


def _int8_note(weight: torch.Tensor) -> dict[str, Any]:
    note = {"format": "int8_tensorwise"}
    return {"weight": weight.to(torch.int8), "weight_scale": torch.ones(weight.shape[0], 1), "comfy_quant": note}


def _nf4_note(weight: torch.Tensor) -> dict[str, Any]:
    note = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": list(weight.shape)}
    packed = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
    absmax = torch.ones(-(-weight.numel() // 64))
    return {"weight": packed, "weight.absmax": absmax, "weight.quant_state.bitsandbytes__nf4": note}


def split(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header, and its data."""
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def joined(header: bytes, contents: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + contents


# damages

# stand for what json.dumps would not write; the names of the marks are in no file
_RAW = {
    "@deep@": "[" * 900 + "]" * 900,
    "@deeper@": "[" * 50_000 + "]" * 50_000,
    "@digits@": "9" * 5000,
    "@wide@": "[" + "1," * 100_000 + "1]",
    "@large@": "[" + ",".join(["9223372036854775807"] * 20_000) + "]",
    "@half@": '"\\ud800"',
    "@nul@": '"\\u0000"',
}
_VALUES = st.sampled_from(
    [
        *_RAW, None, True, False, -1, 0, 1, 2, 3, 8, 16, 33, 64, 128, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**400,
        1.5, float("nan"), float("inf"), -1e308, "", "x", "0", "F32", "F16", "BF16", "F8_E4M3", "I8", "U8", "I64",
        "F4", "NF4", "INT8", "Q4_K", "nf4", "fp4", "int8_tensorwise", "svdquant", "../m.safetensors", "[[[[", "{",
        [], {}, [[]], {"a": {}}, [0], [0, 0], [2**62, 2**62], [1, 2, 3, 4, 5, 6], ["a", None], {"format": None},
        "m" * 5000,
    ]
)  # fmt: skip
_NAMES = st.sampled_from(
    [
        "", "weight", "__metadata__", "transformer_blocks.0", "transformer_blocks.x.attn.to_q.weight",
        "transformer_blocks.7.attn.to_q.weight", "transformer_blocks.99999999999999999999.a", "layers.", "layers.-1.a",
        "transformer_blocks.0.attn.to_q.weight_scale", "transformer_blocks.0.attn.to_q.comfy_quant",
        "transformer_blocks.0.attn.to_q.weight.quant_state.bitsandbytes__nf4", "img_in.weight_scale",
        "transformer_blocks.0.attn.to_q.SCB", "time_text_embed.addition_t_embedding.weight", "__index_timestep_zero__",
        "decoder.conv1.weight", "decoder.upsamples.9.resample.1.weight", "visual.blocks.99.x", "v.blk.0.attn_q.weight",
        "lora_up.weight", "config", "shape", "dtype", "zero_cond_t", "axes_dims_rope", "vision_config", "rope_scaling",
        "_quantization_metadata",
    ]
)  # fmt: skip


def damage(value: Any, data: st.DataObject) -> Any:
    """The JSON value with one thing in it changed, taken away, renamed or put in."""
    if not isinstance(value, dict | list) or not value or data.draw(st.integers(0, 9)) == 0:
        return data.draw(_VALUES)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = data.draw(st.sampled_from(keys))
    act = data.draw(st.sampled_from(["descend", "descend", "descend", "delete", "rename", "add", "swap"]))
    changed = value.copy()
    if act == "delete":
        del changed[key]
    elif isinstance(changed, list):
        changed[key] = damage(changed[key], data)
    elif act == "rename":
        changed[data.draw(_NAMES)] = changed.pop(key)
    elif act == "add":
        changed[data.draw(_NAMES)] = data.draw(_VALUES) if data.draw(st.booleans()) else changed[key]
    elif act == "swap":
        other = data.draw(st.sampled_from(keys))
        changed[key], changed[other] = changed[other], changed[key]
    else:
        changed[key] = damage(changed[key], data)
    return changed


def damaged_json(value: Any, data: st.DataObject) -> bytes:
    for _ in range(data.draw(st.integers(1, 2))):
        value = damage(value, data)
    text = json.dumps(value)
    for mark, raw in _RAW.items():
        text = text.replace(f'"{mark}"', raw)
    return text.encode()


def damaged_bytes(raw: bytes, header: int, data: st.DataObject) -> bytes:
    """With one to three places of its first `header` bytes overwritten, and perhaps cut off."""
    changed = bytearray(raw)
    numbers = [0, 1, 2, 7, 8, 32, 255, 2**15, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, header - 1))
        patch = data.draw(
            st.binary(min_size=1, max_size=9)
            | st.sampled_from(numbers).map(lambda n: struct.pack("<Q", n))
            | st.sampled_from(numbers).map(lambda n: struct.pack("<I", n % 2**32))
        )
        changed[at : at + len(patch)] = patch
    if data.draw(st.booleans()):
        del changed[data.draw(st.integers(0, header + 100) | st.integers(0, len(raw) - 1)) :]
    return bytes(changed)


SAFETENSORS = ["transformer", "text encoder", "vision part", "vae", "fp8 with notes", "int8 with notes", "nf4"]
GGUF = ["gguf transformer", "gguf encoder", "gguf encoder with vision part", "mmproj"]


def test_every_file_is_whole_before_it_is_damaged(whole: dict[str, Whole], tmp_path: Path) -> None:
    for kind, file in whole.items():
        path = file.write(tmp_path / kind)
        if kind == "mmproj":
            path = path.with_name("e.gguf")
        assert use(path, file.place) == {}, kind
        assert set(use(path, *PLACES)) >= set(PLACES) - {file.place, "text encoder", "vision part"}, kind


@damaged(130)
def test_no_damaged_header_does_harm(data: st.DataObject, whole: dict[str, Whole], tmp_path: Path) -> None:
    file = whole[data.draw(st.sampled_from(SAFETENSORS))]
    header, contents = split(file.raw)
    raw = joined(damaged_json(header, data), contents)
    with within_memory(200 * MiB):
        use(file.write(tmp_path, raw), file.place)


@damaged(60)
def test_no_damaged_bytes_do_harm(data: st.DataObject, whole: dict[str, Whole], tmp_path: Path) -> None:
    file = whole[data.draw(st.sampled_from(SAFETENSORS))]
    length = 8 + int.from_bytes(file.raw[:8], "little")
    with within_memory(200 * MiB):
        use(file.write(tmp_path, damaged_bytes(file.raw, length, data)), file.place)


@damaged(130)
def test_no_damaged_gguf_file_does_harm(data: st.DataObject, whole: dict[str, Whole], tmp_path: Path) -> None:
    file = whole[data.draw(st.sampled_from(GGUF))]
    header = len(file.raw) // 20 if data.draw(st.booleans()) else 400
    path = file.write(tmp_path, damaged_bytes(file.raw, header, data))
    with within_memory(200 * MiB):
        use(path.with_name("e.gguf") if file.name.startswith("mmproj") else path, file.place)


@damaged(60)
def test_no_damaged_note_of_a_quantization_does_harm(
    data: st.DataObject, whole: dict[str, Whole], tmp_path: Path
) -> None:
    file = whole[data.draw(st.sampled_from(["fp8 with notes", "int8 with notes", "nf4"]))]
    header, contents = split(file.raw)
    name = data.draw(st.sampled_from([n for n in header if n.endswith((".comfy_quant", "bitsandbytes__nf4"))]))
    begin, end = header[name]["data_offsets"]
    note = damaged_json(json.loads(contents[begin:end]), data)
    if data.draw(st.booleans()):
        note = note[: data.draw(st.integers(0, len(note)))]
    entry = {"dtype": "U8", "shape": [len(note)], "data_offsets": [len(contents), len(contents) + len(note)]}
    header[name] = entry
    with within_memory(200 * MiB):
        use(file.write(tmp_path, joined(json.dumps(header).encode(), contents + note)), file.place)


@damaged(80)
def test_no_damaged_configuration_does_harm(data: st.DataObject, whole: dict[str, Whole], tmp_path: Path) -> None:
    file = whole[data.draw(st.sampled_from(["transformer", "text encoder", "vision part"]))]
    header, contents = split(file.raw)
    config = damaged_json(json.loads(header["__metadata__"]["config"]), data)
    folder = tmp_path / file.place
    file.write(folder)
    pipeline = {"_class_name": "QwenImagePipeline", "_diffusers_version": "0.35.0"}
    (tmp_path / "model_index.json").write_text(json.dumps(pipeline))
    if data.draw(st.booleans()):
        (folder / "config.json").write_bytes(config)
        (tmp_path / "model_index.json").write_bytes(damaged_json(pipeline, data))
        path = folder
    else:
        header["__metadata__"]["config"] = config.decode()
        path = file.write(folder, joined(json.dumps(header).encode(), contents))
        (folder / "config.json").unlink(missing_ok=True)
    with within_memory(200 * MiB):
        use(path, file.place)


@damaged(40)
def test_no_damaged_index_of_shards_does_harm(data: st.DataObject, whole: dict[str, Whole], tmp_path: Path) -> None:
    file = whole["transformer"]
    header, contents = split(file.raw)
    names = [name for name in header if name != "__metadata__"]
    shards = {"m-1.safetensors": names[:30], "m-2.safetensors": names[30:]}
    for shard, held in shards.items():
        part, data_of_shard = {"__metadata__": header["__metadata__"]}, b""
        for name in held:
            begin, end = header[name]["data_offsets"]
            at = len(data_of_shard)
            part[name] = header[name] | {"data_offsets": [at, at + end - begin]}
            data_of_shard += contents[begin:end]
        (tmp_path / shard).write_bytes(joined(json.dumps(part).encode(), data_of_shard))
    index = {"metadata": {"total_size": 9}, "weight_map": {name: shard for shard in shards for name in shards[shard]}}
    path = tmp_path / "m.safetensors.index.json"
    path.write_text(json.dumps(index))
    assert use(tmp_path, file.place) == {}
    path.write_bytes(damaged_json(index, data))
    with within_memory(200 * MiB):
        use(tmp_path, file.place)
