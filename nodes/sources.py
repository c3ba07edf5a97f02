"""The files that a person's choices stand for, opened and checked: what loading and planning begin with."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..engine.errors import InvalidRequest
from ..engine.files.checkpoint import Checkpoint, open_checkpoint
from ..engine.models.component import Component
from ..engine.models.family import Family
from ..engine.models.qwen_vl.tokenizer_files import tokenizer_stamps
from ..engine.models.recognition import components
from ..engine.runs.opened_files import open_component
from ..engine.texts import shown
from ..engine.told import Told
from . import model_choices
from .adapters.networks import SERVED, served_of
from .display_names import AUTO, LOADER
from .inputs import at_input

# what a person may say; models that make layers are known by their tensors alone. None: what the file says
VARIANTS: dict[str, Enum | None] = {AUTO: None} | {
    member.value: member for served in SERVED for member in served.family.members if not member.makes_layers
}
# found without importing the module, whose place is no promise of ComfyUI's
_TEXT_ENCODERS = find_spec("comfy.text_encoders")
COMFYUI_TOKENIZER = Path(
    next(iter((_TEXT_ENCODERS and _TEXT_ENCODERS.submodule_search_locations) or ("",))), "qwen25_tokenizer"
)


@dataclass(frozen=True)
class Sources:
    """The three checkpoints and the tokenizer's folder that a person's choices stand for. `family`: of the
    transformer."""

    family: Family
    transformer: Path
    text_encoder: Path
    vae: Path
    tokenizer: Path

    @classmethod
    def of(cls, transformer: str, text_encoder: str, vae: str) -> "Sources":
        with at_input("transformer"):
            transformer_path = transformer_source(transformer)
            family = served_of(open_transformer(transformer_path)).family
        folder = transformer_path.parent if model_choices.is_folder(transformer) else None

        def component(kind: str, choice: str, subfolder: str, wanted: Component) -> Path:
            if choice != model_choices.FROM_FOLDER:
                return model_choices.model_file(kind, choice)
            if folder is not None:
                return folder / subfolder
            if wanted in components(open_checkpoint(transformer_path).tensors):
                return transformer_path
            raise InvalidRequest(
                "{transformer} is a single file and has no {part} in it or beside it.\n\nWhat to do: choose a file "
                "from models/{kind}.",
                code="choice.not_in_file",
                transformer=transformer,
                part=subfolder,
                kind=kind,
            )

        with at_input("text_encoder"):
            text_path = component("text_encoders", text_encoder, "text_encoder", family.text_encoder)
        with at_input("vae"):
            vae_path = component("vae", vae, "vae", family.vae)
        of_folder = folder and text_encoder == model_choices.FROM_FOLDER
        tokenizer = folder / family.tokenizer_folder if folder and of_folder else COMFYUI_TOKENIZER
        return cls(family, transformer_path, text_path, vae_path, tokenizer)

    def open(self, variant: str) -> tuple[Checkpoint, Checkpoint, Checkpoint]:
        """Headers only. Raises where a file is missing, damaged, not what its place needs, no fitting pair, or another
        variant than the chosen one; the message begins with the input's name."""
        with at_input("transformer"):
            transformer = open_component(self.transformer, self.family.transformer)
        with at_input("text_encoder"):
            text_encoder = open_component(self.text_encoder, self.family.text_encoder)
            self.family.require_encoder(transformer, text_encoder)
        with at_input("vae"):
            vae = open_component(self.vae, self.family.vae)
        with at_input("variant"):
            member = self.member(transformer, variant)
        with at_input("vae"):
            self.family.require_vae(vae, member)
        return transformer, text_encoder, vae

    def member(self, transformer: Checkpoint, variant: str) -> Any:
        """Which member of the family a transformer is, by a person's choice or by itself. Raises InvalidRequest and
        WrongModel."""
        chosen = chosen_variant(variant)
        if chosen is not None and chosen not in self.family.members:
            raise InvalidRequest(
                "The variant {variant} was chosen, but {file} is {found}.\n\nWhat to do: choose auto, or another file.",
                code="choice.variant_of_another_family",
                variant=chosen.value,
                file=self.transformer.name,
                found=self.family.transformer.value,
            )
        return self.family.member_of(transformer, chosen)

    def doubt_about(self, transformer: Checkpoint, member: Enum) -> Told | None:
        """What a person has to decide where nothing tells which model of the family a file is; None where something
        does."""
        others = [other.value for other in self.family.could_be(transformer)]
        if not others:
            return None
        return Told(
            "It is not certain which Qwen-Image model {file} is: it is used as {member}. If it is {others}, set "
            "variant to that in '{loader}' (advanced inputs).",
            code="told.doubt_about_variant",
            file=shown(transformer.path.name),
            member=member.value,
            others=" or ".join(others),
            loader=LOADER,
        )

    def prompt_tokenizer(self) -> Any:
        """Kept while its files stay as they are: reading them takes most of a second. Raises where there is none."""
        return _tokenizer(self.family.tokenizer, self.tokenizer, tuple(tokenizer_identity(self.tokenizer)))


def transformer_source(transformer: str) -> Path:
    """Raises MissingFile unless it is a file or pipeline folder of ComfyUI's."""
    if model_choices.is_folder(transformer):
        return model_choices.pipeline_folder(transformer) / "transformer"
    return model_choices.model_file("diffusion_models", transformer)


def open_transformer(path: Path) -> Checkpoint:
    """As `open_component`, of any family that the nodes serve."""
    return open_component(path, served_of(open_checkpoint(path)).family.transformer)


def require_transformer(transformer: str) -> None:
    """Raises where the file or folder chosen for the transformer is not there, damaged, or none."""
    open_transformer(transformer_source(transformer))


def chosen_variant(variant: str) -> Enum | None:
    """None where the file is to say. Raises InvalidRequest for a name that there is not."""
    if not isinstance(variant, str) or variant not in VARIANTS:
        raise InvalidRequest(
            "There is no variant {variant}. Use one of: {variants}.",
            code="choice.no_variant",
            variant=shown(variant),
            variants=list(VARIANTS),
        )
    return VARIANTS[variant]


def tokenizer_identity(folder: Path) -> list[str]:
    """Its files, their sizes and times. Raises where the folder holds no tokenizer."""
    with at_input("text_encoder"):
        stamps = tokenizer_stamps(folder)
    return [f"{file.name} {size} {mtime_ns}" for file, (size, mtime_ns) in stamps.items()]


@lru_cache(maxsize=2)
def _tokenizer(make: Callable[[Path], Any], folder: Path, stamps: tuple[str, ...]) -> Any:
    with at_input("text_encoder"):
        return make(folder)
