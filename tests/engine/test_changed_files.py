"""Files that change under a running model, and what is no file at all: told in words, never read as weights."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import write_gguf_transformer
from qwenimage_lowvram.engine.errors import CheckpointError, DamagedFile
from qwenimage_lowvram.engine.files import regular_file
from qwenimage_lowvram.engine.files.checkpoint import Checkpoint, open_checkpoint
from qwenimage_lowvram.engine.files.json_texts import read_json
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.lora.lora_file import match, open_lora
from qwenimage_lowvram.engine.models.qwen25_vl.text_encoder import TextEncoder
from qwenimage_lowvram.engine.models.qwen_image.branch import Branch
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.models.qwen_image.variants import variant_of
from safetensors.torch import load_file, save_file
from small_checkpoint import make_transformer
from split_files import write_split_files

CHANGED = r"was changed after it was opened .*What to do: queue the prompt again"


def weights_like(file: Path, seed: int) -> dict[str, torch.Tensor]:
    """Other weights of the same names, dtypes and shapes: a file of the same size."""
    torch.manual_seed(seed)
    return {name: torch.randn_like(tensor.float()).to(tensor.dtype) for name, tensor in load_file(file).items()}


def overwrite(file: Path) -> None:
    """In place, as a download that goes on, or a program that copies over it, does."""
    other = file.with_suffix(".other")
    save_file(weights_like(file, 7), other, metadata=dict(open_checkpoint(file).metadata))
    with file.open("r+b") as stream:
        stream.write(other.read_bytes())
    other.unlink()


def replace(file: Path) -> None:
    """Another file under its name."""
    other = file.with_suffix(".other")
    save_file(weights_like(file, 7), other, metadata=dict(open_checkpoint(file).metadata))
    os.replace(other, file)


@pytest.fixture
def models(small_pipeline: Path, tmp_path: Path) -> Path:
    write_split_files(small_pipeline, tmp_path, dtype="fp32", text_dtype="bf16")
    return tmp_path


def only(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def loaded(models: Path, cpu: Hardware) -> tuple[Path, QwenImageTransformer, Branch]:
    """The transformer's file, itself over it, and something to denoise."""
    file = only(models / "diffusion_models")
    transformer = QwenImageTransformer(open_checkpoint(file), dtype=torch.float32, hardware=cpu)
    transformer.load([])
    return file, transformer, Branch(torch.randn(1, 30, 64), ((1, 5, 6),), torch.randn(1, 9, 64), None, 0.7)


@pytest.mark.parametrize("change", [overwrite, replace])
def test_a_transformer_that_changed_is_no_image(change: Callable[[Path], None], models: Path, cpu: Hardware) -> None:
    file, transformer, branch = loaded(models, cpu)
    with transformer.session(slots=1) as session:
        session.forward([branch])
    change(file)
    with (
        pytest.raises(DamagedFile, match=rf"(?s){file.name} {CHANGED}"),
        transformer.session(slots=1) as session,
    ):
        session.forward([branch])


def test_a_file_that_changes_between_two_steps_is_noticed_in_the_second(models: Path, cpu: Hardware) -> None:
    file, transformer, branch = loaded(models, cpu)
    with transformer.session(slots=1) as session:
        session.forward([branch])
        overwrite(file)
        with pytest.raises(DamagedFile, match=rf"(?s){CHANGED}"):
            session.forward([branch])


@pytest.mark.parametrize("change", [overwrite, replace])
def test_a_text_encoder_that_changed_makes_no_embeddings(
    change: Callable[[Path], None], models: Path, cpu: Hardware
) -> None:
    file = only(models / "text_encoders")
    encoder = TextEncoder(open_checkpoint(file), dtype=torch.float32, hardware=cpu)
    encoder.encode([[5, 9]])
    change(file)
    with pytest.raises(DamagedFile, match=rf"(?s){CHANGED}"):
        encoder.encode([[5, 9]])


def test_a_lora_that_changed_is_not_added(models: Path, tmp_path: Path, cpu: Hardware) -> None:
    layer = "transformer_blocks.0.attn.to_q"
    file = tmp_path / "l.safetensors"
    tensors = {f"{layer}.lora_A.weight": torch.ones(2, 64), f"{layer}.lora_B.weight": torch.ones(64, 2)}
    save_file(tensors | {f"{layer}.alpha": torch.tensor(2.0)}, file)
    opened = open_lora(file)
    os.utime(file, (1, 1))
    with pytest.raises(DamagedFile, match=rf"(?s){CHANGED}"):
        match(opened, {f"{layer}.weight": (64, 64)})


# what is no regular file


def within_seconds(work: Callable[[], Any]) -> BaseException | None:
    """What it raised; fails where it has not come to an end after ten seconds."""
    raised: list[BaseException | None] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)
        else:
            raised.append(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(10)
    assert raised, "it waits for a pipe"
    return raised[0]


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    os.chdir(path.parent)  # a socket's name may have 107 bytes
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(path.name)


ODD = {
    "a pipe": make_pipe,
    "a socket": make_socket,
    "a folder": Path.mkdir,
    "a device": lambda p: p.symlink_to("/dev/zero"),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes among files")
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize(
    "place",
    ["config.json", "diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors"],
)
def test_what_is_no_file_is_named_and_holds_nobody_up(
    kind: str, place: str, tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "transformer"
    make_transformer().save_pretrained(folder)
    (folder / place).unlink(missing_ok=True)
    ODD[kind](folder / place)
    error = within_seconds(lambda: open_checkpoint(folder))
    assert isinstance(error, DamagedFile)
    assert f"{folder / place} is {kind}, but a file is needed" in str(error)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes among files")
@pytest.mark.parametrize("kind", ODD)
def test_a_pipelines_index_that_is_no_file_is_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_transformer().save_pretrained(tmp_path / "transformer")
    ODD[kind](tmp_path / "model_index.json")
    checkpoint = open_checkpoint(tmp_path / "transformer")
    error = within_seconds(lambda: variant_of(checkpoint, None))
    assert isinstance(error, DamagedFile)
    assert f"model_index.json is {kind}, but a file is needed" in str(error)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes among files")
@pytest.mark.parametrize("suffix", [".safetensors", ".gguf"])
@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a device"])
def test_a_single_file_that_is_none_is_named(
    kind: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / f"m{suffix}"
    ODD[kind](file)
    error = within_seconds(lambda: open_checkpoint(file))
    assert isinstance(error, DamagedFile)
    assert f"{file} is {kind}, but a file is needed" in str(error)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes among files")
def test_a_pipe_that_took_a_files_place_holds_no_reader_up(models: Path, cpu: Hardware) -> None:
    file = only(models / "text_encoders")
    encoder = TextEncoder(open_checkpoint(file), dtype=torch.float32, hardware=cpu)
    file.unlink()
    os.mkfifo(file)
    error = within_seconds(lambda: encoder.encode([[5, 9]]))
    assert isinstance(error, CheckpointError)
    assert "is a pipe" in str(error)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes among files")
@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a folder"])
def test_what_takes_a_files_place_between_the_look_and_the_opening_holds_nobody_up(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "config.json"
    file.write_text("{}", encoding="utf-8")
    look = regular_file.require_regular

    def look_and_swap(path: Path) -> None:
        look(path)
        if path.is_file():
            path.unlink()
            ODD[kind](path)

    monkeypatch.setattr(regular_file, "require_regular", look_and_swap)
    error = within_seconds(lambda: read_json(file))
    assert isinstance(error, DamagedFile)
    assert f"{file} is {kind}, but a file is needed" in str(error)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux lends files")
def test_a_file_that_a_file_server_has_lent_is_read_when_it_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"a": 1}', encoding="utf-8")
    lender = """
import fcntl, signal, sys, time
stream = open(sys.argv[1], "r+")
signal.signal(signal.SIGIO, lambda *_: (time.sleep(0.3), fcntl.fcntl(stream, fcntl.F_SETLEASE, fcntl.F_UNLCK)))
fcntl.fcntl(stream, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("lent", flush=True)
for _ in range(100):
    time.sleep(0.1)
"""
    with subprocess.Popen([sys.executable, "-c", lender, str(file)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != b"lent\n":
                pytest.skip("this file system lends no files")
            assert read_json(file) == {"a": 1}
        finally:
            process.kill()


# a folder's small files


@pytest.mark.parametrize("what", ["the text encoder", "the transformer"])
@pytest.mark.parametrize("change", ["changed", "gone"])
def test_a_configuration_that_changes_after_it_was_read_is_noticed(
    change: str, what: str, small_pipeline: Path, tmp_path: Path, cpu: Hardware
) -> None:
    part = what.removeprefix("the ").replace(" ", "_")
    shutil.copytree(small_pipeline / part, tmp_path / part)
    checkpoint = open_checkpoint(tmp_path / part)
    config = tmp_path / part / "config.json"
    if part == "text_encoder":
        encoder = TextEncoder(checkpoint, dtype=torch.float32, hardware=cpu)
        encoder.encode([[5, 9]])
    if change == "gone":
        config.unlink()
    else:
        config.write_text(config.read_text(encoding="utf-8") + "\n", encoding="utf-8")

    def use() -> object:
        if part == "text_encoder":
            return encoder.encode([[5, 9]])
        return QwenImageTransformer(checkpoint, dtype=torch.float32, hardware=cpu)

    with pytest.raises(CheckpointError, match=r"config\.json (was changed after it was opened|can no longer be read)"):
        use()


# headers that lie


def write_header(file: Path, entries: list[tuple[str, int, int]], size: int) -> Path:
    """Entries of bytes: name, first and last byte; names may stand twice."""
    parts = [
        f'"{name}": {{"dtype": "U8", "shape": [{end - begin}], "data_offsets": [{begin}, {end}]}}'
        for name, begin, end in entries
    ]
    raw = ("{" + ", ".join(parts) + "}").encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(size))
    return file


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([("a", 0, 8), ("b", 4, 12)], "at byte .* overlaps the tensor before it"),
        ([("a", 0, 8), ("b", 0, 8)], "at byte .* overlaps the tensor before it"),
        ([("a", 0, 4), ("b", 8, 12)], "leaves a gap after the tensor before it"),
        ([("a", 4, 12)], "leaves a gap after the header"),
        ([("a", 0, 6), ("a", 6, 12)], "names 'a' twice"),
    ],
)
def test_spans_that_overlap_or_leave_gaps_and_names_that_stand_twice_are_refused(
    entries: list[tuple[str, int, int]], words: str, tmp_path: Path
) -> None:
    with pytest.raises(DamagedFile, match=words):
        open_checkpoint(write_header(tmp_path / "m.safetensors", entries, 12))


def test_empty_tensors_and_any_order_are_no_damage(tmp_path: Path) -> None:
    entries = [("b", 4, 12), ("empty", 4, 4), ("a", 0, 4), ("end", 12, 12)]
    found = open_checkpoint(write_header(tmp_path / "m.safetensors", entries, 12))
    assert sorted(found.tensors) == ["a", "b", "empty", "end"]


def test_a_name_that_stands_twice_in_any_json_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"a": {"zero_cond_t": true, "zero_cond_t": false}}', encoding="utf-8")
    with pytest.raises(DamagedFile, match="names 'zero_cond_t' twice"):
        read_json(file)


def test_overlapping_tensors_of_a_gguf_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwenimage_lowvram.engine.files import gguf_header

    transformer = make_transformer()
    file = tmp_path / "m.gguf"
    weights = {name: parameter.detach() for name, parameter in transformer.named_parameters()}
    write_gguf_transformer(file, weights, dict(transformer.config), "Q8_0")
    assert isinstance(open_checkpoint(file), Checkpoint)
    whole = gguf_header._tensor

    def all_at_the_first_place(path: Path, name: str, kind: int, shape: Any, offset: int, size: int) -> Any:
        return whole(path, name, kind, shape, offset // 4096 * 4096, size)

    monkeypatch.setattr(gguf_header, "_tensor", all_at_the_first_place)
    with pytest.raises(DamagedFile, match=r"is damaged: .* overlaps"):
        open_checkpoint(file)


@pytest.mark.parametrize("lie", ["a tensor that is nowhere", "a tensor of another file"])
def test_an_index_that_names_what_is_not_there_is_refused(lie: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    weight_map = {"a": "a.safetensors", "b": "b.safetensors"}
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    assert set(open_checkpoint(tmp_path).tensors) == {"a", "b"}
    weight_map |= {"c": "b.safetensors"} if lie == "a tensor that is nowhere" else {"a": "b.safetensors"}
    weight_map |= {"x": "a.safetensors"} if lie == "a tensor of another file" else {}
    index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    with pytest.raises(DamagedFile, match=r"but it is not\. The files do not belong together"):
        open_checkpoint(tmp_path)
