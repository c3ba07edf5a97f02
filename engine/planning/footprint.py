"""The sizes that a plan is made from: what a model's weights and a forward pass take, in bytes. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class TransformerFootprint:
    """A transformer's weights in bytes.

    slot_bytes: one block as it is computed with, without modulation; stored_bytes: the same block as it is stored.
    staging_bytes: room on the device for the largest stored parameter, 0 where stored bytes need no decoding (native).
    scratch_bytes: what decoding a block allocates on the device for a moment. modulation_*: the same of a block's
    modulation weights. ring_bytes: host memory that file bytes pass through. host: the device is the host, and has no
    other memory. elsewhere: blocks that stay on other devices, and are not among `blocks`. zero_cond_t: references are
    modulated as at timestep zero, token by token.
    """

    blocks: int
    slot_bytes: int
    stored_bytes: int
    staging_bytes: int
    native: bool
    outside_bytes: int
    modulation_slot_bytes: int
    modulation_staging_bytes: int
    inner_dim: int
    head_dim: int
    joint_attention_dim: int
    element_bytes: int
    scratch_bytes: int = 0
    modulation_scratch_bytes: int = 0
    modulation_stored_bytes: int = 0
    ring_bytes: int = 0
    host: bool = False
    elsewhere: int = 0
    zero_cond_t: bool = False

    @property
    def all_blocks(self) -> int:
        return self.blocks + self.elsewhere

    @property
    def row_bytes(self) -> int:
        """One timestep's row of the modulation table: 6 vectors each for picture, references where they have their own,
        and text, in every block."""
        return self.all_blocks * (18 if self.zero_cond_t else 12) * self.inner_dim * self.element_bytes

    @property
    def resident_block_bytes(self) -> int:
        """What a block that stays on the device takes there: decoded where nothing is gained by not decoding it."""
        return self.slot_bytes if self.native else self.stored_bytes


@dataclass(frozen=True)
class TextEncoderFootprint:
    """A text encoder's weights in bytes, layer by layer; the fields are named as in TransformerFootprint."""

    layers: int
    slot_bytes: int
    staging_bytes: int
    hidden_size: int
    intermediate_size: int
    chunk_tokens: int
    head_dim: int
    element_bytes: int
    scratch_bytes: int = 0
    stored_bytes: int = 0
    ring_bytes: int = 0
    host: bool = False


class Tiles(Protocol):
    """In which tiles a picture is decoded: how many, whether that is the whole picture, and what they hold."""

    @property
    def peak_bytes(self) -> int: ...

    @property
    def is_whole(self) -> bool: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class VAEFootprint:
    """A VAE's weights in bytes, decoder and encoder. plan_decode(height, width, limit_bytes): the tiles of a picture of
    that many px, within that limit beside the weights; raises DoesNotFit. pixel_bytes: of a decoded picture."""

    weights_bytes: int
    plan_decode: Callable[[int, int, int], Tiles]
    pixel_bytes: int
