"""Read single rows of an embedding matrix from its file. Keeps nothing open after `close`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import WrongModel
from ...files.checkpoint import TensorEntry
from ...formats import StoredParam, decode_alone, raw_layout
from ...streaming import TensorReader


def require_single_rows(matrix: StoredParam) -> None:
    """Raise WrongModel for a matrix whose rows cannot be decoded one by one."""
    if matrix.tile_rows > 1:
        raise WrongModel(
            "{file}: the embeddings are stored in {codec}, whose scales are shared by {rows} rows. Use a text encoder "
            "whose embeddings are in bf16, fp8 or int8.",
            code="text_encoder.embeddings_by_tiles",
            file=matrix.parts[0].file,
            codec=matrix.codec,
            rows=matrix.tile_rows,
        )


class EmbeddingRows:
    """Reads single rows of an embedding matrix from its file."""

    def __init__(self, matrix: StoredParam, dtype: torch.dtype) -> None:
        self._reader = TensorReader()
        self._parts, self._codec, self.dtype = matrix.parts, matrix.decoder, dtype

    def gather(self, ids: Sequence[int]) -> Tensor:
        """(len(ids), hidden) in the compute dtype, on the host."""
        unique = sorted(set(ids))
        stored = [self._rows(self._parts[0], unique)]
        for scale in self._parts[1:]:
            per_row = len(scale.shape) > 0 and scale.shape[0] == self._parts[0].shape[0] > 1
            stored.append(self._rows(scale, unique) if per_row else self._whole(scale))
        out = torch.empty(len(unique), self._parts[0].shape[1], dtype=self.dtype)
        decode_alone(self._codec, out, stored)
        position = {token: i for i, token in enumerate(unique)}
        return out[[position[token] for token in ids]]

    def close(self) -> None:
        self._reader.close()

    def _rows(self, entry: TensorEntry, rows: Sequence[int]) -> Tensor:
        width = entry.nbytes // entry.shape[0]
        dtype, shape = raw_layout(entry)
        out = torch.empty(len(rows), width, dtype=torch.uint8)
        for i, row in enumerate(rows):
            self._reader.read_into(entry, memoryview(out[i].numpy()), skip=row * width)
        return out.view(dtype).view(len(rows), *shape[1:])

    def _whole(self, entry: TensorEntry) -> Tensor:
        dtype, shape = raw_layout(entry)
        out = torch.empty(entry.nbytes, dtype=torch.uint8)
        self._reader.read_into(entry, memoryview(out.numpy()))
        return out.view(dtype).view(shape)
