"""The sizes that a plan is made from: what a model's weights and a forward pass take, in bytes. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TransformerFootprint:
    """A transformer's weights in bytes.

    slot_bytes: one block as it is computed with, without modulation; stored_bytes: the same block as it is stored.
    staging_bytes: room on the device for the largest stored parameter, 0 where stored bytes need no decoding (native).
    scratch_bytes: what decoding a block allocates on the device for a moment.
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

    @property
    def resident_block_bytes(self) -> int:
        """What a block that stays on the device takes there: decoded where nothing is gained by not decoding it."""
        return self.slot_bytes if self.native else self.stored_bytes


@dataclass(frozen=True)
class TextEncoderFootprint:
    """A text encoder's weights in bytes; slot_bytes, staging_bytes and scratch_bytes as in TransformerFootprint."""

    layers: int
    slot_bytes: int
    staging_bytes: int
    hidden_size: int
    intermediate_size: int
    chunk_tokens: int
    head_dim: int
    element_bytes: int
    scratch_bytes: int = 0
