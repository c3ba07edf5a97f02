"""A transformer whose blocks pass through the device: where its weights lie, how passes begin. Knows no network."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Generic

import torch
from torch import Tensor, nn

from ..compute.attention import Attention
from ..compute.attention_kernels import AttentionKernel
from ..compute.compilation import CompiledBlocks, CompileSettings
from ..compute.half_products import activations_dtype
from ..compute.linear_choice import Computing
from ..compute.stored_products import StoredProduct
from ..errors import Unsupported
from ..files.checkpoint import Checkpoint
from ..hardware import Hardware
from ..planning.footprint import TransformerFootprint
from ..planning.kept import NOTHING_KEPT, KeptTiers
from ..planning.memory_plan import BranchDevice, SecondaryDevice
from ..planning.spread import spread_order
from ..streaming import RING_PIECES, BlockStreamer, OnBlock, Pace, SideBySide, WeightPatch, bind
from .layer_rows import OtherNames
from .network import NothingBeforehand, StepTable
from .transformer_parts import TransformerParts
from .transformer_session import BranchT, Part, Seat, StateT, TransformerSession


class StreamedTransformer(ABC, Generic[BranchT, StateT]):
    """A network's weights in stores, and the passes over them.

    Guarantees: one pass visits each block once, whatever the number of branches; a branch's result is bit-equal to that
    of the branch alone, wherever the blocks live. Weights are in no `nn.Module` that others see: nothing but the
    methods here moves them. What a branch is, how it begins and how it ends is the network's (`begin`, `finish`).
    """

    def __init__(
        self, checkpoint: Checkpoint, parts: TransformerParts, *, dtype: torch.dtype, hardware: Hardware
    ) -> None:
        """Reads the weights outside the blocks, and no block. `dtype`: of weights and products; of fp16, activations
        are in fp32 (`compute.half_products`). Raises MissingFile or DamagedFile."""
        self.dtype = activations_dtype(dtype)  # that branches are given in
        self.products_dtype = dtype
        self.hardware = hardware
        self.file = checkpoint.largest_file
        self.modulation: StepTable = NothingBeforehand()
        self.store = parts.store
        self.secondaries = {str(store.hardware.device): store for store in parts.secondary_stores}
        self.compiled: CompiledBlocks | None = None  # what computes the blocks; None: they themselves
        self._loaded = False
        self._outside = parts.network.make_outside()
        parts.read_outside().put_into(self._outside, parts.network.make_outside)
        checkpoint.require_unchanged()  # what was read of it belongs together
        self._parts = parts
        self._patches: dict[str, WeightPatch] = {}

    @abstractmethod
    def begin(self, branches: Sequence[BranchT], on_block: OnBlock | None) -> list[StateT]:
        """What goes into the first block, of each branch. `on_block`: of a pass over what is computed beforehand, where
        a timestep was not announced."""

    @abstractmethod
    def finish(self, branch: BranchT, state: StateT) -> Tensor:
        """What the model answers, of what came out of the last block."""

    @abstractmethod
    def image_tokens(self, branch: BranchT, state: StateT) -> Tensor:
        """The tokens of the branch's image as they are now, (1, N, inner_dim); nothing else is kept with them."""

    @abstractmethod
    def answer_of(self, branch: BranchT, hidden: Tensor) -> Tensor:
        """What the model answers at the branch's timestep, of such tokens behind the last block, whatever made them."""

    def changes_modulation(self, weight: str) -> bool:
        """Whether what is computed beforehand is another one when the weight of this name is patched."""
        return False

    def run_hooked(self, states: Sequence[StateT], hook: Any, index: int, block: nn.Module) -> None:
        """Run one block on branches of the same sizes, through their hook. Raises Unsupported where a network has
        none."""
        raise Unsupported(
            "This model does not accept patches around its blocks.\n\nWhat to do: remove the node that sets them.",
            code="graph.takes_no_patches",
        )

    def leave_device(self) -> None:
        """Give back what passes keep on the device for those that follow."""
        self.modulation.leave_device()

    @property
    def footprint(self) -> TransformerFootprint:
        """What a plan is made from; patches and compiled code count."""
        return replace(self._parts.footprint, compiled=self.compiled.kind if self.compiled else "")

    @property
    def outside(self) -> nn.Module:
        """The model without its blocks; its weights are on the device after `return_outside`."""
        return self._outside

    @property
    def weights(self) -> dict[str, tuple[int, ...]]:
        """Every weight's shape by its name in the whole model: what can be patched."""
        return self._parts.weights

    @property
    def other_names(self) -> OtherNames:
        """Names of layers that the file holds joined or apart: what can be patched, too."""
        return self._parts.other_names

    @property
    def model(self) -> str:
        """What a person calls it."""
        return self._parts.model

    def patch(self, patches: Mapping[str, WeightPatch]) -> None:
        """Apply these to the weights of those names from the next run on, and no others.

        Blocks on the device that change are decoded again from their source, so that no patch leaves a trace; what is
        computed beforehand is computed again where it depends on what changed.
        """
        names = patches.keys() | self._patches.keys()
        changed = {name for name in names if patches.get(name) != self._patches.get(name)}
        if not changed:
            return
        outside = None
        if any(not name.startswith(self._parts.network.block_prefix) for name in changed):
            with torch.inference_mode(False):
                outside = self._parts.read_outside(patches)  # first: it may fail
        self._parts.patch(patches)
        self.store.kept.forget()
        if outside is not None:
            with torch.inference_mode(False):
                outside.put_into(self._outside, self._parts.network.make_outside)
            self._loaded = False
        if any(map(self.changes_modulation, changed)):
            self.modulation.forget()
        self._patches = dict(patches)

    @property
    def attention(self) -> AttentionKernel:
        """What the blocks attend by."""
        return self._parts.attention

    @property
    def native_attention(self) -> AttentionKernel:
        """What they attend by where nothing else was asked for."""
        return self._parts.native_attention

    @property
    def attending(self) -> Attention | None:
        """What was asked for last."""
        return self._parts.attending

    def attention_on(self, hardware: Hardware) -> Attention:
        """The same on one of the devices."""
        return self._parts.attention_on(hardware)

    @property
    def stored_product(self) -> StoredProduct | None:
        """By which most linear layers compute on weights as they are stored; None: on decoded ones."""
        return self._parts.stored_product

    @property
    def exact(self) -> bool:
        """Whether nobody has allowed its blocks to compute in another way than exactly."""
        return self._parts.linear.computing is not Computing.FAST

    def attend_by(self, attention: Attention | None) -> None:
        """From the next pass on; None: by what torch has on each device. What blocks made by another kernel and kept is
        forgotten."""
        if attention != self._parts.attending:
            self._parts.attending = attention
            self.store.kept.forget()

    def compile_by(self, settings: CompileSettings | None) -> None:
        """From the next run on; what was compiled with the same settings stays. None: blocks are computed as they
        are."""
        if settings != (self.compiled.settings if self.compiled else None):
            self.compiled = CompiledBlocks(settings) if settings else None
        if self.compiled is not None and self.products_dtype != self.dtype:
            self.compiled.give_up("products are in fp16 between numbers in fp32")

    def load(
        self,
        resident: Iterable[int],
        held: Iterable[int] = (),
        secondaries: Sequence[SecondaryDevice] = (),
        kept: KeptTiers = NOTHING_KEPT,
        *,
        beside: Sequence[BranchDevice] = (),
        on_block: OnBlock | None = None,
    ) -> None:
        """Bring the weights outside the blocks and the `resident` blocks to the device, and keep `held` ones in host
        memory from their next visit on; the blocks of `secondaries`, and the resident ones of those that compute
        `beside`, go to their devices. `kept`: where what blocks make once stays.

        `on_block` is called before each block that is brought to a device, and may raise.
        """
        self.return_outside()
        self.store.kept.place(kept.device, kept.host, kept.block_bytes, kept.spare_bytes, ahead=kept.ahead)
        there: dict[str, Sequence[int]] = {secondary.device: secondary.blocks for secondary in secondaries}
        for device, store in self.secondaries.items():
            if all(device != other.device for other in beside):
                store.set_resident(there.get(device, ()), on_block=on_block)
        if beside:
            together = self._together(beside)
            with together.led():
                together.set_resident([tuple(resident), *(other.plan.resident for other in beside)], on_block)
        else:
            self.store.set_resident(resident, on_block=on_block)  # first: a block may come from host memory
        self.store.set_held({*held, *(index for other in beside for index in other.plan.held)})

    def return_outside(self) -> None:
        """Bring the weights outside the blocks to the device, unless they are there."""
        if not self._loaded:
            self._move_outside(self.hardware.device)
            self._loaded = True

    def unload(self) -> None:
        """Leave the device: what `load` brought there is given back. What was computed beforehand stays in host
        memory."""
        self._move_outside(torch.device("cpu"))
        self._loaded = False
        for store in (self.store, *self.secondaries.values()):
            store.release()
        self.leave_device()

    def shrink(self, nbytes: int) -> int:
        """Give back resident blocks until `nbytes` are free or none is left; returns the bytes given back."""
        before, block_bytes = self.store.resident_bytes, self.footprint.resident_block_bytes
        resident = self.store.resident
        leaving = [index for index in reversed(spread_order(len(self.store.blocks))) if index in resident]
        self.store.set_resident(resident - set(leaving[: -(-nbytes // block_bytes)]))
        if before - self.store.resident_bytes < nbytes:
            self.store.kept.release()
        return before - self.store.resident_bytes

    @property
    def weight_format(self) -> str:
        """As of its parts."""
        return self._parts.weight_format

    @property
    def loaded_bytes(self) -> int:
        """Bytes that stay on the device between runs."""
        return self.store.resident_bytes + (self.footprint.outside_bytes if self._loaded else 0)

    @contextmanager
    def session(
        self,
        *,
        slots: int,
        ring: int = RING_PIECES,
        mlp_chunk_tokens: int | None = None,
        secondaries: Sequence[SecondaryDevice] = (),
        branches: int = 1,
        beside: Sequence[BranchDevice] = (),
    ) -> Iterator[TransformerSession[BranchT, StateT]]:
        """What a run of several passes needs on the devices, given back on every way out. The arguments are a plan's
        fields; `branches`: how many of a pass the first device computes where others compute `beside` it."""
        away = min((secondary.blocks.start for secondary in secondaries), default=len(self.store.blocks))
        seat = Seat(self.hardware, branches, mlp_chunk_tokens)
        with ExitStack() as stack:
            if beside:
                together = self._together(beside)
                stack.enter_context(together.led())
                most = max(slots, *(other.plan.slots for other in beside))  # none where all blocks stay
                streamer = stack.enter_context(BlockStreamer(together, slots=most, ring=ring))
                stack.callback(self.leave_device)
                yield TransformerSession(self, [Part(streamer, [seat, *map(self._seat_of, beside)])])
                return
            pace = Pace()
            first = BlockStreamer(self.store, slots=slots, ring=ring, blocks=range(away), pace=pace)
            parts = [Part(stack.enter_context(first), [seat])]
            for secondary in sorted(secondaries, key=lambda secondary: secondary.blocks.start):
                store = self.secondaries[secondary.device]
                other = BlockStreamer(store, slots=2, blocks=secondary.blocks, pace=pace)
                there = Seat(store.hardware, branches, mlp_chunk_tokens)
                parts.append(Part(stack.enter_context(other), [there]))
            stack.callback(self.leave_device)
            yield TransformerSession(self, parts)

    def _together(self, beside: Sequence[BranchDevice]) -> SideBySide:
        return SideBySide([self.store, *(self.secondaries[other.device] for other in beside)])

    def _seat_of(self, other: BranchDevice) -> Seat:
        plan = other.plan
        return Seat(self.secondaries[other.device].hardware, plan.request.branches, plan.mlp_chunk_tokens)

    def _move_outside(self, device: torch.device) -> None:
        with torch.inference_mode(False):
            bind(self._outside, {name: p.data.to(device) for name, p in self._outside.named_parameters()})
