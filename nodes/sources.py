"""The files that a person's choices stand for, opened and checked: what loading and planning begin with."""

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from ..engine.errors import InvalidRequest
from ..engine.files.checkpoint import Checkpoint, open_checkpoint
from ..engine.models.component import Component
from ..engine.models.qwen25_vl.component import TEXT_ENCODER
from ..engine.models.qwen25_vl.tensors import require_fitting_encoder
from ..engine.models.qwen25_vl.tokenizer_files import tokenizer_stamps
from ..engine.models.qwen_image.prompts import PromptTokenizer
from ..engine.models.qwen_image.variants import Variant, could_be, variant_of
from ..engine.models.qwen_image_vae.component import VAE
from ..engine.models.qwen_image_vae.tensor_names import RGB, RGBA, require_image_vae
from ..engine.models.recognition import components
from ..engine.runs.opened_files import open_component
from ..engine.texts import shown
from . import model_choices
from .adapters.networks import network_of
from .display_names import AUTO, LOADER
from .inputs import at_input

# what a person may say; Layered is known by its tensors alone. None: what the file says
VARIANTS: dict[str, Variant | None] = {AUTO: None} | {
    variant.value: variant for variant in Variant if not variant.makes_layers
}
# found without importing the module, whose place is no promise of ComfyUI's
_TEXT_ENCODERS = find_spec("comfy.text_encoders")
COMFYUI_TOKENIZER = Path(
    next(iter((_TEXT_ENCODERS and _TEXT_ENCODERS.submodule_search_locations) or ("",))), "qwen25_tokenizer"
)


@dataclass(frozen=True)
class Sources:
    """The three checkpoints and the tokenizer's folder that a person's choices stand for."""

    transformer: Path
    text_encoder: Path
    vae: Path
    tokenizer: Path

    @classmethod
    def of(cls, transformer: str, text_encoder: str, vae: str) -> "Sources":
        with at_input("transformer"):
            transformer_path = transformer_source(transformer)
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
            text_path = component("text_encoders", text_encoder, "text_encoder", TEXT_ENCODER)
        with at_input("vae"):
            vae_path = component("vae", vae, "vae", VAE)
        tokenizer = folder / "tokenizer" if folder and text_encoder == model_choices.FROM_FOLDER else COMFYUI_TOKENIZER
        return cls(transformer_path, text_path, vae_path, tokenizer)

    def open(self, variant: str) -> tuple[Checkpoint, Checkpoint, Checkpoint]:
        """Headers only. Raises where a file is missing, damaged, not what its place needs, no fitting pair, or another
        variant than the chosen one; the message begins with the input's name."""
        with at_input("transformer"):
            transformer = open_transformer(self.transformer)
        with at_input("text_encoder"):
            text_encoder = open_component(self.text_encoder, TEXT_ENCODER)
            require_fitting_encoder(transformer, text_encoder)
        with at_input("vae"):
            vae = open_component(self.vae, VAE)
        with at_input("variant"):
            layered = variant_of(transformer, chosen_variant(variant)).makes_layers
        with at_input("vae"):
            require_image_vae(vae, channels=RGBA if layered else RGB)
        return transformer, text_encoder, vae


def transformer_source(transformer: str) -> Path:
    """Raises MissingFile unless it is a file or pipeline folder of ComfyUI's."""
    if model_choices.is_folder(transformer):
        return model_choices.pipeline_folder(transformer) / "transformer"
    return model_choices.model_file("diffusion_models", transformer)


def open_transformer(path: Path) -> Checkpoint:
    """As `open_component`, of any network that the nodes serve."""
    return open_component(path, network_of(open_checkpoint(path)).component)


def require_transformer(transformer: str) -> None:
    """Raises where the file or folder chosen for the transformer is not there, damaged, or none."""
    open_transformer(transformer_source(transformer))


def chosen_variant(variant: str) -> Variant | None:
    """None where the file is to say. Raises InvalidRequest for a name that there is not."""
    if not isinstance(variant, str) or variant not in VARIANTS:
        raise InvalidRequest(
            "There is no variant {variant}. Use one of: {variants}.",
            code="choice.no_variant",
            variant=shown(variant),
            variants=list(VARIANTS),
        )
    return VARIANTS[variant]


def doubt_about(transformer: Checkpoint, member: Variant) -> str:
    """What a person has to decide where nothing tells which Edit model a file is; empty where something does."""
    others = [variant.value for variant in could_be(transformer)]
    if not others:
        return ""
    return (
        f"Nothing in {shown(transformer.path.name)} tells for sure which member of the family it is: it is taken for "
        f"{member.value}. If it is {' or '.join(others)}, set variant to that in '{LOADER}' (advanced inputs)."
    )


def prompt_tokenizer(folder: Path) -> PromptTokenizer:
    """Kept while its files stay as they are: reading them takes most of a second. Raises where there is none."""
    return _tokenizer(folder, tuple(tokenizer_identity(folder)))


def tokenizer_identity(folder: Path) -> list[str]:
    """Its files, their sizes and times. Raises where the folder holds no tokenizer."""
    with at_input("text_encoder"):
        stamps = tokenizer_stamps(folder)
    return [f"{file.name} {size} {mtime_ns}" for file, (size, mtime_ns) in stamps.items()]


@lru_cache(maxsize=2)
def _tokenizer(folder: Path, stamps: tuple[str, ...]) -> PromptTokenizer:
    with at_input("text_encoder"):
        return PromptTokenizer(folder)
