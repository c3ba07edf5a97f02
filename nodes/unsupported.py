"""Say in words what a graph asks of our models that they do not do; nothing is silently ignored."""

from typing import Any

import comfy.hooks
from comfy.patcher_extension import WrappersMP

from ..engine.errors import Unsupported
from .words import LOADER


def refuse(what: str, instead: str) -> None:
    """Raise Unsupported in the pack's standard words."""
    raise Unsupported(f"{what} does not work with the models of '{LOADER}' yet.\n\nWhat to do: {instead}")


def check_patches(options: dict[str, Any]) -> None:
    """Raise Unsupported for patches in `transformer_options` that the transformer would not see.

    Some nodes (skip-layer guidance, perturbed attention) set them for single calls only.
    """
    for kind, patches in options.get("patches", {}).items():
        if patches:
            refuse(f"A model patch ('{kind}')", "remove the node that patches attention or blocks of the model.")
    for kind, patches in options.get("patches_replace", {}).items():
        if patches:
            refuse(f"A node that replaces blocks ('{kind}')", "remove the node that replaces parts of the model.")
    if options.get("rope_options"):
        refuse("Scaled rotary positions (the ScaleROPE node)", "remove that node.")


def check_graph(model_options: dict[str, Any], conds: dict[str, list[dict[str, Any]]]) -> None:
    """Raise Unsupported for patches and ControlNets before anything is loaded."""
    check_patches(model_options.get("transformer_options", {}))
    if "multigpu_clones" in model_options:
        refuse("Work split over several GPUs", "remove the multi-GPU node.")
    for entries in conds.values():
        for entry in entries:
            if entry.get("control") is not None:
                refuse("ControlNet (Apply ControlNet)", "remove the ControlNet, or use ComfyUI's own loader with it.")
            if entry.get("gligen") is not None:
                refuse("GLIGEN", "remove the GLIGEN node.")


def check_hooks(hooks: comfy.hooks.HookGroup) -> None:
    """Raise Unsupported for hooks that change weights."""
    if hooks.get_type(comfy.hooks.EnumHookType.Weight):
        refuse("A LoRA or model hook (Create Hook LoRA, Set Props)", "remove the hook nodes.")


def why_one_by_one(model_options: dict[str, Any], own_key: str) -> str:
    """Why prompts must run one after another in this graph; empty where they can share each visit of a block.

    Recording the calls shows a wrapper zeros first; one that keeps state, such as EasyCache, would believe them.
    """
    if "model_function_wrapper" in model_options:
        return "a node set a model function wrapper"
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {})
    for kind in (WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL):
        foreign = [key for key, functions in wrappers.get(kind, {}).items() if functions and key != own_key]
        if foreign:
            return f"the wrapper {foreign[0] or 'of a node'!s} ({kind}) sees each call"
    return ""
