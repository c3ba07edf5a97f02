"""What ComfyUI asks of our nodes on the loop that serves every page: neither a slow disk nor odd folders hold it up,
and nothing is read twice."""

import asyncio
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from qwenimage_lowvram.engine.errors import DamagedFile
from qwenimage_lowvram.engine.files import checkpoint as checkpoints
from qwenimage_lowvram.engine.files.header import Header, HeaderCache
from qwenimage_lowvram.engine.files.safetensors_header import read_safetensors_header
from safetensors.torch import save_file
from small_checkpoint import SplitFiles, write_split_files
from torch import zeros

LONG_AGO = 10**18  # ns


@pytest.fixture
def split(full_pipeline: Path, models: Any, tmp_path: Path) -> SplitFiles:
    """Files of the small model in ComfyUI's folders, which nobody has touched for long, and a LoRA."""
    written = write_split_files(full_pipeline, tmp_path, dtype="bf16")
    (tmp_path / "loras").mkdir()
    save_file({"a.lora_up.weight": zeros(1, 1)}, tmp_path / "loras" / "a.safetensors")
    for folder in ("diffusion_models", "text_encoders", "vae", "loras"):
        models(folder, str(tmp_path / folder))
        for file in (tmp_path / folder).iterdir():
            os.utime(file, ns=(LONG_AGO, LONG_AGO))
    return written


@pytest.fixture
def read_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path, BinaryIO], Header]], None]:
    """`read_by(read)`: headers of safetensors are read by it, and none is kept from before."""

    def use(read: Callable[[Path, BinaryIO], Header]) -> None:
        monkeypatch.setattr(checkpoints, "_HEADERS", HeaderCache())
        monkeypatch.setattr(checkpoints, "read_safetensors_header", read)

    return use


def prompt_of(node: str, split: SplitFiles) -> dict[str, Any]:
    """ComfyUI's form of a graph that is this node with its defaults."""
    import nodes

    made = nodes.NODE_CLASS_MAPPINGS[node]
    given = {name: value for spec in made.INPUT_TYPES().values() for name, value in spec.items()}
    files = {"transformer": split.transformer, "text_encoder": split.text_encoder, "vae": split.vae}
    files |= {"lora_name": "a.safetensors"}
    inputs = {name: (value[1] or {}).get("default") for name, value in given.items() if len(value) > 1}
    inputs |= {name: file for name, file in files.items() if name in given}
    return {"1": {"class_type": node, "inputs": {name: value for name, value in inputs.items() if value is not None}}}


def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwenimage_lowvram.nodes.loader import QwenLowVRAMLoader
    from qwenimage_lowvram.nodes.lora import QwenLowVRAMLoadLora
    from qwenimage_lowvram.nodes.memory_plan import QwenLowVRAMMemoryPlan

    import nodes

    for made in (QwenLowVRAMLoader, QwenLowVRAMLoadLora, QwenLowVRAMMemoryPlan):
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, made.__name__, made)


@pytest.mark.parametrize("node", ["QwenLowVRAMLoader", "QwenLowVRAMLoadLora", "QwenLowVRAMMemoryPlan"])
def test_the_server_goes_on_while_a_slow_disk_is_read_for_validation(
    node: str, split: SplitFiles, read_by: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk answers only once the loop has served somebody else."""
    import execution

    registered(monkeypatch)
    served, read = threading.Event(), []

    def slowly(file: Path, stream: BinaryIO) -> Header:
        assert served.wait(20), "the loop waits for the disk"
        read.append(file)
        return read_safetensors_header(file, stream)

    read_by(slowly)

    async def serve() -> list[Any]:
        async def somebody_else() -> None:
            await asyncio.sleep(0.05)
            served.set()

        answers = await asyncio.gather(
            execution.validate_inputs("prompt", prompt_of(node, split), "1", {}), somebody_else()
        )
        return list(answers[0])

    _, errors, _ = asyncio.run(serve())
    assert len(read) == 1
    assert [error["extra_info"]["input_name"] for error in errors] == ["model"] * (node == "QwenLowVRAMLoadLora")


def test_each_header_is_read_once_for_a_queue_and_for_the_next(split: SplitFiles, read_by: Any) -> None:
    from qwenimage_lowvram.nodes.loader import QwenLowVRAMLoader as Loader

    read: list[str] = []

    def counted(file: Path, stream: BinaryIO) -> Header:
        read.append(file.name)
        return read_safetensors_header(file, stream)

    read_by(counted)
    files = (split.transformer, split.text_encoder, split.vae)
    for _ in range(2):
        assert asyncio.run(Loader.VALIDATE_INPUTS(split.transformer)) is True
        Loader.IS_CHANGED(*files, weight_format="auto")
        Loader().load(*files, "fp32", "auto", 0.0, "fp32")
    assert sorted(read) == sorted(files)


def test_a_loader_that_runs_again_makes_no_new_tokenizer_until_a_file_of_it_changes(
    full_pipeline: Path, split: SplitFiles, models: Any, tmp_path: Path
) -> None:
    from qwenimage_lowvram.nodes.loader import QwenLowVRAMLoader as Loader

    def tokenizer(*files: str) -> Any:
        return Loader().load(*files, "fp32", "auto", 0.0, "fp32")[1].tokenizer

    own = (split.transformer, split.text_encoder, split.vae)
    assert tokenizer(*own) is tokenizer(*own)
    shutil.copytree(full_pipeline, tmp_path / "diffusers" / "full")
    models("diffusers", str(tmp_path / "diffusers"))
    folder = ("full (folder)", "from the folder", "from the folder")
    before, changed = tokenizer(*folder), Loader.IS_CHANGED(*folder)
    assert tokenizer(*folder) is before
    file = tmp_path / "diffusers" / "full" / "tokenizer" / "tokenizer.json"
    os.utime(file, ns=(LONG_AGO, LONG_AGO))
    assert Loader.IS_CHANGED(*folder) != changed
    assert tokenizer(*folder) is not before
    file.write_bytes(b"")
    with pytest.raises(DamagedFile, match=r"^text_encoder: .*tokenizer\.json has 0 bytes"):
        tokenizer(*folder)


def test_a_file_that_is_listed_and_gone_is_named(split: SplitFiles, tmp_path: Path) -> None:
    from qwenimage_lowvram.nodes.loader import QwenLowVRAMLoader
    from qwenimage_lowvram.nodes.lora import QwenLowVRAMLoadLora

    for node, folder, name in (
        (QwenLowVRAMLoader, "diffusion_models", split.transformer),
        (QwenLowVRAMLoadLora, "loras", "a.safetensors"),
    ):
        node.INPUT_TYPES()
        times = (tmp_path / folder).stat()
        (tmp_path / folder / name).unlink()
        os.utime(tmp_path / folder, ns=(times.st_atime_ns, times.st_mtime_ns))  # ComfyUI's list stays as it is
        assert f"There is no {name!r}" in asyncio.run(node.VALIDATE_INPUTS(name))


# folders


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that are listed by us, one after another; nothing is kept from before."""
    from qwenimage_lowvram.nodes import folders, model_choices

    listed, names = folders._listed, []

    def counted(folder: str) -> Any:
        names.append(folder)
        return listed(folder)

    monkeypatch.setattr(folders, "_listed", counted)
    for search in (model_choices._GGUF, model_choices._PIPELINES):
        monkeypatch.setattr(search, "_kept", {})
    return names


def tree(models: Any, tmp_path: Path) -> Path:
    """Two pipelines and three GGUF files, deep, in folders that nobody has touched for long."""
    root = tmp_path / "tree"
    for folder in ("first", "deep/er/second", "plain", ".git"):
        (root / folder).mkdir(parents=True)
    for folder in ("first", "deep/er/second", ".git"):
        (root / folder / "model_index.json").write_text("{}")
    for name in ("top.gguf", "plain/low.GGUF", "deep/er/second/in.gguf", ".git/no.gguf"):
        (root / name).write_bytes(b"GGUF")
    for folder in ("diffusers", "diffusion_models"):
        models(folder, str(root))
    settle(root)
    return root


def settle(root: Path) -> None:
    for folder, _, _ in os.walk(root):
        os.utime(folder, ns=(LONG_AGO, LONG_AGO))


PIPELINES = ["deep/er/second (folder)", "first (folder)"]
GGUF = [os.path.join("deep", "er", "second", "in.gguf"), os.path.join("plain", "low.GGUF"), "top.gguf"]


def offered() -> list[str]:
    from qwenimage_lowvram.nodes.loader import QwenLowVRAMLoader

    names: list[str] = QwenLowVRAMLoader.INPUT_TYPES()["required"]["transformer"][0]
    return names


def test_folders_are_walked_again_only_when_one_has_changed(models: Any, tmp_path: Path, walked: list[str]) -> None:
    root = tree(models, tmp_path)
    assert [name for name in offered() if "gguf" in name.lower()] == GGUF
    assert [name for name in offered() if name.endswith("(folder)")] == PIPELINES
    walked.clear()
    for _ in range(3):
        offered()
    assert walked == []
    (root / "deep" / "third").mkdir()
    (root / "deep" / "third" / "model_index.json").write_text("{}")
    assert "deep/third (folder)" in offered()
    assert walked
    settle(root)
    (root / "plain" / "low.GGUF").unlink()
    assert [name for name in offered() if "gguf" in name.lower()] == [GGUF[0], GGUF[2]]


def test_folders_are_not_even_looked_at_while_comfyui_lists_all_nodes(
    models: Any, tmp_path: Path, walked: list[str]
) -> None:
    import folder_paths

    root = tree(models, tmp_path)
    with folder_paths.cache_helper:
        first = offered()
        walked.clear()
        (root / "new.gguf").write_bytes(b"GGUF")
        assert offered() == first
    assert walked == []
    assert "new.gguf" in offered()


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs links")
def test_links_to_a_folder_above_are_not_followed(models: Any, tmp_path: Path, walked: list[str]) -> None:
    """Two of them in one folder would be walked 2^40 times."""
    from qwenimage_lowvram.nodes import model_choices

    root = tree(models, tmp_path)
    for name in ("self", "again"):
        (root / name).symlink_to(root)
        (root / "plain" / name).symlink_to(root / "plain")
    (root / "elsewhere").symlink_to(root / "plain")
    settle(root)
    assert list(model_choices._PIPELINES.below(str(root))) == [os.path.join("deep", "er", "second"), "first"]
    assert list(model_choices._GGUF.below(str(root))) == sorted([*GGUF, os.path.join("elsewhere", "low.GGUF")])
    assert len(walked) < 30
