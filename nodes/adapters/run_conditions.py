"""A run's conditions as the sampler will make them of the graph's, known before anything is loaded."""

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

Conds = dict[str, list[dict[str, Any]]]


def entries_of(conds: Conds) -> list[dict[str, Any]]:
    return [entry for entries in conds.values() for entry in entries or ()]


def conditions_of_run(guider: Any, noise: Tensor) -> Conds:
    """The guider's conditions with what ComfyUI's own function adds: areas in latents, the other prompts once more for
    each area, and the ControlNets that the negative prompt is given.

    ComfyUI does the same again when it samples. This begins the run of the ControlNets, which must be cleaned up.
    """
    conds = {name: list(entries or ()) for name, entries in guider.conds.items()}
    sampling = guider.model_patcher.get_model_object("model_sampling")
    # nothing is kept that would keep our model alive; the conditions are not encoded for it here
    stand_in = SimpleNamespace(model_sampling=sampling, diffusion_model=None)
    made: Conds = comfy.samplers.process_conds(stand_in, noise, conds, torch.device("cpu"))
    # only this guider leaves the negative prompt out; others decide for themselves
    plain = type(guider) is comfy.samplers.CFGGuider
    if plain and math.isclose(guider.cfg, 1.0) and not guider.model_options.get("disable_cfg1_optimization"):
        made.pop("negative", None)
    return made


def size_of(entry: dict[str, Any], shape: Sequence[int]) -> tuple[int, int]:
    """(height, width) in latents of what a condition's calls are given, of latents of this shape (B, 16, F, H, W)."""
    dims = shape[2:]
    area = comfy.samplers.add_area_dims(list(entry.get("area") or ()), len(dims))
    half = len(area) // 2
    sides = [min(dim - at, side) for dim, side, at in zip(dims, area, area[half:], strict=False)]
    return sides[-2], sides[-1]
