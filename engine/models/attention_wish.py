"""Which kernel of attention a file asks for, in a note of ComfyUI's (since 0.37). Reads that note, no weight."""

from ..files.checkpoint import Checkpoint
from ..formats.notes import read_notes

_NOTE = "comfy_attention.config"  # of the model, or of one of its layers


def wished_kernel(checkpoint: Checkpoint) -> str:
    """By ComfyUI's name of it; empty where the file names none. Raises DamagedFile for a note that is no JSON."""
    notes = {name: entry for name, entry in checkpoint.tensors.items() if name.endswith(_NOTE)}
    if not notes:
        return ""
    first = min(notes, key=len)  # the model's own before a layer's
    settings = read_notes({first: notes[first]})[first]
    return next((value for value in settings.values() if isinstance(value, str)), "")
