"""The sizes that a plan is made from: what a model's weights and a forward pass take, in bytes. Imports no torch."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..compute.attention_kernels import FUSED, AttentionKernel, AttentionShape
from ..compute.chunk_sizes import MLP_CHUNKS
from ..compute.linear_layers import DECODED_LAYERS, LinearLayers
from .request import SamplingRequest


@dataclass(frozen=True)
class TransformerFootprint(ABC):
    """What a transformer's weights and passes take, in bytes and operations. Each network has its own, which says what
    its passes take; `models/<network>/costs.py`.

    slot_bytes: one block as it is computed with, without what is computed beforehand; stored_bytes: the same block as
    it is stored. staging_bytes: room on the device for the largest stored parameter, 0 where stored bytes need no
    decoding (native). scratch_bytes: what decoding and changing a block takes on the device beside that; decode_bytes:
    what it reads and writes there, in so many kernels (decode_launches). inner_dim: numbers of a token between blocks.
    modulation_*: the same sizes of a block's weights that see the timestep alone, 0 where the network has none.
    ring_bytes: host memory that file bytes pass through. host: the device is the host, and has no other memory.
    elsewhere: blocks that stay on other devices, and are not among `blocks`. attention: what all devices of the blocks
    can compute attention with. in_half: products are computed in fp16, and activations are wider between them.
    compiled: "exact" or "not exact" where blocks are computed by compiled code, which holds all of an MLP at once.
    linear: layers that compute on stored weights; modulation_linear: those of what is computed beforehand.
    """

    blocks: int
    slot_bytes: int
    stored_bytes: int
    staging_bytes: int
    native: bool
    outside_bytes: int
    inner_dim: int
    element_bytes: int
    modulation_slot_bytes: int = 0
    modulation_staging_bytes: int = 0
    scratch_bytes: int = 0
    decode_bytes: int = 0
    decode_launches: int = 0
    modulation_decode_bytes: int = 0
    modulation_decode_launches: int = 0
    modulation_scratch_bytes: int = 0
    modulation_stored_bytes: int = 0
    ring_bytes: int = 0
    host: bool = False
    elsewhere: int = 0
    attention: AttentionKernel = FUSED
    in_half: bool = False
    linear: LinearLayers = DECODED_LAYERS
    modulation_linear: LinearLayers = DECODED_LAYERS
    compiled: str = ""

    @property
    def mlp_chunks(self) -> Sequence[int | None]:
        """Of which a plan chooses one: tokens of an MLP at a time, None for all at once."""
        return (None,) if self.compiled or self.linear.of_all_tokens else MLP_CHUNKS

    @property
    def all_blocks(self) -> int:
        return self.blocks + self.elsewhere

    @property
    def resident_block_bytes(self) -> int:
        """What a block that stays on the device takes there: decoded where nothing is gained by not decoding it."""
        return self.slot_bytes if self.native else self.stored_bytes

    @property
    def modulation_slots_bytes(self) -> int:
        """Of the two that the weights of modulation pass through before the first step, in one allocation: one of a
        block has its memory afterwards."""
        return max(2 * self.modulation_slot_bytes, self.slot_bytes) if self.modulation_slot_bytes else 0

    @property
    def row_bytes(self) -> int:
        """Of what is computed beforehand for one timestep, in all blocks."""
        return 0

    @property
    def suggested_sizes(self) -> tuple[tuple[int, int], ...]:
        """(width, height) in px that the network was trained on, largest first, and smaller ones to fall back to."""
        return ()

    def kept_block_bytes(self, request: SamplingRequest) -> int:
        """What each block makes of a request once, and can keep for later steps."""
        return 0

    def kept_flops(self, request: SamplingRequest) -> float:
        """Operations, in all blocks, of what `kept_block_bytes` are made by; not among those of a step."""
        return 0.0

    def kept_again_flops(self, request: SamplingRequest) -> float:
        """Of them, those for other prompts about the same images."""
        return 0.0

    @abstractmethod
    def activation_bytes(self, request: SamplingRequest, chunk: int | None) -> int:
        """Peak of a forward pass beyond weights; `chunk`: tokens of an MLP at a time, None for all at once."""

    def kept_bytes(self, request: SamplingRequest) -> int:
        """Of `activation_bytes`, what stays on the device from one pass to the next."""
        return 0

    def anchors_bytes(self, request: SamplingRequest) -> int:
        """What steps that are not computed are predicted from, on the device during the whole run: tensors like each
        branch's image between blocks. Not among `activation_bytes`."""
        if request.step_cache is None:
            return 0
        tokens = (request.branches + request.beside) * request.frames * request.frame_tokens
        return request.step_cache.kept * tokens * self.inner_dim * self.element_bytes

    def attention_text(self, request: SamplingRequest) -> str:
        """The kernel of attention, and its chunks."""
        return self.attention.name

    def exchanged_bytes(self, request: SamplingRequest) -> int:
        """What each of several processes sends to the others within one block, for all branches."""
        return 0

    def exchanges(self, request: SamplingRequest) -> int:
        """In how many exchanges, one after another."""
        return 0

    @abstractmethod
    def step_flops(self, request: SamplingRequest) -> float:
        """Floating-point operations of one step."""


@dataclass(frozen=True)
class TextEncoderFootprint:
    """A text encoder's weights in bytes, layer by layer; the fields are named as in TransformerFootprint.

    shared_keys: heads that look at the same keys. attention_states: of a prompt, which are alive at once in attention,
    of their width in the compute dtype; 0 where the MLP has more.
    """

    layers: int
    slot_bytes: int
    staging_bytes: int
    hidden_size: int
    intermediate_size: int
    chunk_tokens: int
    head_dim: int
    element_bytes: int
    scratch_bytes: int = 0
    decode_bytes: int = 0
    decode_launches: int = 0
    stored_bytes: int = 0
    ring_bytes: int = 0
    host: bool = False
    attention: AttentionKernel = FUSED
    shared_keys: int = 1
    attention_states: int = 0

    def attended(self, tokens: int) -> AttentionShape:
        """Each token looks at those before it."""
        heads = self.hidden_size // self.head_dim
        return AttentionShape(tokens, tokens, heads, self.head_dim, self.shared_keys, masked=True)


class Tiles(Protocol):
    """In which tiles an image is decoded: how many, whether that is the whole image, what they hold, and how many
    pixels they compute for each of the image (work)."""

    @property
    def peak_bytes(self) -> int: ...

    @property
    def is_whole(self) -> bool: ...

    @property
    def work(self) -> float: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class VAEFootprint:
    """A VAE's weights in bytes, decoder and encoder. plan_decode(height, width, limit_bytes): the tiles of an image of
    that many px, within that limit beside the weights; raises DoesNotFit. decode_flops(height, width, work): operations
    that it takes where tiles compute `work` pixels for each of the image. pixel_bytes: of a decoded image."""

    weights_bytes: int
    plan_decode: Callable[[int, int, int], Tiles]
    decode_flops: Callable[[int, int, float], float]
    pixel_bytes: int
