"""The transformers that the nodes serve: for each network how its file is opened and what MODEL it becomes.

A network is a folder of engine/models/, its ComfyUI side beside `model.py`, and a line here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...engine.files.checkpoint import Checkpoint
from ...engine.models.component import Component
from ...engine.models.qwen_image.component import TRANSFORMER
from ...engine.models.qwen_image.network import QwenImageParts
from ...engine.models.qwen_image.transformer import QwenImageTransformer
from ...engine.models.recognition import components, identify
from ...engine.models.streamed_transformer import StreamedTransformer
from ...engine.models.table import COMPONENTS
from ...engine.models.transformer_parts import TransformerParts
from .model import make_model
from .patcher import LowVRAMPatcher


@dataclass(frozen=True)
class ServedNetwork:
    """parts: of a file, for plans; open: the transformer; both from a Checkpoint and what the loader was set to.
    make_model: a MODEL of an opened one, as `model.make_model`."""

    component: Component
    parts: Callable[..., TransformerParts]
    open: Callable[..., StreamedTransformer[Any, Any]]
    make_model: Callable[..., LowVRAMPatcher]


NETWORKS = (ServedNetwork(TRANSFORMER, QwenImageParts, QwenImageTransformer, make_model),)


def network_of(checkpoint: Checkpoint, networks: Sequence[ServedNetwork] = NETWORKS) -> ServedNetwork:
    """Whose transformer a file is, or holds; the first network's where it is none of theirs, so that `require` names
    what the file is."""
    table = dict.fromkeys((*(network.component for network in networks), *COMPONENTS))
    held = {identify(checkpoint.tensors, tuple(table)), *components(checkpoint.tensors, tuple(table))}
    return next((network for network in networks if network.component in held), networks[0])
