"""The model files that a person can choose, from ComfyUI's own folders; nothing outside them can be reached."""

import os
from pathlib import Path

import folder_paths

from ..engine.errors import MissingFile
from ..engine.files.checkpoint import GGUF_SUFFIX
from ..engine.files.model_files import PICKLE_SUFFIXES
from ..engine.files.part_files import without_later_parts
from ..engine.texts import shown
from .folders import FolderSearch

FOLDER_SUFFIX = " (folder)"
CHECKPOINT_SUFFIX = " (checkpoint)"
FROM_FOLDER = "from the folder"
MODEL_SUFFIXES = (".safetensors", ".sft")
GGUF_KINDS = ("diffusion_models", "text_encoders")


def transformer_choices() -> list[str]:
    """Files of models/diffusion_models (GGUF too), pipeline folders of models/diffusers, then models/checkpoints."""
    return [*_files("diffusion_models"), *(name + FOLDER_SUFFIX for name in _pipelines()), *_checkpoints()]


def component_choices(kind: str) -> list[str]:
    """Files of models/<kind>, the choice of the transformer's folder or file, files of models/checkpoints."""
    return [*_files(kind), FROM_FOLDER, *_checkpoints()]


def is_folder(choice: str) -> bool:
    return isinstance(choice, str) and choice.endswith(FOLDER_SUFFIX)  # a graph may send anything


def pipeline_folder(choice: str) -> Path:
    """Raises MissingFile unless `choice` is a pipeline folder in models/diffusers."""
    folders = _pipelines()
    name = choice.removesuffix(FOLDER_SUFFIX)
    if name not in folders:
        found = ", ".join(folders)[:1000] or "none"
        raise MissingFile(
            "There is no pipeline folder {name} in models/diffusers (found: {found}).\n\nWhat to do: put the folder "
            "that holds model_index.json there, and press R.",
            code="choice.no_pipeline_folder",
            name=shown(name),
            found=found,
        )
    return folders[name]


def model_file(kind: str, choice: str) -> Path:
    """Raises MissingFile unless `choice` is a file of models/<kind>, or one of models/checkpoints, marked as such."""
    name = choice
    if isinstance(choice, str) and choice.endswith(CHECKPOINT_SUFFIX):
        kind, name = "checkpoints", choice.removesuffix(CHECKPOINT_SUFFIX)
    path = folder_paths.get_full_path(kind, name) if name in _all_files(kind) else None
    if path is None:
        raise _not_there(kind, name, choice)
    return Path(path)


def plain_file(kind: str, name: str) -> Path:
    """Raises MissingFile unless `name` is a file of models/<kind>, whatever it ends with."""
    path = folder_paths.get_full_path(kind, name) if name in folder_paths.get_filename_list(kind) else None
    if path is None:
        raise _missing(kind, name)
    return Path(path)


def _not_there(kind: str, name: str, choice: str) -> MissingFile:
    """Why a name that is not offered is none: files that are not read are told from those that are not there."""
    if (
        isinstance(name, str)
        and name.lower().endswith(PICKLE_SUFFIXES)
        and name in folder_paths.get_filename_list(kind)
    ):
        return MissingFile(
            "{name} in models/{kind} is a PyTorch file, which could run code when it is opened, so it is not "
            "read.\n\nWhat to do: use the model's .safetensors file.",
            code="choice.pickle",
            name=shown(name),
            kind=kind,
        )
    if isinstance(name, str) and name.lower().endswith(GGUF_SUFFIX) and name in _gguf_files(kind):
        return MissingFile(
            "{name} is in models/{kind}, and GGUF files are not read from there.\n\nWhat to do: put a transformer "
            "into models/diffusion_models, a text encoder into models/text_encoders; for a VAE, use the .safetensors "
            "file.",
            code="choice.gguf_elsewhere",
            name=shown(name),
            kind=kind,
        )
    if name in _all_files(kind) and any(
        os.path.islink(Path(root, name)) for root in folder_paths.get_folder_paths(kind)
    ):
        return MissingFile(
            "{choice} in models/{kind} is a link whose target no longer exists.\n\nWhat to do: put the file itself "
            "there, or create the link again.",
            code="choice.broken_link",
            choice=shown(choice),
            kind=kind,
        )
    return _missing(kind, choice)


def _missing(kind: str, choice: str) -> MissingFile:
    return MissingFile(
        "There is no {choice} in models/{kind}.\n\nWhat to do: put it there and press R, or choose another.",
        code="choice.missing",
        choice=shown(choice),
        kind=kind,
    )


def _files(kind: str) -> list[str]:
    """What is offered: of a model in part files the first."""
    return without_later_parts(_all_files(kind))


def _all_files(kind: str) -> list[str]:
    names = [name for name in folder_paths.get_filename_list(kind) if name.lower().endswith(MODEL_SUFFIXES)]
    return sorted({*names, *_gguf_files(kind)}) if kind in GGUF_KINDS else names


def _checkpoints() -> list[str]:
    """All-in-one files, and what else lies with them: marked, because other folders may hold the same names."""
    return [name + CHECKPOINT_SUFFIX for name in _files("checkpoints")]


def _gguf_files(kind: str) -> list[str]:
    """GGUF files in ComfyUI's folders of that kind, which its own list leaves out."""
    return [name for root in folder_paths.get_folder_paths(kind) for name in _GGUF.below(root)]


def _pipelines() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for root in folder_paths.get_folder_paths("diffusers"):
        for name in _PIPELINES.below(root):
            found.setdefault(name.replace(os.sep, "/"), Path(os.path.join(root, name)))
    return dict(sorted(found.items()))


def _wanted_gguf(folder: str, names: list[str]) -> tuple[list[str], bool]:
    return [os.path.normpath(os.path.join(folder, name)) for name in names if name.lower().endswith(GGUF_SUFFIX)], True


def _wanted_pipelines(folder: str, names: list[str]) -> tuple[list[str], bool]:
    """A pipeline's folder holds no other."""
    is_one = "model_index.json" in names
    return [folder] if is_one else [], not is_one


# ComfyUI asks for the choices at every page load, and several times for every prompt
_GGUF, _PIPELINES = FolderSearch("gguf", _wanted_gguf), FolderSearch("pipelines", _wanted_pipelines)
