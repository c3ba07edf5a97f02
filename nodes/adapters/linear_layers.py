"""On what a model's linear layers compute: what a person chose in the loader, on ComfyUI's devices."""

from collections.abc import Sequence
from typing import Any

import torch

from ...engine.compute.linear_choice import DECODED, Computing, LinearChoice, linear_of
from ...engine.files.checkpoint import Checkpoint
from ...engine.hardware import Hardware
from ...engine.models.streamed_transformer import StreamedTransformer
from ...engine.told import Told
from .progress import warn


def linear_for(
    computing: Computing, file: Checkpoint, hardware: Sequence[Hardware], dtype: torch.dtype, *, as_stored: bool
) -> LinearChoice:
    """For weights of `file`; as_stored: whether they are those of the person's own file."""
    if computing is Computing.AS_COMFYUI and not as_stored:
        return DECODED
    return linear_of(computing, file, hardware, dtype)


def linear_of_loader(
    computing: Computing, file: Checkpoint, hardware: Sequence[Hardware], dtype: torch.dtype, *, as_stored: bool
) -> tuple[LinearChoice, str]:
    """The same, and what a person is told: why layers compute exactly though something else was chosen, or though
    ComfyUI itself does not."""
    linear = linear_for(computing, file, hardware, dtype, as_stored=as_stored)
    return linear, _tell(linear.why_not, some=bool(linear.backends)) if linear.why_not else ""


def nothing_as_stored(linear: LinearChoice, transformer: StreamedTransformer[Any, Any]) -> str:
    """What a person is told who chose FAST for a file whose weights are in formats that have no product."""
    if linear.computing is not Computing.FAST or linear.why_not or transformer.stored_product is not None:
        return ""
    return _tell(f"weights in {transformer.weight_format} cannot be multiplied as stored")


def _tell(why: str, *, some: bool = False) -> str:
    if some:
        told = Told(
            "Some linear layers compute exactly, on decoded weights: {why}.", code="told.some_layers_exact", why=why
        )
    else:
        told = Told("Linear layers compute exactly, on decoded weights: {why}.", code="told.layers_exact", why=why)
    warn(told)
    return str(told)
