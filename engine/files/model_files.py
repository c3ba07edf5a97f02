"""Which files hold one model: a file, its parts, or a folder's. Reads an index, and opens no file of weights."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

from ..errors import DamagedFile, MissingFile
from .json_texts import read_json_with_stamp, unreadable
from .part_files import parts_of, stem_of
from .regular_file import Stamp, require_regular
from .safetensors_header import MAX_TENSORS

GGUF_SUFFIX = ".gguf"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pt2", ".ckpt", ".pkl")
USUAL_NAMES = ("diffusion_pytorch_model", "model")  # as diffusers and transformers write files
_INDEX = ".safetensors.index.json"
MAX_FILES = 1000  # of a folder; the largest models have a hundred


@dataclass(frozen=True)
class ModelFiles:
    """`weights`: at least one; `config`: the config.json, where there is one; `weight_map`: which tensors an index says
    are in which file; `stamps`: of what was read."""

    weights: list[Path]
    config: Path | None = None
    weight_map: Mapping[str, str] = field(default_factory=dict)
    stamps: Mapping[Path, Stamp] = field(default_factory=dict)


def is_gguf(path: Path) -> bool:
    return path.suffix.lower() == GGUF_SUFFIX and not path.is_dir()


def model_files(path: Path) -> ModelFiles:
    """Raises MissingFile where one is not there, DamagedFile where an index is none or leads out of its folder."""
    if not _exists(path):
        raise MissingFile(
            "{file} does not exist. Check the name, or download the model again.", code="file.missing", file=path
        )
    if path.is_dir():
        return _of_folder(path)
    parts = parts_of(path)
    for part in parts:
        require_regular(part)
    return ModelFiles(parts) if len(parts) == 1 or is_gguf(path) else _beside_parts(parts)


def _of_folder(folder: Path) -> ModelFiles:
    config = folder / "config.json" if _exists(folder / "config.json") else None
    listed = _listed(folder)
    indexes = {file.name.removesuffix(_INDEX): file for file in listed if file.name.endswith(_INDEX)}
    singles = [file for file in listed if file.name.endswith(".safetensors")]
    firsts = {stem_of(file): file for file in reversed(singles)}
    usual = _usual({*indexes, *firsts})
    if indexes and (usual is None or usual in indexes):
        return _of_index(folder, indexes[usual or min(indexes)], config)
    chosen = usual or next(iter(firsts), "")
    if (len(firsts) > 1 and usual is None) or chosen not in firsts:
        raise _no_model(folder, listed, len(singles))
    return ModelFiles(parts_of(firsts[chosen]), config)


def _usual(stems: Collection[str]) -> str | None:
    """Of the names of models in a folder the one that diffusers or transformers reads where no variant is asked for:
    that without a variant, such as fp16. None where others than variants stand beside it."""
    for name in USUAL_NAMES:
        if name in stems and all(f"{stem}.".startswith(f"{name}.") for stem in stems):
            return name
    return None


def _of_index(folder: Path, index: Path, config: Path | None) -> ModelFiles:
    weight_map, stamp = _weight_map(index)
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not _exists(folder / name)]
    if missing or not names:
        raise MissingFile(
            "{folder}: {index} names {names_count} files, of which {missing_count} cannot be found ({missing:.200}). "
            "Put them there: the files are read together.",
            code="file.shards_missing",
            folder=folder,
            index=index.name,
            names_count=len(names),
            missing_count=len(missing),
            missing=", ".join(missing[:3]),
        )
    return ModelFiles([folder / name for name in names], config, weight_map, {index: stamp})


def _no_model(folder: Path, listed: Sequence[Path], count: int) -> MissingFile:
    pickled = [file.name for file in listed if file.suffix.lower() in PICKLE_SUFFIXES]
    if not count and pickled:
        return MissingFile(
            "{folder} holds its weights as {file!r:.99}, a PyTorch file, which could run code and is not read. Use "
            "the model's .safetensors files (in diffusers: save_pretrained, with safe_serialization).",
            code="file.pickle",
            folder=folder,
            file=pickled[0],
        )
    ggufs = [file.name for file in listed if is_gguf(file)]
    if not count and ggufs:
        return MissingFile(
            "{folder} holds its weights as {file!r:.99}; from a folder, only .safetensors files are read. Move the "
            "GGUF file to models/diffusion_models (a text encoder to models/text_encoders) and choose it there.",
            code="file.gguf_in_folder",
            folder=folder,
            file=ggufs[0],
        )
    return MissingFile(
        "{folder} holds {count} .safetensors files and no index. A model folder has one file, or shards with a "
        "*.safetensors.index.json.",
        code="file.no_index",
        folder=folder,
        count=count,
    )


def _beside_parts(parts: list[Path]) -> ModelFiles:
    """The configuration beside part files that have their folder to themselves, and what an index of theirs says."""
    folder = parts[0].parent
    index, config = folder / f"{stem_of(parts[0])}.safetensors.index.json", folder / "config.json"
    weight_map: dict[str, str] = {}
    stamps: dict[Path, Stamp] = {}
    if _exists(index):
        weight_map, stamps[index] = _weight_map(index)
    alone = {file.name for file in _listed(folder) if file.suffix == parts[0].suffix} == {part.name for part in parts}
    return ModelFiles(parts, config if alone and _exists(config) else None, weight_map, stamps)


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())  # glob would take a folder without permission for an empty one
    except OSError as error:
        raise unreadable(folder, error) from error


def _weight_map(index: Path) -> tuple[dict[str, str], Stamp]:
    stated, stamp = read_json_with_stamp(index)
    weight_map = stated.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise DamagedFile(
            "{file} has no 'weight_map' from tensors to file names. Download it again.",
            code="file.no_weight_map",
            file=index,
        )
    names = sorted(set(weight_map.values()))
    if len(names) > MAX_FILES or len(weight_map) > MAX_TENSORS:
        raise DamagedFile(
            "{file} names {tensor_count} tensors in {file_count} files; no model has more than {most_tensors} in "
            "{most_files}. Download it again.",
            code="file.index_too_long",
            file=index,
            tensor_count=len(weight_map),
            file_count=len(names),
            most_tensors=MAX_TENSORS,
            most_files=MAX_FILES,
        )
    for name in names:
        # a path, in any system's way of writing one, would lead out of the folder
        if PureWindowsPath(name).name != name or not name.isprintable() or not name.endswith(".safetensors"):
            raise DamagedFile(
                "{file} names {name!r:.99}, which is not a .safetensors file in the same folder. Download it again.",
                code="file.index_leads_out",
                file=index,
                name=name,
            )
    return weight_map, stamp


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:  # a folder above it may not be entered; Path.exists() of Python 3.14 hides that
        raise unreadable(path, error) from error
    return True
