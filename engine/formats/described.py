"""A file's tensors with what the notes beside them tell of their formats. Reads notes, no weight."""

from ..files.checkpoint import Checkpoint, TensorEntry
from .comfy_quant import with_comfy_quants
from .nunchaku_layers import with_nunchaku_layers
from .quant_states import with_quant_states


def described_tensors(checkpoint: Checkpoint) -> dict[str, TensorEntry]:
    """The tensors with what notes beside them tell of their formats."""
    tensors = with_nunchaku_layers(with_quant_states(checkpoint.tensors))
    return with_comfy_quants(tensors, checkpoint.metadata, checkpoint.path)
