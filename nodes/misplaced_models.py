"""Models that a graph puts where they do not belong, told before anything of it runs. Reads headers alone."""

from typing import Any

from ..engine.errors import QwenLowVRAMError, WrongModel
from ..engine.files.checkpoint import Checkpoint, open_checkpoint
from ..engine.models.family import Family
from ..engine.models.recognition import components
from ..engine.told import Told
from .adapters.graph_checks import image_for_no_editor, no_image_to_edit
from .adapters.networks import SERVED, served_of
from .graph_runs import FILE_LOADERS, LOADER, GraphRun, LinkedPart
from .model_choices import plain_file
from .sources import transformer_source


def require_placed(run: GraphRun, family: Family, member: Any) -> None:
    """Raise InvalidRequest for an editing model that no image can reach, and WrongModel for a text encoder or a VAE of
    another family than the model's. What nothing tells is not refused."""
    if run.text_only and member.edits and member.needs_images:
        raise no_image_to_edit(member)
    for part in run.parts:
        if not _may_be(part, family):
            raise WrongModel(
                "'{node}' has the {part} of another model.\n\nWhat to do: connect the {part} of the loader that has "
                "loaded {member}, or of one that loads {example}.",
                code="graph.other_models_part",
                node=_title(part.kind),
                part=part.input.upper(),
                member=member.value,
                example=family.vae_example if part.input == "vae" else family.text_encoder.example,
                at=part.node,
            )


def doubt_of(run: GraphRun, member: Any) -> Told | None:
    """What is worth a warning: a model that is shown images and was trained for none."""
    return image_for_no_editor(member) if run.images and not member.needs_images and not member.edits else None


def _title(kind: str) -> str:
    """What nodes of that class are called on the page, ours and others."""
    import nodes  # ComfyUI's: it is there before any node of ours

    return str(nodes.NODE_DISPLAY_NAME_MAPPINGS.get(kind, kind))


def _may_be(part: LinkedPart, family: Family) -> bool:
    """False only where a file's header says that it is another family's."""
    try:
        if part.loader == LOADER:
            return served_of(open_checkpoint(transformer_source(part.file))).family is family
        file = open_checkpoint(plain_file(FILE_LOADERS[part.loader][1], part.file))
    except QwenLowVRAMError:
        return True  # whose loader says what is wrong with it
    return _is_of(family, part, file) or not any(_is_of(one.family, part, file) for one in SERVED)


def _is_of(family: Family, part: LinkedPart, file: Checkpoint) -> bool:
    if part.input == "clip":
        return family.text_encoder in components(file.tensors)
    try:
        family.require_any_vae(file)
        return True
    except QwenLowVRAMError:
        return False
