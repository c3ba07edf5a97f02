"""Bring blocks of weights to the device just in time: tiers, slots, the reader thread, the copy stream.

Knows how a block is stored and where it is to lie, and nothing of what a block computes.
"""

from ..planning.overlap import PIECE_BYTES, RING_PIECES
from .block_layout import StoredBlock, WeightPatch, bind, store_block
from .block_source import BlockSource, FileSource, TensorReader, read_block, read_params
from .kept_tensors import KeptTensors
from .pinned_memory import HostBuffer, PinnedMemory
from .row_slots import RowSlots
from .side_by_side import SideBySide
from .store import BlockStore, require_decodable
from .streamed_blocks import BlockFiles, OnBlock, StreamedBlocks, VisitsBlocks
from .streamer import BlockStreamer, Waits
from .streams import Pace, StreamOrder

__all__ = [
    "PIECE_BYTES",
    "RING_PIECES",
    "BlockFiles",
    "BlockSource",
    "BlockStore",
    "BlockStreamer",
    "FileSource",
    "HostBuffer",
    "KeptTensors",
    "OnBlock",
    "Pace",
    "PinnedMemory",
    "RowSlots",
    "SideBySide",
    "StoredBlock",
    "StreamOrder",
    "StreamedBlocks",
    "TensorReader",
    "VisitsBlocks",
    "Waits",
    "WeightPatch",
    "bind",
    "read_block",
    "read_params",
    "require_decodable",
    "store_block",
]
