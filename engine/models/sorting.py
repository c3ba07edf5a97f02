"""Sort a file's tensors into numbered blocks and what lies outside of them. Reads headers only."""

from collections.abc import Mapping

from ..errors import WrongModel
from ..files.checkpoint import Checkpoint, TensorEntry


def sort_blocks(
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
                    "{file}: {name!r} is not a tensor of a numbered block. Download the file again.",
                    code="model.no_block_tensor",
                    file=checkpoint.path,
                    name=name,
                )
            blocks.setdefault(int(index), {})[rest] = entry
        else:
            outside[name] = entry
    if sorted(blocks) != list(range(len(blocks))):
        raise WrongModel(
            "{file}: only {count} of the blocks 0 to {last} are in the file. Download it again.",
            code="model.blocks_missing",
            file=checkpoint.path,
            last=max(blocks),
            count=len(blocks),
        )
    return outside, tuple(blocks[i] for i in range(len(blocks)))


def shape_of(checkpoint: Checkpoint, tensors: Mapping[str, TensorEntry], name: str, dimensions: int) -> tuple[int, ...]:
    """Of a tensor that has to be there, with that many dimensions, none of them empty."""
    if name not in tensors:
        raise WrongModel(
            "{file} lacks {name}: the model is incomplete. Download it again.",
            code="model.lacks_tensor",
            file=checkpoint.path,
            name=name,
        )
    shape = tensors[name].shape
    if len(shape) != dimensions or 0 in shape:
        raise WrongModel(
            "{file}: {name} has shape {shape}, which it cannot have. Download it again.",
            code="model.wrong_shape",
            file=checkpoint.path,
            name=name,
            shape=list(shape),
        )
    return shape
