"""The table of families, and whose transformer a file is. A family is a folder of this room, and a line here."""

from collections.abc import Sequence

from ..files.checkpoint import Checkpoint
from .family import Family
from .qwen_image.family import QWEN_IMAGE
from .qwen_image_21.family import QWEN_IMAGE_21
from .recognition import components, identify
from .table import COMPONENTS

FAMILIES = (QWEN_IMAGE, QWEN_IMAGE_21)


def family_of(checkpoint: Checkpoint, families: Sequence[Family] = FAMILIES) -> Family:
    """Whose transformer a file is, or holds; the first one's where it is none of theirs, so that `require` names what
    the file is."""
    table = tuple(dict.fromkeys((*(family.transformer for family in families), *COMPONENTS)))
    held = {identify(checkpoint.tensors, table), *components(checkpoint.tensors, table)}
    return next((family for family in families if family.transformer in held), families[0])
