"""A block as its file stores it (raw) and as it is computed with (slot), and how the one is made of the other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from math import prod
from typing import Protocol

import torch
from torch import Tensor, nn

from ..compute.stored_linear import LowRank, StoredLayer, part_name
from ..compute.stored_products import StoredProduct
from ..errors import WrongModel
from ..files.checkpoint import TensorEntry
from ..formats import FORMATS, Formats, HeldPart, PlainCodec, Scratch, StoredParam, is_native, is_plain
from .flat_layout import FlatItem, FlatLayout

FORMAT_OF_DTYPE = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class WeightPatch(Protocol):
    """What is added to the parameter `name` each time it is decoded; its `parts` are streamed with the block."""

    @property
    def name(self) -> str: ...

    def named(self, name: str) -> "WeightPatch":
        """The same for the parameter of that name: in its block, where it was of the whole model."""

    @property
    def parts(self) -> tuple[TensorEntry, ...]: ...

    @property
    def scratch_bytes(self) -> int:
        """Room that `apply` needs beside the weight."""

    @property
    def allocated_bytes(self) -> int:
        """What `apply` allocates by itself, at the most."""

    def low_rank(self) -> Sequence[tuple[LowRank, TensorEntry, TensorEntry]] | None:
        """What it adds to the layer's result instead, each with its stored up and down; None where it can only be added
        to the weight."""

    def apply(self, weight: Tensor, parts: Sequence[Tensor], scratch: Tensor) -> None:
        """Change `weight` in place. `scratch` has scratch_bytes (uint8); all lie on one device."""


# what writes (a parameter's codec, or a patch), stored parts, the place in the slot, and those of the slot that a codec
# reads, decoded before it, as further parts
Member = tuple[StoredParam | WeightPatch, tuple[FlatItem, ...], FlatItem, tuple[FlatItem, ...]]


@dataclass(frozen=True)
class DecodeGroup:
    """Neighbours in a block's raw bytes that are brought and written together: bytes `start` to `end`."""

    start: int
    end: int
    members: tuple[Member, ...]

    def decode(self, raw: Tensor, slot: Tensor, scratch: Tensor, *, base: int = 0) -> None:
        """Write into `slot`; `raw` lies beside it and holds the block's raw bytes from `base` on. `scratch`: uint8, of
        StoredBlock.scratch_bytes."""
        for writer, items, item, decoded in self.members:
            weight, parts = item.view(slot), [part.view(raw, base) for part in items]
            parts += [other.view(slot) for other in decoded]
            if isinstance(writer, StoredParam):
                writer.decoder.decode_into(weight, parts, Scratch(scratch))
            else:
                writer.apply(weight, parts, scratch)


@dataclass(frozen=True)
class StoredBlock:
    """A block's parameters as a file stores them, and the layouts of its raw bytes and of its slot.

    The parts of patches lie behind those of the parameters. `native`: the parameters' raw bytes are the slot's bytes,
    so that only patches have to be applied. computed: weights whose layers compute on them as they are stored, each of
    whose parts is a parameter of its own.
    """

    params: tuple[StoredParam, ...]
    patches: tuple[WeightPatch, ...]
    slot: FlatLayout
    native: bool
    formats: Formats = FORMATS
    computed: tuple[tuple[str, StoredLayer], ...] = ()

    @cached_property
    def form(self) -> tuple[object, ...]:
        """Blocks of the same form have modules with parameters alike."""
        return self.slot, self.computed

    @cached_property
    def raw(self) -> FlatLayout:
        return FlatLayout.of((str(i), *self.formats.raw_layout(part)) for i, part in enumerate(self.parts))

    @cached_property
    def parts(self) -> tuple[TensorEntry, ...]:
        """What `raw` is made of, in its order."""
        params = (part for param in self.params for part in param.parts)
        return (*params, *(part for patch in self.patches for part in patch.parts))

    @property
    def nbytes(self) -> int:
        """To be read from the files."""
        return sum(part.nbytes for part in self.parts)

    @cached_property
    def groups(self) -> tuple[DecodeGroup, ...]:
        """All that has to be decoded, in groups no larger than the largest member, so that small ones are not brought
        singly; patches after the parameters that they change."""
        items = iter(self.raw.items)
        places = {item.name: item for item in self.slot.items}
        writers: tuple[StoredParam | WeightPatch, ...] = (*self.params, *self.patches)
        singles = []
        for writer in writers:
            own = tuple(islice(items, len(writer.parts)))
            other = writer.read_beside if isinstance(writer, StoredParam) else None
            if not (self.native and isinstance(writer, StoredParam)):
                decoded = () if other is None else (places[other],)
                singles.append(DecodeGroup(own[0].offset, own[-1].end, ((writer, own, places[writer.name], decoded),)))
        largest = max((group.end - group.start for group in singles), default=0)
        groups: list[DecodeGroup] = []
        for group in singles:
            last = groups[-1] if groups else None
            if last is not None and group.end - last.start <= largest:
                groups[-1] = DecodeGroup(last.start, group.end, last.members + group.members)
            else:
                groups.append(group)
        return tuple(replace(group, members=_as_runs(group.members)) for group in groups)

    @property
    def staging_bytes(self) -> int:
        """Room for any of the groups."""
        return max((group.end - group.start for group in self.groups), default=0)

    def scratch_bytes(self, *, on_host: bool) -> int:
        """Room that codecs and patches need beside the slot, one after another; `on_host` as Scratch has it."""
        codecs = [] if self.native else [param.scratch_bytes(on_host=on_host) for param in self.params]
        return max([0, *codecs, *(patch.scratch_bytes for patch in self.patches)])

    @property
    def allocated_bytes(self) -> int:
        """What patches allocate by themselves, at the most."""
        return max((patch.allocated_bytes for patch in self.patches), default=0)


def _as_runs(members: Sequence[Member]) -> tuple[Member, ...]:
    """Casts of neighbours, of one dtype and with nothing in between, as one cast of a longer vector: one launch."""
    runs: list[Member] = []
    for member in members:
        if runs and _continues(runs[-1], member):
            writer, (raw,), place, _ = runs.pop()
            _, (more,), next_place, _ = member
            runs.append((writer, (_joined(raw, more),), _joined(place, next_place), ()))
        else:
            runs.append(member)
    return tuple(runs)


def _continues(last: Member, member: Member) -> bool:
    casts = all(isinstance(writer, StoredParam) and is_plain(writer) for writer, *_ in (last, member))
    if not casts:
        return False
    (_, (raw,), place, _), (_, (next_raw,), next_place, _) = last, member
    alike = (raw.dtype, place.dtype) == (next_raw.dtype, next_place.dtype)
    return alike and (raw.end, place.end) == (next_raw.offset, next_place.offset)


def _joined(first: FlatItem, second: FlatItem) -> FlatItem:
    return replace(first, shape=(prod(first.shape) + prod(second.shape),), nbytes=first.nbytes + second.nbytes)


# how the layer of a parameter computes on it as it is stored; None: on the decoded weight
ProductOf = Callable[[StoredParam], StoredProduct | None]


def decoded(param: StoredParam) -> None:
    """Every layer computes on its decoded weight."""


def store_block(
    names: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, TensorEntry],
    dtype: torch.dtype,
    where: str,
    patches: Sequence[WeightPatch] = (),
    formats: Formats = FORMATS,
    product_of: ProductOf = decoded,
) -> StoredBlock:
    """The parameters `names` (name -> shape) of one block; `where` names the file and block in errors. `formats`: those
    that it may be stored in.

    Matrices come first, vectors behind them, which are most often stored alike and are written at once. A layer that
    `product_of` has something for computes on its weight as stored, unless a patch of it can only be added to the
    decoded weight.

    Raises WrongModel for a parameter that is missing, has another shape, or an unsupported format.
    """
    names = dict(sorted(names.items(), key=lambda item: len(item[1]) < 2))
    params: list[StoredParam] = []
    specs: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    computed: dict[str, StoredLayer] = {}
    native = True
    of_weight = {patch.name: patch for patch in patches}
    for name, shape in names.items():
        param = _stored_param(name, shape, tensors, where, formats)
        if param.beside_stored is not None and param.read_beside in computed:
            param = replace(param, decoder=param.beside_stored, parts=param.parts[:1], read_beside=None)
        product, patch = product_of(param), of_weight.get(name)
        added = patch.low_rank() if product is not None and patch is not None else ()
        if product is None or added is None:
            params.append(param)
            specs.append((name, dtype, shape))
            native &= is_native(param, FORMAT_OF_DTYPE[dtype])
            continue
        of_weight.pop(name, None)
        held = _held(param, formats)
        computed[name] = StoredLayer(product, len(held), tuple(one for one, _, _ in added))
        held += [_as_it_is(part, param.codec, formats) for _, up, down in added for part in (up, down)]
        native &= not param.held
        for index, one in enumerate(held):
            params.append(StoredParam(part_name(name, index), one.layout[1], one.codec, (one.part,)))
            specs.append((part_name(name, index), *one.layout))
    left = tuple(patch for patch in patches if patch.name in of_weight)
    return StoredBlock(tuple(params), left, FlatLayout.of(specs), native, formats, tuple(computed.items()))


def _held(param: StoredParam, formats: Formats) -> list[HeldPart]:
    """What a layer that computes on the stored weight has of it in a slot."""
    if param.held:
        return list(param.held)
    scales = [] if param.operand_scale is None else [param.operand_scale]
    return [_as_it_is(part, param.codec, formats) for part in (*param.parts, *scales)]


def _as_it_is(part: TensorEntry, codec: str, formats: Formats) -> HeldPart:
    layout = formats.raw_layout(part)
    return HeldPart(part, PlainCodec(codec, layout[0]), layout)


def _stored_param(
    name: str, shape: tuple[int, ...], tensors: Mapping[str, TensorEntry], where: str, formats: Formats
) -> StoredParam:
    if name not in tensors:
        raise WrongModel(
            "{where} lacks {name}. The file is incomplete: download it again.",
            code="model.block_lacks_tensor",
            where=where,
            name=name,
        )
    param = formats.stored_param(name, tensors, where)
    if param.shape != shape:
        raise WrongModel(
            "{where}: {name} has shape {shape}, but {needed_shape} is needed.",
            code="model.block_wrong_shape",
            where=where,
            name=name,
            shape=list(param.shape),
            needed_shape=list(shape),
        )
    return param


def bind(module: nn.Module, views: Mapping[str, Tensor]) -> None:
    """Make `views` the parameters of `module` (names as in its state dict), without copying."""
    for name, view in views.items():
        owner, _, attribute = name.rpartition(".")
        module.get_submodule(owner)._parameters[attribute] = nn.Parameter(view, requires_grad=False)
