"""What vision towers have in common, whichever version: where their weights lie, and how they are brought in."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...compute.attention import kernel_of
from ...errors import WrongModel
from ...files.checkpoint import Checkpoint
from ...hardware import Hardware
from ...planning.vision import VisionFootprint
from ...streaming import (
    BlockFiles,
    BlockSource,
    FileSource,
    StoredBlock,
    StreamedBlocks,
    VisitsBlocks,
    bind,
    read_params,
    store_block,
)
from .images import CHANNELS, FRAMES, PatchedImage, SeenImage
from .vision_files import MERGE, VisionTensors


@dataclass(frozen=True)
class TowerModules:
    """Empty modules of a tower, whose parameters are on the meta device: what lies outside of its blocks, and a block.
    make_block must not refer to anything that holds weights."""

    make_outside: Callable[[], nn.Module]
    make_block: Callable[[], nn.Module]
    footprint: type[VisionFootprint]
    patch_px: int
    model: str  # in messages


class VisionTower(VisitsBlocks, ABC):
    """The vision part of a text encoder.

    Guarantees: all images are seen in one visit of each block; on the device lie at most `slots` blocks, what is
    outside of the blocks and the images' activations; nothing stays on the device, and no file open, when `see`
    returns or raises.
    """

    def __init__(
        self,
        encoder: Checkpoint,
        *,
        dtype: torch.dtype,
        hardware: Hardware,
        source: Callable[[Sequence[StoredBlock]], BlockSource] = FileSource,
    ) -> None:
        """Reads headers only: those of the text encoder, and of the file beside a GGUF one. Raises MissingFile;
        WrongModel for tensors that are missing or of another shape, and for patches of another size."""
        vision, modules = self.parts(encoder)
        self.identity = vision.checkpoint.identity
        self.dtype, self.hardware = dtype, hardware
        self._where, self._settings = str(vision.checkpoint.path), vision.config
        self._require_known_patches(modules)
        self._modules, self._outside, self._source = modules, vision.outside, source
        self._outside_shapes = {name: tuple(p.shape) for name, p in modules.make_outside().named_parameters()}
        outside = store_block(self._outside_shapes, self._outside, dtype, self._where)
        files = BlockFiles(vision.blocks, modules.make_block, dtype, f"{self._where}, vision block", source)
        self._blocks = StreamedBlocks(files.open(hardware))
        self.footprint = modules.footprint(
            blocks=len(self._blocks),
            **self._blocks.nbytes,
            outside_bytes=outside.slot.nbytes,
            patch_values=CHANNELS * FRAMES * modules.patch_px**2,
            hidden_size=self._settings["hidden_size"],
            intermediate_size=self._settings["intermediate_size"],
            head_dim=self._settings["hidden_size"] // self._settings["num_heads"],
            merge=MERGE,
            out_hidden_size=self._settings["out_hidden_size"],
            element_bytes=dtype.itemsize,
            attention=kernel_of(hardware, dtype),
        )

    @staticmethod
    @abstractmethod
    def parts(encoder: Checkpoint) -> tuple[VisionTensors, TowerModules]:
        """Of a text encoder's file. Raises MissingFile or WrongModel."""

    @abstractmethod
    def see(
        self, images: Sequence[PatchedImage], *, slots: int = 2, on_block: Callable[[int], None] | None = None
    ) -> list[SeenImage]:
        """`on_block` is called before each block with its index, and may raise."""

    def _read_outside(self) -> nn.Module:
        """What lies outside of the blocks, on the device."""
        module = self._modules.make_outside()
        read = read_params(self._outside, self._outside_shapes, self.dtype, self._where, self._source)
        bind(module, {name: value.to(self.hardware.device) for name, value in read.items()})
        return module

    def _require_known_patches(self, modules: TowerModules) -> None:
        names = ("in_channels", "temporal_patch_size", "patch_size", "spatial_merge_size")
        stated, known = tuple(self._settings[name] for name in names), (CHANNELS, FRAMES, modules.patch_px, MERGE)
        if stated != known:
            raise WrongModel(
                "{where}: the vision part has {names} of {stated}, but {model} has {known}. Use the text encoder that "
                "belongs to the transformer.",
                code="vision.other_settings",
                where=self._where,
                names=names,
                stated=stated,
                model=modules.model,
                known=known,
            )
