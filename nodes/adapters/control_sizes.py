"""What ControlNets and model patches take beside the transformer, by their numbers. Imports nothing of ComfyUI.

The numbers are those of a net that is loaded (`control_memory`), or of its file's header.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...engine.errors import WrongModel
from ...engine.files.checkpoint import Checkpoint, open_checkpoint
from ...engine.planning.footprint import TransformerFootprint
from ...engine.planning.request import Controls, SamplingRequest

# tensors of one token's width that are alive at once in ComfyUI's QwenImageTransformerBlock: the joint attention's
# q, k and v, before and after they are joined and turned, and around the MLP its four times wider states
BLOCK_WIDTHS = 12
# tensors of an image's states that a control patch has alive at once beside them: two norms, their sum, two layers
PATCH_WIDTHS = 6
_COMPUTED_IN = {"F32": 4, "BF16": 2, "F16": 2}  # bytes; of others the weights are cast


@dataclass(frozen=True)
class NetSizes:
    """Of a ControlNet. blocks: how many hand over states of this width. hint: numbers of a token of it.
    element_bytes: of a number that it computes with. cast: its weights are stored in another dtype."""

    blocks: int
    hint: int
    width: int
    element_bytes: int
    cast: bool

    def held_bytes(self, tokens: int) -> int:
        """Residuals and the hint, of one condition's images."""
        return tokens * (self.blocks * self.width + self.hint) * self.element_bytes

    def working_bytes(self, tokens: int) -> int:
        """One pass over so many tokens, the prompt's included, beyond its weights and what it hands over."""
        return BLOCK_WIDTHS * tokens * self.width * self.element_bytes

    @property
    def cast_bytes(self) -> int:
        """Its widest weight in another dtype, for a moment."""
        return 4 * self.width**2 * self.element_bytes if self.cast else 0


def patch_controls(
    request: SamplingRequest, footprint: TransformerFootprint, batch: int, encoded_images: int
) -> Controls:
    """What model patches hold and take beyond their weights: images that they encoded, and states that are handed to
    them and back; around a block they are alive twice more."""
    unit = footprint.inner_dim * footprint.element_bytes
    tokens = request.image_tokens - request.reference_tokens
    states = (request.image_tokens + request.prompt_tokens) * unit
    images = encoded_images * tokens * footprint.inner_dim * 4  # fp32
    layer = footprint.inner_dim * unit if encoded_images else 0
    working = PATCH_WIDTHS * batch * tokens * unit + layer + 2 * request.branches * states
    return Controls(held_bytes=images + 2 * batch * states, working_bytes=working, fixed_bytes=layer)


def controls_of_files(
    nets: Sequence[Path],
    patches: Sequence[Path],
    request: SamplingRequest,
    footprint: TransformerFootprint,
    batch: int,
) -> Controls:
    """Of a run whose every prompt has these ControlNets, for `batch` images; from headers alone. Raises MissingFile,
    DamagedFile, and WrongModel for files of other kinds."""
    files = {path: open_checkpoint(path) for path in (*nets, *patches)}
    sizes = [net_sizes(files[path]) for path in nets]
    tokens = batch * request.frame_tokens
    prompts = max(1, request.branches // batch)
    held = prompts * sum(size.held_bytes(tokens) for size in sizes)
    working = max((size.working_bytes(tokens + batch * request.prompt_tokens) for size in sizes), default=0)
    cast = max((size.cast_bytes for size in sizes), default=0)
    patched = patch_controls(request, footprint, batch, len(patches)) if patches else Controls()
    return Controls(
        weights_bytes=sum(_bytes_of(file) for file in files.values()),
        held_bytes=held + patched.held_bytes,
        working_bytes=max(working + cast, patched.working_bytes),
        fixed_bytes=max(cast, patched.fixed_bytes),
        images=batch,
    )


def net_sizes(file: Checkpoint) -> NetSizes:
    """Of InstantX's ControlNets, and of the Fun ones. Raises WrongModel for others."""
    for way_in, blocks, more in (
        ("controlnet_x_embedder.weight", "controlnet_blocks.", 0),
        ("control_img_in.weight", "control_blocks.", 1),  # its residuals are views of one tensor with one more
    ):
        entry = file.tensors.get(way_in)
        if entry is not None:
            width, hint = entry.shape
            count = _count(name.removeprefix(blocks) for name in file.tensors if name.startswith(blocks))
            element_bytes = _COMPUTED_IN.get(entry.dtype)
            return NetSizes(count + more, hint, width, element_bytes or 2, cast=element_bytes is None)
    raise WrongModel(
        "{file} is not a ControlNet for Qwen-Image.\n\nWhat to do: choose a ControlNet made for Qwen-Image.",
        code="control.other_model",
        file=file.path,
    )


def _count(names: Iterable[str]) -> int:
    return len({name.partition(".")[0] for name in names})


def _bytes_of(file: Checkpoint) -> int:
    return sum(entry.nbytes for entry in file.tensors.values())
