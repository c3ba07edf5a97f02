"""How much of a weight is decoded, encoded or changed at a time, so that little memory is taken beside it."""

from collections.abc import Iterator, Sequence
from math import prod

from torch import Tensor

from .scratch import SCRATCH_BYTES

# encoded at a time, and decoded on a CPU, whose cache holds that; whole blocks of a format
CHUNK_WEIGHTS = 1024**2
# changed by LoRAs at a time, 8 MiB in fp32. Both are constants, because the product of a run of rows may be summed in
# another order for another number of them: results depend on no memory plan
LORA_CHUNK_WEIGHTS = 2 * 1024**2


def row_chunks(weight: Tensor) -> Iterator[slice]:
    """Slices of rows (dimension 0) of about CHUNK_WEIGHTS weights each, in order."""
    rows = max(1, CHUNK_WEIGHTS // max(1, weight[:1].numel()))
    for start in range(0, weight.shape[0], rows):
        yield slice(start, start + rows)


def even_rows(shape: Sequence[int], most: int = CHUNK_WEIGHTS) -> int:
    """Rows of a chunk of about `most` weights, as many in each chunk but for the last: a product with very few rows may
    be summed in another order."""
    chunks = -(-prod(shape) // most)
    return -(-shape[0] // max(1, chunks))


def chunk_rows(shape: Sequence[int], row_bytes: int, *, on_host: bool, kept: int = 0, tile: int = 1) -> int:
    """Rows that are decoded at a time, about as many in each chunk; whole tiles of them.

    On a CPU about CHUNK_WEIGHTS weights; elsewhere as many as there is scratch for: `row_bytes` for each row beside
    `kept` bytes.
    """
    rows = max(1, shape[0])
    most = CHUNK_WEIGHTS // max(1, prod(shape[1:])) if on_host else (SCRATCH_BYTES - kept) // max(1, row_bytes)
    tiles, at_once = -(-rows // tile), max(1, most // tile)
    chunks = -(-tiles // at_once)
    return min(rows, -(-tiles // chunks) * tile)
