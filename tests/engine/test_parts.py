"""A model in part files is read whole by any of them; where parts are missing, they are named."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import write_gguf_text_encoder, write_gguf_transformer
from qwenimage_lowvram.engine.errors import DamagedFile, MissingFile
from qwenimage_lowvram.engine.files.checkpoint import Checkpoint, open_checkpoint
from qwenimage_lowvram.engine.files.part_files import Part, parts_of, stem_of, without_later_parts
from qwenimage_lowvram.engine.models.qwen25_vl.tensors import sort_text_encoder
from qwenimage_lowvram.engine.models.qwen_image.tensors import sort_transformer
from qwenimage_lowvram.engine.models.qwen_image.variants import Variant
from qwenimage_lowvram.engine.models.qwen_vl.vision_files import find_mmproj

Tiny = Callable[..., tuple[Any, Path]]
SHARD_BYTES = 300_000  # the tiny transformer in half a dozen files


@pytest.fixture
def shards(tiny: Tiny, tmp_path: Path) -> Path:
    """A folder of nothing but diffusers' own shards: no index, no configuration."""
    model, _ = tiny()
    model.save_pretrained(tmp_path / "Qwen-Image-Edit-2509", max_shard_size=SHARD_BYTES)
    for file in (tmp_path / "Qwen-Image-Edit-2509").glob("*.json"):
        file.rename(tmp_path / file.name)
    return tmp_path / "Qwen-Image-Edit-2509"


def listed(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-of-*"))


def contents(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {
        name: entry.file.read_bytes()[entry.offset : entry.offset + entry.nbytes]
        for name, entry in checkpoint.tensors.items()
    }


def test_shards_of_diffusers_are_one_model_by_any_part_or_their_folder(shards: Path, tiny: Tiny) -> None:
    files = listed(shards)
    assert len(files) > 4
    opened = [open_checkpoint(path) for path in (files[0], files[2], files[-1], shards)]
    assert len({checkpoint.identity for checkpoint in opened}) == 1
    assert [checkpoint.path for checkpoint in opened] == [files[0]] * 3 + [shards]
    for checkpoint in opened:
        assert contents(checkpoint) == contents(open_checkpoint(tiny()[1]))
        assert len(sort_transformer(checkpoint).blocks) == 5


def test_shards_are_called_by_their_folder_where_their_name_is_every_models(shards: Path) -> None:
    assert sort_transformer(open_checkpoint(listed(shards)[1])).variant is Variant.EDIT_2509
    deeper = shards / "transformer"
    deeper.mkdir()
    for file in listed(shards):
        file.rename(deeper / file.name)
    assert sort_transformer(open_checkpoint(listed(deeper)[1])).variant is Variant.EDIT_2509


def test_a_configuration_counts_where_the_parts_have_their_folder_to_themselves(shards: Path, tmp_path: Path) -> None:
    first = listed(shards)[0]
    assert open_checkpoint(first).config is None
    shutil.copy(tmp_path / "config.json", shards)
    assert (open_checkpoint(first).config or {})["_class_name"] == "QwenImageTransformer2DModel"
    shutil.copy(first, shards / "another.safetensors")
    assert open_checkpoint(first).config is None


def test_an_index_beside_the_parts_is_checked(shards: Path, tmp_path: Path) -> None:
    first = listed(shards)[0]
    index = "diffusion_pytorch_model.safetensors.index.json"
    text = (tmp_path / index).read_text()
    (shards / index).write_text(text)
    open_checkpoint(first)
    (shards / index).write_text(text.replace("img_in.weight", "img_in.other"))
    with pytest.raises(DamagedFile, match=r"its index says that 'img_in\.other' is in"):
        open_checkpoint(first)


def test_parts_that_are_missing_are_named(shards: Path) -> None:
    files = listed(shards)
    files[1].unlink()
    for path in (files[0], files[2], shards):
        with pytest.raises(MissingFile) as missing:
            open_checkpoint(path)
        number = 1 if path == shards else files.index(path) + 1
        assert f"is part {number} of {len(files)}; missing: " in str(missing.value)
        assert files[1].name in str(missing.value)
        assert "ownload" not in str(missing.value)
    for file in files[2:]:
        file.unlink()
    with pytest.raises(MissingFile, match=rf"is part 1 of {len(files)}; missing: {files[1].name}, "):
        open_checkpoint(files[0])


def test_parts_of_two_models_are_no_folder_of_one(shards: Path) -> None:
    shutil.copy(listed(shards)[0], shards / "other-00001-of-00002.safetensors")
    with pytest.raises(MissingFile, match=r"holds \d+ \.safetensors files and no index"):
        open_checkpoint(shards)


SPLITS = {"the gguf package's": {}, "gguf-split's, without tensors in the first": {"small_first_shard": True}}


@pytest.fixture(params=SPLITS.values(), ids=SPLITS.keys())
def split_gguf(request: pytest.FixtureRequest, tiny: Tiny, tmp_path: Path) -> Path:
    model, _ = tiny()
    options = {"split_max_tensors": 40, **request.param}
    write_gguf_transformer(tmp_path / "m.gguf", model.state_dict(), dict(model.config), "Q8_0", **options)
    write_gguf_transformer(tmp_path / "whole.gguf", model.state_dict(), dict(model.config), "Q8_0")
    return tmp_path


def test_gguf_parts_are_one_model_by_any_part(split_gguf: Path) -> None:
    files = listed(split_gguf)
    assert len(files) > 3
    whole = open_checkpoint(split_gguf / "whole.gguf")
    for path in (files[0], files[-1]):
        checkpoint = open_checkpoint(path)
        assert contents(checkpoint) == contents(whole)
        assert checkpoint.config == whole.config
        assert checkpoint.identity == open_checkpoint(files[1]).identity
        assert sort_transformer(checkpoint).config == sort_transformer(whole).config


def test_gguf_parts_that_are_missing_renamed_or_exchanged_are_named(split_gguf: Path) -> None:
    files = listed(split_gguf)
    count = len(files)
    files[-1].rename(split_gguf / "last.gguf")
    with pytest.raises(MissingFile, match=rf"is part 2 of {count}; missing: {files[-1].name}\. Put"):
        open_checkpoint(files[1])
    with pytest.raises(MissingFile, match=rf"last\.gguf is part {count} of {count} by its header, but its name does"):
        open_checkpoint(split_gguf / "last.gguf")
    files[1].rename(files[-1])
    (split_gguf / "last.gguf").rename(files[1])
    with pytest.raises(
        DamagedFile, match=rf"part {count} of {count} by its header\. Give the parts their original names"
    ):
        open_checkpoint(files[0])


@pytest.mark.parametrize(("parts", "words"), [(2, r"parts hold \d+ tensors"), (3, r"is part 2 of 2 by its header")])
def test_gguf_parts_of_two_models_are_refused(parts: int, words: str, tiny: Tiny, tmp_path: Path) -> None:
    model, _ = tiny()
    weights = model.state_dict()
    fewer = dict(list(weights.items())[:-1])
    most = len(fewer) // 2 + (parts == 2)  # so that the larger model has that many parts, and the other two
    for folder, tensors in (("one", weights), ("other", fewer)):
        (tmp_path / folder).mkdir()
        write_gguf_transformer(
            tmp_path / folder / "m.gguf", tensors, dict(model.config), "Q8_0", split_max_tensors=most
        )
    one, other = listed(tmp_path / "one"), listed(tmp_path / "other")
    shutil.copy(other[-1], one[len(other) - 1])
    with pytest.raises(DamagedFile, match=words):
        open_checkpoint(one[0])


def test_a_text_encoder_in_gguf_parts_finds_its_vision_part(full_pipeline: Path, tmp_path: Path) -> None:
    import json

    from safetensors.torch import load_file

    source = full_pipeline / "text_encoder"
    weights = load_file(next(source.glob("*.safetensors")))
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    name = "Qwen2.5-VL-7B-Q8_0"
    write_gguf_text_encoder(tmp_path / f"{name}.gguf", weights, config, "Q8_0", split_max_tensors=15)
    files = listed(tmp_path)
    assert len(files) > 1
    assert sort_text_encoder(open_checkpoint(files[-1])).layers
    for mmproj in ("Qwen2.5-VL-7B-mmproj-F16.gguf", "Qwen2.5-VL-3B-mmproj-F16.gguf"):
        (tmp_path / mmproj).touch()
    assert find_mmproj(files[-1], "").name == "Qwen2.5-VL-7B-mmproj-F16.gguf"


NAMES = {
    "m-00002-of-00009.safetensors": ("m", 2, 9),
    "a.fp16-00001-of-00002.safetensors": ("a.fp16", 1, 2),
    "m_2_of_3.gguf": ("m", 2, 3),
    "{0}-1-of-2.gguf": ("{0}", 1, 2),
    "m.safetensors": None,
    "best-of-9.safetensors": None,
    "m-3-of-2.safetensors": None,
    "m-0-of-0.safetensors": None,
    "m-1-of-999999.safetensors": None,
}


@pytest.mark.parametrize(("name", "expected"), NAMES.items())
def test_a_name_says_which_part_a_file_is(name: str, expected: tuple[str, int, int] | None, tmp_path: Path) -> None:
    part = Part.of(Path(name))
    assert (part and (part.stem, part.number, part.count)) == expected
    if part is None:
        assert parts_of(tmp_path / name) == [tmp_path / name]
        assert stem_of(Path(name)) == Path(name).stem
        return
    assert part.name(part.number) == name
    for number in range(1, part.count + 1):
        (tmp_path / part.name(number)).touch()
    assert [file.name for file in parts_of(tmp_path / name)] == [part.name(i + 1) for i in range(part.count)]


def test_parts_that_are_counted_from_zero_are_found(tmp_path: Path) -> None:
    files = [tmp_path / f"m-0000{i}-of-00003.safetensors" for i in range(3)]
    for file in files:
        file.touch()
    assert parts_of(files[1]) == files
    files[2].unlink()
    with pytest.raises(MissingFile, match=r"is part 2 of 3; missing: m-00002-of-00003"):
        parts_of(files[1])


def test_of_each_set_of_parts_one_file_is_offered() -> None:
    names = [
        "m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "sub/m-00002-of-00003.gguf", "sub/m-00003-of-00003.gguf",
        "m-00002-of-00003.gguf", "m.gguf", "m-00002-of-00002.safetensors",
    ]  # fmt: skip
    assert without_later_parts(names) == sorted(
        ["m-00001-of-00002.gguf", "m-00002-of-00003.gguf", "m-00002-of-00002.safetensors", "m.gguf",
         "sub/m-00002-of-00003.gguf"]
    )  # fmt: skip


def test_one_part_of_one_is_a_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "m-00001-of-00001.safetensors"
    save_file({"a.weight": torch.zeros(2, 2)}, file)
    assert set(open_checkpoint(file).tensors) == {"a.weight"}
