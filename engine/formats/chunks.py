"""Cut a matrix into runs of whole rows, so that encoding it takes little memory beside it."""

from collections.abc import Iterator

from torch import Tensor

CHUNK_WEIGHTS = 1024**2


def row_chunks(weight: Tensor) -> Iterator[slice]:
    """Slices of rows (dimension 0) of about CHUNK_WEIGHTS weights each, in order."""
    rows = max(1, CHUNK_WEIGHTS // max(1, weight[:1].numel()))
    for start in range(0, weight.shape[0], rows):
        yield slice(start, start + rows)
