"""Compiled blocks as a person asks for them: in the loader, or by ComfyUI's node TorchCompileModel."""

from collections.abc import Mapping
from typing import Any

from comfy.patcher_extension import WrappersMP

from ...engine.compute.compilation import BACKENDS, INDUCTOR, CompileSettings
from ...engine.log import logger

# of ComfyUI's set_torch_compile_wrapper: the wrapper that swaps a compiled model in, and what it was compiled with
COMPILE_KEY, COMPILE_OPTIONS = "torch.compile", "torch_compile_kwargs"
# settings of a node's that its compiler would follow
_OTHER_SETTINGS = ("mode", "fullgraph", "dynamic")


def is_compiling(wrapper_type: str, key: Any) -> bool:
    """Whether a wrapper is ComfyUI's around a compiled model: of ours blocks are compiled in its place."""
    return (wrapper_type, key) == (WrappersMP.APPLY_MODEL, COMPILE_KEY)


def settings_of_run(model_options: Mapping[str, Any], *, exact: bool, of_loader: bool) -> CompileSettings | None:
    """What blocks are compiled with; None where neither the loader (of_loader) nor a node asks for that. What a node
    sets beside is named in the log where it is not followed."""
    asked = model_options.get(COMPILE_OPTIONS)
    if asked is None:
        return CompileSettings(exact) if of_loader else None
    backend = asked.get("backend", INDUCTOR)
    unfollowed = [f"{name} {asked[name]}" for name in _OTHER_SETTINGS if asked.get(name)]
    if backend not in BACKENDS:
        unfollowed, backend = [f"backend {backend}", *unfollowed], INDUCTOR
    if unfollowed:
        logger.warning(
            "The compile node's %s is ignored: all blocks share one compilation, by %s.",
            ", ".join(unfollowed),
            backend,
        )
    return CompileSettings(exact, backend)
