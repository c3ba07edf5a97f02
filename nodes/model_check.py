"""Which model files a graph needs, and which of them are here, wrong or missing: by names and headers, before a run.

What is known of a file (size, links) comes from the pack's list; nothing is fetched here.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import folder_paths

from ..engine.errors import MissingFile, QwenLowVRAMError
from ..engine.files.checkpoint import open_checkpoint
from ..engine.files.hub_download import endpoint_of
from ..engine.files.known_files import KnownFile, KnownFolder, known
from ..engine.models.component import Component
from ..engine.models.families import FAMILIES
from ..engine.models.family import Family
from ..engine.models.qwen_image.family import QWEN_IMAGE
from ..engine.models.qwen_image_21.family import QWEN_IMAGE_21
from ..engine.models.recognition import components, identify
from ..engine.runs.opened_files import open_component
from . import model_choices
from .adapters.networks import served_of
from .graph_runs import FILE_LOADERS, LOADER, Prompt
from .lora import lora_file
from .sources import transformer_source

HERE, WRONG, MISSING = "here", "wrong", "missing"
# nodes that load a LoRA, by class: the input that names the file
_LORAS = {"QwenLowVRAMLoadLora": "lora_name", "LoraLoaderModelOnly": "lora_name", "LoraLoader": "lora_name"}
_NOT_THERE = ("choice.missing", "choice.no_pipeline_folder", "choice.broken_link")

# what a family needs of each folder, and what the page calls the families
_PARTS: dict[str, Callable[[Family], Component]] = {
    "diffusion_models": lambda family: family.transformer,
    "text_encoders": lambda family: family.text_encoder,
    "vae": lambda family: family.vae,
}
_KEYS = {"qwen_image": QWEN_IMAGE, "qwen_image_21": QWEN_IMAGE_21}

Look = Callable[[], object]  # raises where the file is not what is needed


@dataclass(frozen=True)
class FileCheck:
    """A file that nodes of a graph need. folder: below ComfyUI's models. text, values: what is wrong, and by its code.

    size: as a person reads it, empty where it is not known. links: {"source": "hub" or "mirror", "url"}, where the file
    is known; only such a file can be fetched. non_commercial: its licence allows no other use.
    """

    nodes: tuple[str, ...]
    folder: str
    name: str
    state: str
    text: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    size: str = ""
    links: tuple[dict[str, str], ...] = ()
    non_commercial: bool = False


def checks_of(prompt: Prompt) -> list[FileCheck]:
    """Each file once, in the order of the nodes. Reads headers; not for the server's event loop."""
    found: dict[tuple[str, str], FileCheck] = {}
    for node, given in prompt.items():
        inputs = given.get("inputs")
        if not isinstance(inputs, dict):
            continue
        for folder, name, look in _needs(str(given.get("class_type")), inputs):
            check = _checked((node,), folder, name, look)
            earlier = found.get((folder, name))
            if earlier is not None:  # one node may take it, and another not
                nodes = (*earlier.nodes, node)
                check = replace(check if earlier.state == HERE else earlier, nodes=nodes)
            found[folder, name] = check
    return list(found.values())


def family_of_file(folder: str, name: str) -> str:
    """Whose a transformer, text encoder or VAE is by its header: "qwen_image", "qwen_image_21", or "other"; empty where
    it is not here or cannot be read."""
    if folder not in _PARTS:
        return ""
    try:
        tensors = open_checkpoint(model_choices.model_file(folder, name)).tensors
    except (QwenLowVRAMError, OSError):
        return ""
    held = {identify(tensors), *components(tensors)}
    return next((key for key, family in _KEYS.items() if _PARTS[folder](family) in held), "other")


def state_of(wanted: KnownFile | KnownFolder) -> str:
    """Whether it is here and whole, by its header; which model it is, nobody asks here."""
    if isinstance(wanted, KnownFolder):
        choice = wanted.name + model_choices.FOLDER_SUFFIX
        inside = ["text_encoder", "vae"]
        return _checked((), wanted.folder, wanted.name, lambda: _look_at_model(choice, None, inside)).state
    look = partial(_open_known, wanted)
    return _checked((), wanted.folder, wanted.name, look).state


def download_folder(wanted: KnownFile | KnownFolder) -> Path:
    """ComfyUI's first folder for such files, but not the older one for transformers, models/unet: nobody looks there
    for what is called a file of models/diffusion_models."""
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(wanted.folder)]
    older = Path(folder_paths.models_dir) / "unet"
    return next((folder for folder in folders if folder != older), folders[0])


def _open_known(wanted: KnownFile) -> None:
    if wanted.folder == "loras":
        lora_file(wanted.name)
    else:
        open_checkpoint(model_choices.model_file(wanted.folder, wanted.name))


def _needs(kind: str, inputs: dict[str, Any]) -> Iterator[tuple[str, str, Look]]:
    """Folder, name and check of each file that a node names; linked widgets are not known."""
    if kind == LOADER:
        yield from _of_loader(*(_name(inputs.get(name)) for name in ("transformer", "text_encoder", "vae")))
    elif kind in _LORAS and (lora := _name(inputs.get(_LORAS[kind]))):
        yield "loras", lora, lambda: lora_file(lora)
    elif kind in FILE_LOADERS:
        of, folder = FILE_LOADERS[kind]
        if (name := _name(inputs.get(of))) and known(folder, name):
            yield folder, name, lambda: open_checkpoint(model_choices.model_file(folder, name))


def _name(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _of_loader(transformer: str, text_encoder: str, vae: str) -> Iterator[tuple[str, str, Look]]:
    family = _family_of(transformer)
    parts = {
        "text_encoder": (text_encoder, "text_encoders", _open_text_encoder),
        "vae": (vae, "vae", _open_vae),
    }
    if transformer:
        inside = [part for part, (choice, _, _) in parts.items() if choice == model_choices.FROM_FOLDER]
        folder, name = _place("diffusion_models", transformer)
        yield folder, name, lambda: _look_at_model(transformer, family, inside)
    for choice, kind, look in parts.values():
        if choice and choice != model_choices.FROM_FOLDER:
            yield *_place(kind, choice), _look(kind, choice, family, look)


def _look(kind: str, choice: str, family: Family | None, look: Callable[[Path, Family], object]) -> Look:
    families = [family] if family else FAMILIES
    return lambda: _require_one(partial(look, model_choices.model_file(kind, choice), each) for each in families)


def _open_text_encoder(path: Path, family: Family) -> None:
    open_component(path, family.text_encoder)


def _open_vae(path: Path, family: Family) -> None:
    family.require_any_vae(open_component(path, family.vae))


def _place(kind: str, choice: str) -> tuple[str, str]:
    if model_choices.is_folder(choice):
        return "diffusers", choice.removesuffix(model_choices.FOLDER_SUFFIX)
    if choice.endswith(model_choices.CHECKPOINT_SUFFIX):
        return "checkpoints", choice.removesuffix(model_choices.CHECKPOINT_SUFFIX)
    return kind, choice


def _family_of(transformer: str) -> Family | None:
    """None where the transformer is not there, or cannot be read."""
    try:
        return served_of(open_checkpoint(transformer_source(transformer))).family
    except QwenLowVRAMError:
        return None


def _look_at_model(transformer: str, family: Family | None, inside: list[str]) -> None:
    """The transformer, and what the loader takes of its folder or its file."""
    path = transformer_source(transformer)
    family = family or served_of(open_checkpoint(path)).family  # raises what it raised before
    open_component(path, family.transformer)
    for part in inside:
        where = path.parent / part if model_choices.is_folder(transformer) else path
        (_open_text_encoder if part == "text_encoder" else _open_vae)(where, family)


def _require_one(looks: Iterable[Callable[[], object]]) -> None:
    """Raises what the first one raises, where all do."""
    first: QwenLowVRAMError | None = None
    for look in looks:
        try:
            look()
            return
        except QwenLowVRAMError as error:
            first = first or error
    if first is not None:
        raise first


def _checked(nodes: tuple[str, ...], folder: str, name: str, look: Look) -> FileCheck:
    about = _known(folder, name)
    try:
        look()
    except QwenLowVRAMError as error:
        missing = isinstance(error, MissingFile) and error.code in _NOT_THERE
        state = MISSING if missing else WRONG
        return FileCheck(nodes, folder, name, state, str(error), error.as_dict(), **about)
    except OSError as error:
        return FileCheck(nodes, folder, name, WRONG, error.strerror or type(error).__name__, **about)
    return FileCheck(nodes, folder, name, HERE, **about)


def _known(folder: str, name: str) -> dict[str, Any]:
    """What the list has of a FileCheck."""
    given = known(folder, name)
    if given is None:
        return {}
    hub = endpoint_of("hub")
    at_hub = given.url_at(hub) if isinstance(given, KnownFile) else f"{hub}/{given.repository}"
    links = ({"source": "hub", "url": at_hub}, {"source": "mirror", "url": given.mirror_url})
    return {"size": given.size, "links": links, "non_commercial": given.is_non_commercial}
