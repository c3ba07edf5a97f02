"""How the file of a text encoder's vision part is told by its tensors' names, whichever version it belongs to."""

from ..component import Component

VISION = Component(
    "the vision part (mmproj) of a text encoder",
    "text_encoders",
    hint=" It is found automatically beside the text encoder that it belongs to.",
    signs=(r"^v\.blk\.\d+\.",),
)
