"""Model patches and replaced blocks: called around our blocks as ComfyUI's own transformer calls them, or refused."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ...engine.models.qwen_image.block_hooks import States
from .graph_checks import refuse

# the blocks that a node may name; Qwen-Image has none of the second kind, and nodes name both
KINDS_OF_BLOCKS = ("double_block", "single_block")
OTHER_MODELS = "perturbed, self-attention guidance and the like are made for other models"
# DiffSynth's patch: keeps an encoded image, and nothing from one block to the next. Known by its name, for ComfyUI
# loads the file of its nodes under another name than an import does
CONTROL_PATCH = "DiffSynthCnetPatch"


def check_patches(options: dict[str, Any]) -> None:
    """Raise Unsupported for patches in `transformer_options` that the transformer would not see.

    Some nodes (skip-layer guidance, perturbed attention) set them for single calls only.
    """
    for kind, patches in options.get("patches", {}).items():
        if patches and kind != "double_block":
            refuse(
                "A model patch ('{kind}')",
                "remove the node that patches attention or other parts of the model.",
                code="graph.model_patch",
                kind=kind,
            )
    for kind, patches in options.get("patches_replace", {}).items():
        for place in patches:
            if kind != "dit" or not isinstance(place, tuple) or place[0] not in KINDS_OF_BLOCKS:
                refuse(
                    "A node that replaces '{kind}' at {place} in the model",
                    "remove it: {others}.",
                    code="graph.replaced_part",
                    kind=kind,
                    place=str(place),
                    others=OTHER_MODELS,
                )
    if options.get("rope_options"):
        refuse("Scaled rotary positions (the ScaleROPE node)", "remove that node.", code="graph.scaled_rope")


def behind_blocks(options: dict[str, Any]) -> list[Any]:
    """What is called behind every block."""
    return list(options.get("patches", {}).get("double_block", []))


def control_patches(options: dict[str, Any]) -> list[Any]:
    return [patch for patch in behind_blocks(options) if type(patch).__name__ == CONTROL_PATCH]


def has_patches(options: dict[str, Any]) -> bool:
    return bool(behind_blocks(options) or options.get("patches_replace", {}).get("dit"))


def sees_each_call(options: dict[str, Any]) -> str:
    """Which patch may keep something from one block to the next, so that calls may not take turns; empty if none."""
    for patch in behind_blocks(options):
        if type(patch).__name__ != CONTROL_PATCH:
            return f"the model patch {_name(patch)} sees each call"
    for place, function in options.get("patches_replace", {}).get("dit", {}).items():
        if place[0] == "double_block":
            return f"{_name(function)} replaces block {place[1]} of each call"
    return ""


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


class PatchImages:
    """The images of control patches, encoded for each size that a run's calls have. ComfyUI keeps one at a time."""

    def __init__(self, options: dict[str, Any], device: torch.device) -> None:
        self._patches = control_patches(options)
        self._device = device
        self._encoded: dict[tuple[int, torch.Size], tuple[Tensor, tuple[int, int]]] = {}

    def encode(self, sizes: Iterable[tuple[int, int]], noise: Tensor) -> bool:
        """Now, before the run's memory is laid out. True where there was one to do it."""
        for height, width in sizes:
            x = noise.new_zeros(*noise.shape[:3], height, width)
            for patch in self._patches:
                model = patch.model_patch.model
                model.control_block = lambda *_: 0.0  # only what comes before it is wanted
                try:
                    empty = x.new_zeros(1, 0, 1)
                    patch({"x": x, "img": empty, "txt": empty, "block_index": 0, "transformer_options": {}})
                finally:
                    del model.control_block
                image = patch.encoded_image.to(self._device)
                self._encoded[id(patch), x.shape[-2:]] = image, patch.encoded_image_size
        return bool(self._encoded)

    def show(self, patch: Any, x: Tensor) -> None:
        """Let the patch have its image for latents like `x`."""
        if (id(patch), x.shape[-2:]) in self._encoded:
            patch.encoded_image, patch.encoded_image_size = self._encoded[id(patch), x.shape[-2:]]


class BlockPatches:
    """The patches of one call, as a hook around our blocks."""

    def __init__(
        self, options: dict[str, Any], x: Tensor, blocks: int, reference_tokens: list[int], images: PatchImages
    ) -> None:
        """`x`: what the call was given, (B, 16, 1, H, W). `reference_tokens`: of each reference image."""
        self._options = options | {"block_type": "double", "total_blocks": blocks}
        if reference_tokens:
            self._options["reference_image_num_tokens"] = reference_tokens
        self._x = x
        self._images = images
        self._behind = behind_blocks(options)
        self._instead = options.get("patches_replace", {}).get("dit", {})

    def __call__(
        self, index: int, states: States, temb: Tensor, rotary: States, block: Callable[[Tensor, Tensor], States]
    ) -> States:
        home, away = self._x.device, states[0].device
        options = self._options
        options["block_index"] = index
        img, txt = (state.to(home) for state in states)
        replace = self._instead.get(("double_block", index))
        if replace is None:
            img, txt = block(img.to(away), txt.to(away))
        else:
            args = {
                "img": img,
                "txt": txt,
                "vec": temb.to(home),
                "pe": _pe(rotary, img),
                "transformer_options": options,
            }
            out = replace(dict(args), {"original_block": _original(block, args, away)})
            img, txt = out["img"], out["txt"]
        img, txt = img.to(home), txt.to(home)
        for patch in self._behind:
            args = {"img": img, "txt": txt, "x": self._x, "block_index": index, "transformer_options": options}
            self._images.show(patch, self._x)
            out = patch(args)
            img, txt = out["img"], out["txt"]
        return img.to(away), txt.to(away)


def _original(block: Callable[[Tensor, Tensor], States], given: dict[str, Any], device: torch.device) -> Any:
    """The block as ComfyUI's patches call it. Its modulation and positions are not theirs to change."""

    def run(args: dict[str, Any]) -> dict[str, Tensor]:
        for name, what in (("vec", "the timestep's embedding"), ("pe", "the rotary positions")):
            if args[name] is not given[name]:
                refuse(
                    "A node that changes {changed} of a block",
                    "remove the node that replaces blocks of the model.",
                    code="graph.changed_block",
                    changed=what,
                )
        img, txt = block(args["img"].to(device), args["txt"].to(device))
        return {"img": img, "txt": txt}

    return run


def _pe(rotary: States, img: Tensor) -> Tensor:
    """Rotary tables as ComfyUI has them: (1, 1, L + N, head_dim / 2, 2, 2), the text first."""
    turns = torch.cat([rotary[1], rotary[0]]).to(img.device)
    matrices = torch.stack([turns.real, -turns.imag, turns.imag, turns.real], dim=-1)
    return matrices.unflatten(-1, (2, 2))[None, None].to(img.dtype)
