"""What decoding a block costs on the device, counted by operators on tensors without memory. Decodes nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from ..formats.chunks import LORA_CHUNK_WEIGHTS
from ..formats.format import StoredParam
from ..formats.scratch import Scratch
from .block_layout import StoredBlock
from .flat_layout import FlatItem

# of a weight that is patched: to fp32 and back, a product added to it; and kernels for as much as is patched at a time
PATCH_BYTES_PER_WEIGHT = 2 + 4 + 8 + 4 + 2
PATCH_LAUNCHES = 6


@dataclass(frozen=True)
class DecodeCost:
    """moved_bytes: read from and written to the device's memory; launches: of kernels."""

    moved_bytes: int = 0
    launches: int = 0

    def __add__(self, other: "DecodeCost") -> "DecodeCost":
        return DecodeCost(self.moved_bytes + other.moved_bytes, self.launches + other.launches)


class KernelCounter(TorchDispatchMode):
    """Counts what operators within it move: what they read and what they write, views of tensors left out."""

    def __init__(self) -> None:
        super().__init__()
        self.cost = DecodeCost()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # one that returns nothing has nothing to do without memory, and may not know how
        idle = not func._schema.returns and all(tensor.is_meta for tensor in _tensors((args, kwargs)))
        result = None if idle else func(*args, **kwargs)
        out = _tensors(kwargs.get("out"))
        read = [tensor for tensor in _tensors((args, kwargs)) if not any(tensor is place for place in out)]
        written = out or _tensors(result)
        allocates = func.overloadpacket.__name__.startswith(("empty", "new_empty"))
        if not allocates and not _is_view(func):
            moved = sum(tensor.nbytes for tensor in (*read, *written))
            if func.overloadpacket is torch.ops.aten.copy_:  # which does not read what it writes over
                moved -= written[0].nbytes
            self.cost += DecodeCost(moved, 1)
        return result


def decode_cost(block: StoredBlock) -> DecodeCost:
    """Of one visit of the block: its codecs, and its patches. Nothing where its bytes are what is computed with."""
    cost = DecodeCost()
    for group in block.groups:
        for writer, items, place, beside in group.members:
            if isinstance(writer, StoredParam):
                parts = tuple(_form(item) for item in (*items, *beside))
                codec: Any = writer.decoder
                cost += _codec_cost(codec, _form(place), parts)
            else:
                weights = prod(place.shape)
                chunks = -(-weights // LORA_CHUNK_WEIGHTS)
                cost += DecodeCost(weights * PATCH_BYTES_PER_WEIGHT, chunks * PATCH_LAUNCHES)
    return cost


Form = tuple[torch.dtype, tuple[int, ...]]


@lru_cache(1024)
def _codec_cost(codec: Any, place: Form, parts: tuple[Form, ...]) -> DecodeCost:
    def empty(form: Form) -> Tensor:
        return torch.empty(form[1], dtype=form[0], device="meta")

    # what is remembered is the operators' own: other modes, such as that of fake tensors, see other ones
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad(), KernelCounter() as counter:
        room = torch.empty(codec.scratch_bytes(place[1], on_host=False), dtype=torch.uint8, device="meta")
        codec.decode_into(empty(place), [empty(part) for part in parts], Scratch(room, on_host=False))
    return counter.cost


def _form(item: FlatItem) -> Form:
    return item.dtype, item.shape


def _tensors(tree: Any) -> Sequence[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _is_view(func: Any) -> bool:
    aliases = [value.alias_info for value in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)
