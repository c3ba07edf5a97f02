"""The files of one model, found and checked: what a pipeline is made from. Reads headers only."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from ..errors import InvalidRequest
from ..files.checkpoint import Checkpoint, open_checkpoint
from ..models.component import Component
from ..models.families import family_of
from ..models.family import Family
from ..models.recognition import only, require


@dataclass(frozen=True)
class OpenedFiles:
    """`tokenizer`: its folder. The others fit together, and make whole images. `variant`: the member of the family."""

    family: Family
    transformer: Checkpoint
    text_encoder: Checkpoint
    vae: Checkpoint
    tokenizer: Path
    variant: Enum

    @classmethod
    def of(cls, transformer: Path, text_encoder: Path, vae: Path, tokenizer: Path) -> "OpenedFiles":
        """Each a file in any format that the loader reads, or a folder of a pipeline. Raises MissingFile, DamagedFile
        or WrongModel, and InvalidRequest for a model that takes images apart."""
        family = family_of(open_checkpoint(transformer))
        model = open_component(transformer, family.transformer)
        variant = family.member_of(model, None)
        if variant.makes_layers:
            raise InvalidRequest(
                "{file} is {variant}, which takes images apart, but here whole ones are made. Use Qwen-Image, "
                "Qwen-Image-2512 or an Edit model, or the nodes in ComfyUI.",
                code="run.makes_layers",
                file=transformer,
                variant=variant.value,
            )
        encoder, image_vae = open_component(text_encoder, family.text_encoder), open_component(vae, family.vae)
        family.require_encoder(model, encoder)
        family.require_vae(image_vae, variant)
        return cls(family, model, encoder, image_vae, tokenizer, variant)

    @classmethod
    def of_folder(cls, folder: Path) -> "OpenedFiles":
        """A pipeline folder of diffusers'. Raises as `of`."""
        transformer = folder / "transformer"
        tokenizer = family_of(open_checkpoint(transformer)).tokenizer_folder
        return cls.of(transformer, *(folder / name for name in ("text_encoder", "vae", tokenizer)))


def open_component(path: Path, component: Component) -> Checkpoint:
    """Headers only. Raises where the file is missing, damaged, or not what that place needs."""
    checkpoint = open_checkpoint(path)
    require(checkpoint, component)
    return only(checkpoint, component)
