"""Of a folder's weights those are read that diffusers reads; where it has none that can be read, that is said."""

import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.errors import MissingFile
from qwenimage_lowvram.engine.files.checkpoint import Checkpoint, open_checkpoint

Tiny = Callable[..., tuple[Any, Path]]
SHARD = 300_000


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    """A transformer's folder as its repository has it: in fp32, and the variant fp16 beside it."""
    return saved(tiny, tmp_path / "transformer", None, None)


def saved(tiny: Tiny, folder: Path, shard: int | None, variant_shard: int | None) -> Path:
    model, _ = tiny()
    # what stands in a folder is removed where a model is saved into it again
    for name, dtype, size, variant in (("v", torch.float16, variant_shard, "fp16"), ("w", torch.float32, shard, None)):
        sharding = {"max_shard_size": size} if size else {}
        deepcopy(model).to(dtype).save_pretrained(folder / name, variant=variant, **sharding)
    for file in [*folder.glob("[vw]/*")]:
        shutil.move(file, folder / file.name)
    return folder


def dtypes(checkpoint: Checkpoint) -> set[str]:
    return {entry.dtype for entry in checkpoint.tensors.values()}


@pytest.mark.slow
@pytest.mark.parametrize("shard", [None, SHARD])
@pytest.mark.parametrize("variant_shard", [None, SHARD])
@pytest.mark.parametrize("older", [False, True], ids=["", "an older name of the index"])
def test_without_a_variant_chosen_the_weights_without_one_are_read(
    shard: int | None, variant_shard: int | None, older: bool, tiny: Tiny, tmp_path: Path
) -> None:
    from diffusers import QwenImageTransformer2DModel

    folder = saved(tiny, tmp_path / "transformer", shard, variant_shard)
    index = folder / "diffusion_pytorch_model.safetensors.index.fp16.json"
    if older and index.exists():
        index.rename(folder / "diffusion_pytorch_model.fp16.safetensors.index.json")
    checkpoint = open_checkpoint(folder)
    model = QwenImageTransformer2DModel.from_pretrained(folder)
    assert dtypes(checkpoint) == {"F32"}
    assert set(checkpoint.tensors) == set(model.state_dict())


@pytest.mark.slow
def test_a_variant_alone_is_read(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    assert dtypes(open_checkpoint(folder)) == {"F16"}


def test_a_file_that_is_no_variant_leaves_the_choice_open(folder: Path) -> None:
    shutil.copy(folder / "diffusion_pytorch_model.safetensors", folder / "another.safetensors")
    with pytest.raises(MissingFile, match=r"holds 3 \.safetensors files and no index"):
        open_checkpoint(folder)


def test_weights_in_pickles_are_named(tiny: Tiny, tmp_path: Path) -> None:
    tiny()[0].save_pretrained(tmp_path / "transformer", safe_serialization=False)
    with pytest.raises(MissingFile, match=r"holds its weights as 'diffusion_pytorch_model\.bin', .* is not read\. Use"):
        open_checkpoint(tmp_path / "transformer")


def test_a_gguf_file_in_a_folder_is_sent_where_such_are_read(tmp_path: Path) -> None:
    (tmp_path / "qwen-image-Q8_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(
        MissingFile, match=r"as 'qwen-image-Q8_0\.gguf'; .* Move the GGUF file to models/diffusion_models"
    ):
        open_checkpoint(tmp_path)
