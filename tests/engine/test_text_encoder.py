"""Embeddings are diffusers' own, each layer is read once for all prompts, and nothing of the encoder stays."""

import gc
import json
import logging
import shutil
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from qwenimage_lowvram.engine.errors import InvalidRequest, MissingFile, WrongModel
from qwenimage_lowvram.engine.files.checkpoint import Checkpoint, open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen25_vl.text_encoder import TextEncoder
from qwenimage_lowvram.engine.models.qwen_image.prompt_template import PROMPT_TEMPLATE_TOKENS
from qwenimage_lowvram.engine.models.qwen_image.prompts import PromptTokenizer
from qwenimage_lowvram.engine.models.qwen_vl.image_prompts import drop_template
from qwenimage_lowvram.engine.streaming import FileSource, StoredBlock
from safetensors.torch import load_file, save_file
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer

PROMPTS = {
    "a token that ends texts": "a dog<|endoftext|> in the rain",
    "English": "a cat on a chair, photo of high quality",
    "Chinese": "白色背景上的红色圆形，水墨画",
    "brackets": "(a:1.2) [b] {c} {} %s \\n",
    "700 words": "image " * 700,
    "empty": "",
}
LAYERS = 2


@pytest.fixture(scope="module")
def pipeline(small_pipeline: Path) -> Any:
    from diffusers import QwenImagePipeline

    return QwenImagePipeline.from_pretrained(small_pipeline, transformer=None, vae=None)


@pytest.fixture(scope="module")
def checkpoint(small_pipeline: Path) -> Checkpoint:
    return open_checkpoint(small_pipeline / "text_encoder")


@pytest.fixture(scope="module")
def tokenizer(small_pipeline: Path) -> PromptTokenizer:
    return PromptTokenizer(small_pipeline / "tokenizer")


def make_encoder(checkpoint: Checkpoint, hardware: Hardware, dtype: torch.dtype = torch.float32) -> TextEncoder:
    return TextEncoder(checkpoint, dtype=dtype, hardware=hardware)


@pytest.mark.parametrize("slots", [1, 2])
def test_embeddings_are_those_of_diffusers(
    slots: int, checkpoint: Checkpoint, tokenizer: PromptTokenizer, pipeline: Any, hardware: Hardware
) -> None:
    encoder = make_encoder(checkpoint, hardware)
    encoded = encoder.encode([tokenizer.encode(prompt) for prompt in PROMPTS.values()], slots=slots)
    for prompt, states in zip(PROMPTS.values(), encoded, strict=True):
        wanted, mask = pipeline.encode_prompt(prompt, max_sequence_length=1024)
        ours = drop_template(states, 34)
        assert mask is None
        assert ours.dtype is torch.float32
        # the reference cuts what is beyond its longest prompt
        assert ours.shape[1] == wanted.shape[1] or (wanted.shape[1] == 1024 < ours.shape[1])
        assert (ours[:, : wanted.shape[1]] - wanted).abs().max() < 1e-5
        assert wanted.std() > 0.1


def test_one_prompt_alone_is_encoded_as_among_others(
    checkpoint: Checkpoint, tokenizer: PromptTokenizer, cpu: Hardware
) -> None:
    encoder = make_encoder(checkpoint, cpu)
    ids = [tokenizer.encode(prompt) for prompt in ("a cat", "the dog", "")]
    together = encoder.encode(ids)
    assert all(torch.equal(encoder.encode([one])[0], states) for one, states in zip(ids, together, strict=True))


@pytest.mark.parametrize("dtype", ["bf16", "fp8", "fp8_scaled", "fp8_quant_row"])
def test_other_formats_differ_by_their_own_error_only(
    dtype: str, small_pipeline: Path, checkpoint: Checkpoint, tokenizer: PromptTokenizer, tmp_path: Path, cpu: Hardware
) -> None:
    from small_checkpoint import write_split_files

    files = write_split_files(small_pipeline, tmp_path, dtype="bf16", text_dtype=dtype)
    split = open_checkpoint(tmp_path / "text_encoders" / files.text_encoder)
    ids = [tokenizer.encode("a cat")]
    wanted = drop_template(make_encoder(checkpoint, cpu).encode(ids)[0], 34)
    got = drop_template(make_encoder(split, cpu).encode(ids)[0], 34)
    error = (got - wanted).norm() / wanted.norm()
    assert 0 < error < (0.02 if dtype == "bf16" else 0.15)


@pytest.mark.parametrize("prompts", [1, 2, 5])
def test_all_prompts_of_a_call_read_each_layer_once(
    prompts: int, checkpoint: Checkpoint, tokenizer: PromptTokenizer, hardware: Hardware
) -> None:
    encoder = make_encoder(checkpoint, hardware)
    assert encoder.fetched_bytes == 0
    layers = sum(e.nbytes for name, e in checkpoint.tensors.items() if name.startswith("model.layers."))
    visited: list[int] = []
    encoder.encode([tokenizer.encode("a cat " * i) for i in range(prompts)], on_layer=visited.append)
    assert encoder.fetched_bytes == layers
    assert visited == list(range(LAYERS))


def test_head_and_vision_tower_are_not_touched(
    checkpoint: Checkpoint, tokenizer: PromptTokenizer, tmp_path: Path, cpu: Hardware
) -> None:
    unused = [name for name in checkpoint.tensors if name.startswith(("visual.", "lm_head."))]
    assert any("lm_head" in name for name in unused)
    assert any("visual" in name for name in unused)
    nowhere = {name: replace(checkpoint.tensors[name], file=tmp_path / "nowhere") for name in unused}
    ids = [tokenizer.encode("a cat")]
    encoder = make_encoder(replace(checkpoint, tensors={**checkpoint.tensors, **nowhere}), cpu)
    assert torch.equal(encoder.encode(ids)[0], make_encoder(checkpoint, cpu).encode(ids)[0])
    lost = {
        name: replace(e, file=tmp_path / "nowhere") for name, e in checkpoint.tensors.items() if ".layers.1." in name
    }
    with pytest.raises(MissingFile, match="nowhere"):
        make_encoder(replace(checkpoint, tensors={**checkpoint.tensors, **lost}), cpu).encode(ids)


def test_only_the_rows_of_the_prompts_tokens_are_read(checkpoint: Checkpoint, tmp_path: Path, cpu: Hardware) -> None:
    name = "model.embed_tokens.weight"
    entry = checkpoint.tensors[name]
    row = entry.nbytes // entry.shape[0]
    rows = 20_000_000  # of a file that would be larger than the real one
    ids = [7, 3, 19_000_000, 3]
    with (tmp_path / "rows").open("wb") as stream:
        for i in sorted(set(ids)):
            stream.seek(i * row)
            stream.write(torch.full((entry.shape[1],), float(i % 100) + 1).numpy().tobytes())
        # whoever reads on reads beyond the end of the file
    long = replace(entry, file=tmp_path / "rows", offset=0, nbytes=rows * row, shape=(rows, entry.shape[1]), stamp=None)
    encoder = make_encoder(replace(checkpoint, tensors={**checkpoint.tensors, name: long}), cpu)
    before = _bytes_read()
    (states,) = encoder.encode([ids])
    assert states.shape == (1, 4, entry.shape[1])
    layers = encoder.fetched_bytes
    assert _bytes_read() - before < layers + 100_000


def _bytes_read() -> int:
    """What this process has read so far, where the system tells it."""
    counters = Path("/proc/self/io")
    return int(counters.read_text().split()[1]) if counters.exists() else 0


@pytest.mark.parametrize("scale", [(), (512, 1)], ids=["per tensor", "per row"])
def test_an_encoded_embedding_is_decoded_row_by_row(
    scale: tuple[int, ...], small_pipeline: Path, tokenizer: PromptTokenizer, tmp_path: Path, cpu: Hardware
) -> None:
    (file,) = (small_pipeline / "text_encoder").glob("*.safetensors")
    tensors = load_file(file)
    weight = tensors["model.embed_tokens.weight"]
    factor = weight.abs().amax(dim=1, keepdim=True) if scale else weight.abs().max()
    data = (weight / (factor / 448)).to(torch.float8_e4m3fn)
    encoders = {}
    for kind in ("encoded", "decoded"):
        folder = tmp_path / kind
        folder.mkdir()
        shutil.copy(small_pipeline / "text_encoder" / "config.json", folder)
        if kind == "encoded":
            changed = {"model.embed_tokens.weight": data, "model.embed_tokens.weight_scale": factor / 448}
        else:
            changed = {"model.embed_tokens.weight": data.float() * (factor / 448)}
        save_file({**tensors, **changed}, folder / "model.safetensors")
        encoders[kind] = make_encoder(open_checkpoint(folder), cpu)
    ids = [tokenizer.encode("a cat, 猫"), tokenizer.encode("")]
    for encoded, decoded in zip(encoders["encoded"].encode(ids), encoders["decoded"].encode(ids), strict=True):
        assert torch.equal(encoded, decoded)


def _four_bits(shape: torch.Size) -> dict[str, torch.Tensor]:
    """An embedding as bitsandbytes stores it."""
    note = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(shape)}
    return {
        "weight": torch.zeros(shape.numel() // 2, 1, dtype=torch.uint8),
        "weight.absmax": torch.ones(shape.numel() // 64),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8),
    }


def _tiled(shape: torch.Size) -> dict[str, torch.Tensor]:
    """An embedding as ComfyUI stores it in nvfp4."""
    scales = -(-shape[0] // 128) * 128 * (-(-(shape[1] // 16) // 4) * 4)
    return {
        "weight": torch.zeros(shape[0], shape[1] // 2, dtype=torch.uint8),
        "weight_scale": torch.zeros(scales, dtype=torch.uint8),
        "weight_scale_2": torch.ones(()),
        "comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8),
    }


@pytest.mark.parametrize(("make", "words"), [(_four_bits, "in nf4, whose"), (_tiled, "in nvfp4, whose .* by 128 rows")])
def test_an_embedding_whose_rows_cannot_be_decoded_singly_is_refused_before_a_prompt_is_there(
    make: Callable[[torch.Size], dict[str, torch.Tensor]],
    words: str,
    small_pipeline: Path,
    tmp_path: Path,
    cpu: Hardware,
) -> None:
    (file,) = (small_pipeline / "text_encoder").glob("*.safetensors")
    tensors = load_file(file)
    parts = make(tensors.pop("model.embed_tokens.weight").shape)
    shutil.copy(small_pipeline / "text_encoder" / "config.json", tmp_path)
    save_file({**tensors, **{f"model.embed_tokens.{n}": part for n, part in parts.items()}}, tmp_path / "m.safetensors")
    with pytest.raises(WrongModel, match=words):
        make_encoder(open_checkpoint(tmp_path), cpu)


class _WatchedSource(FileSource):
    """The file's source, with weak references to the buffers that it filled."""

    def __init__(self, blocks: Sequence[StoredBlock]) -> None:
        super().__init__(blocks)
        self.filled: list[weakref.ref[Any]] = []
        self.indices: set[int] = set()

    def read(self, index: int, out: torch.Tensor, start: int = 0) -> None:
        self.filled.append(weakref.ref(out.untyped_storage()))
        self.indices.add(index)
        super().read(index, out, start)


@pytest.mark.parametrize("hardware", [(True, True), (True, False)], ids=["straight", "staged"], indirect=True)
@pytest.mark.parametrize("stopped", [False, True])
def test_nothing_of_the_encoder_stays(
    stopped: bool,
    checkpoint: Checkpoint,
    tokenizer: PromptTokenizer,
    hardware: Hardware,
    open_handles: Callable[[Path], int],
) -> None:
    sources: list[_WatchedSource] = []

    def watched(blocks: Sequence[StoredBlock]) -> _WatchedSource:
        sources.append(_WatchedSource(blocks))
        return sources[-1]

    encoder = TextEncoder(checkpoint, dtype=torch.bfloat16, hardware=hardware, source=watched)
    ids = [tokenizer.encode("a cat"), tokenizer.encode("")]
    layers: list[weakref.ref[Any]] = []

    def on_layer(index: int) -> None:
        if index == 1:
            objects = gc.get_objects()
            layers.extend(weakref.ref(o) for o in objects if type(o) is Qwen2_5_VLDecoderLayer and o not in others)
            if stopped:
                raise KeyboardInterrupt

    def encode() -> None:
        try:
            encoder.encode(ids, on_layer=on_layer)
        except KeyboardInterrupt:
            assert stopped

    others = [o for o in gc.get_objects() if type(o) is Qwen2_5_VLDecoderLayer]  # of other models and other tests
    with LiveBytes("cpu") as live:
        encode()
        assert live.now == 0
    assert layers
    assert all(ref() is None for ref in layers)
    assert sources[0].indices == set(range(LAYERS))
    assert all(ref() is None for source in sources for ref in source.filled)
    assert not any(open_handles(file) for file in {entry.file for entry in checkpoint.tensors.values()})


def test_an_encoder_that_was_stopped_encodes_again(
    checkpoint: Checkpoint, tokenizer: PromptTokenizer, hardware: Hardware
) -> None:
    encoder = make_encoder(checkpoint, hardware)
    ids = [tokenizer.encode("a cat")]
    wanted = encoder.encode(ids)[0]

    def stop(index: int) -> None:
        if index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encoder.encode(ids, on_layer=stop)
    assert torch.equal(encoder.encode(ids)[0], wanted)


@pytest.mark.parametrize(("repeats", "warns"), [(10, False), (1100, True)])
def test_a_long_prompt_is_warned_of_and_not_cut(
    repeats: int, warns: bool, tokenizer: PromptTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        ids = tokenizer.encode("!" * repeats)
    assert len(ids) >= repeats + PROMPT_TEMPLATE_TOKENS
    assert any("is used in full" in message for message in caplog.messages) == warns


def test_the_template_ends_every_prompt(tokenizer: PromptTokenizer, pipeline: Any) -> None:
    end = pipeline.tokenizer("<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    for prompt in PROMPTS.values():
        assert tokenizer.encode(prompt)[-len(end) :] == end


def test_a_text_with_its_own_template_is_left_alone(tokenizer: PromptTokenizer, pipeline: Any) -> None:
    text = "<|im_start|>system\nDescribe.<|im_end|>\n"
    assert tokenizer.encode(text) == pipeline.tokenizer(text)["input_ids"]


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"holds no tokenizer \(tokenizer\.json, or vocab\.json and merges\.txt\)"):
        PromptTokenizer(tmp_path)


@pytest.mark.parametrize("token", [10**6, -2])
def test_a_token_that_the_model_does_not_have_is_named(token: int, checkpoint: Checkpoint, cpu: Hardware) -> None:
    rows = checkpoint.tensors["model.embed_tokens.weight"].shape[0]
    with pytest.raises(InvalidRequest, match=rf"Token {token} is beyond the {rows} rows of .*text_encoder"):
        make_encoder(checkpoint, cpu).encode([[1, 2], [3, token]])


def test_a_prompt_of_no_tokens_is_refused(checkpoint: Checkpoint, cpu: Hardware) -> None:
    with pytest.raises(InvalidRequest, match="has no tokens"):
        make_encoder(checkpoint, cpu).encode([[1], []])
