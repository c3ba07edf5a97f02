"""Which member of the family a transformer is: what a person says, else what the file says of itself. Reads headers.

Qwen-Image, Edit and Edit-2509 have the same tensors. Only 2511 and Layered differ in what they compute.
"""

import re
from enum import Enum

from ...errors import WrongModel
from ...files.checkpoint import Checkpoint
from ..titles import pipeline_index, titles_of

# in ComfyUI's files an empty tensor marks 2511, in diffusers' a setting of the configuration
MARK_2511 = "__index_timestep_zero__"
_LAYERED = "time_text_embed.addition_t_embedding.weight"
# what published names have beside the model's: types, programs, distillation
_OF_ANY_FILE = re.compile(
    r"(qwen|image|edit|(bf|fp|f|int|nf|i?q)\d+|e\dm\d(fn)?|[ksml]|x+[sl]|nl|ud|scaled|mixed|row|convrot|comfyui|gguf|"
    r"lightning|\d*steps?|\d)+"
)


class Variant(Enum):
    """A family member by its published name."""

    QWEN_IMAGE = "Qwen-Image"
    EDIT = "Qwen-Image-Edit"
    EDIT_2509 = "Qwen-Image-Edit-2509"
    EDIT_2511 = "Qwen-Image-Edit-2511"
    LAYERED = "Qwen-Image-Layered"

    @property
    def edits(self) -> bool:
        """Whether it was trained to change images that it is shown."""
        return self in (Variant.EDIT, Variant.EDIT_2509, Variant.EDIT_2511)

    @property
    def needs_images(self) -> bool:
        """Whether it makes none of text alone."""
        return self.edits or self.makes_layers

    @property
    def makes_layers(self) -> bool:
        """Whether it takes an image apart into layers, rather than making whole ones."""
        return self is Variant.LAYERED

    @property
    def labels_images(self) -> bool:
        """Whether images stand in its prompts as Picture 1, Picture 2, ..., as it was trained."""
        return self is not Variant.EDIT

    @property
    def when_shown_images(self) -> "Variant":
        """As which member it takes images in a prompt: one that was trained without them as Edit-2509 does."""
        return self if self.edits else Variant.EDIT_2509


def variant_of(checkpoint: Checkpoint, chosen: Variant | None = None) -> Variant:
    """`chosen`, or what marks, pipeline folder, metadata and name say; QWEN_IMAGE where nothing is said.

    Raises WrongModel for a Layered file chosen to be another member, or the other way round: its tensors tell it.
    Raises it where the name says 2511 and the mark is missing, as in many GGUF files: nothing else tells 2511
    from 2509, and its images come out wrong without. Raises it as well for a marked file that is chosen to be an
    older Edit. A marked file chosen as QWEN_IMAGE computes as 2511 does; without images the two are the same.
    """
    marked = is_marked_2511(checkpoint)
    layered = is_layered(checkpoint)
    if chosen is not None and layered != (chosen is Variant.LAYERED):
        is_it = "is" if layered else "is not"
        raise WrongModel(
            "By its tensors, {file} {is_it} {found}, but the variant {chosen} was chosen. Choose auto, or another "
            "file.",
            code="variant.layered_by_its_tensors",
            file=checkpoint.path,
            is_it=is_it,
            found=Variant.LAYERED.value,
            chosen=chosen.value,
        )
    if layered:
        return Variant.LAYERED
    if chosen is not None:
        if marked and chosen in (Variant.EDIT, Variant.EDIT_2509):
            raise WrongModel(
                "{file} is marked as {found}, but the variant {chosen} was chosen. Choose auto or {found}, or another "
                "file.",
                code="variant.marked_2511",
                file=checkpoint.path,
                found=Variant.EDIT_2511.value,
                chosen=chosen.value,
            )
        return chosen
    if marked:
        return Variant.EDIT_2511
    named = [variant for text in titles_of(checkpoint) if (variant := _named(text)) is not None]
    if Variant.EDIT_2511 in named:
        raise WrongModel(
            "{file} is {variant} by its name, but has lost that model's mark (the setting zero_cond_t, or the tensor "
            "{mark}), as many GGUF files have; the images come out wrong without it. Choose the variant {variant} if "
            "that is what it is, another variant if it is not, or a file with the mark.",
            code="variant.lost_mark",
            file=checkpoint.path,
            variant=Variant.EDIT_2511.value,
            mark=MARK_2511,
        )
    return _of_pipeline(checkpoint) or next(iter(named), Variant.QWEN_IMAGE)


def could_be(checkpoint: Checkpoint) -> tuple[Variant, ...]:
    """What a file may be as well as what `variant_of` takes it for, where nobody chooses: no mark and no pipeline tells
    it, and names say "edit" in words of their own, or contradict each other. Empty where there is no such doubt."""
    if is_marked_2511(checkpoint) or is_layered(checkpoint) or _of_pipeline(checkpoint) is not None:
        return ()
    named = {text: variant for text in titles_of(checkpoint) if (variant := _named(text)) is not None}
    said = set(named.values())
    if said == {Variant.EDIT} and not any(map(_is_published, named)):
        said |= {Variant.EDIT_2509, Variant.EDIT_2511}
    if not any(variant.edits for variant in said):
        return ()
    return tuple(variant for variant in Variant if variant in said - {variant_of(checkpoint)})


def is_marked_2511(checkpoint: Checkpoint) -> bool:
    """Whether reference images are computed at timestep zero."""
    return bool((checkpoint.config or {}).get("zero_cond_t")) or _has(checkpoint, MARK_2511)


def is_layered(checkpoint: Checkpoint) -> bool:
    return bool((checkpoint.config or {}).get("use_layer3d_rope")) or _has(checkpoint, _LAYERED)


def _has(checkpoint: Checkpoint, tensor: str) -> bool:
    return any(name.endswith(tensor) for name in checkpoint.tensors)


def _named(text: str) -> Variant | None:
    """What a name says, such as Qwen_Image_Edit_2511-Q4_K_M, QwenEdit_25-11, QIE-2511-merge or qwen-image-edit-plus."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text).lower()
    edit = re.search(r"(?<![a-z])((qwen)?(image)?edit|qie)(?![a-z])", words)
    if not edit and "qwen" not in words:
        return None
    for month, variant in (("11", Variant.EDIT_2511), ("09", Variant.EDIT_2509)):
        if re.search(rf"(?<!\d)25[-_. ]?{month}(?!\d)", words):
            return variant
    if not edit:
        return None
    return Variant.EDIT_2509 if re.match(r"[-_. ]*plus(?![a-z])", words[edit.end() :]) else Variant.EDIT


def _is_published(text: str) -> bool:
    """Whether a name is the model's own, and has but words that every published file may have beside it."""
    return all(_OF_ANY_FILE.fullmatch(word) for word in re.split(r"[-_. ]+", text.lower()) if word)


def _of_pipeline(checkpoint: Checkpoint) -> Variant | None:
    """What the model_index.json says that a transformer's folder belongs to."""
    pipeline = pipeline_index(checkpoint).get("_class_name")
    if not isinstance(pipeline, str) or not pipeline.startswith("QwenImage"):
        return None
    if pipeline.startswith("QwenImageEdit"):
        return Variant.EDIT_2509 if pipeline.startswith("QwenImageEditPlus") else Variant.EDIT
    return Variant.QWEN_IMAGE
