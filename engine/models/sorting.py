"""Sort a file's tensors into numbered blocks and what lies outside of them. Reads headers only."""

from collections.abc import Mapping

from ..errors import WrongModel
from ..files.checkpoint import Checkpoint, TensorEntry


def split_blocks(
    checkpoint: Checkpoint, tensors: Mapping[str, TensorEntry], prefix: str
) -> tuple[dict[str, TensorEntry], tuple[dict[str, TensorEntry], ...]]:
    """What is not numbered under `prefix`, and what is, block by block. Raises WrongModel where a block is missing."""
    outside: dict[str, TensorEntry] = {}
    blocks: dict[int, dict[str, TensorEntry]] = {}
    for name, entry in tensors.items():
        if name.startswith(prefix):
            index, _, rest = name.removeprefix(prefix).partition(".")
            if not (index.isascii() and index.isdigit() and len(index) < 9 and rest):
                raise WrongModel(
                    f"{checkpoint.path}: {name!r} is no tensor of a numbered block. Download the file again."
                )
            blocks.setdefault(int(index), {})[rest] = entry
        else:
            outside[name] = entry
    if sorted(blocks) != list(range(len(blocks))):
        raise WrongModel(
            f"{checkpoint.path}: of blocks 0..{max(blocks)} only {len(blocks)} are in the file. Download it again."
        )
    return outside, tuple(blocks[i] for i in range(len(blocks)))


def shape_of(checkpoint: Checkpoint, tensors: Mapping[str, TensorEntry], name: str, dimensions: int) -> tuple[int, ...]:
    """Of a tensor that has to be there, with that many dimensions, none of them empty."""
    if name not in tensors:
        raise WrongModel(f"{checkpoint.path} lacks {name}: the model is not whole. Download it again.")
    shape = tensors[name].shape
    if len(shape) != dimensions or 0 in shape:
        raise WrongModel(f"{checkpoint.path}: {name} has shape {list(shape)}, which no Qwen-Image has.")
    return shape
