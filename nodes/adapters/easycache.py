"""ComfyUI's EasyCache on our MODEL: calls share each visit of a block although it watches them.

It decides about a call from what it knows of earlier steps and from the call's latents, not from its answer. So a
recording with zeros for answers takes the same decisions, if it is given its state back before the answers come.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

_KEY, _MODULE = "easycache", "nodes_easycache"  # of its wrappers and its state; the file that they are of


def is_easycache(key: Any, functions: Sequence[Any]) -> bool:
    """Whether wrappers are ComfyUI's own of that node, none of another pack's by its name."""
    return key == _KEY and all(str(getattr(f, "__module__", "")).endswith(_MODULE) for f in functions)


def state_of(model_options: Mapping[str, Any]) -> Callable[[], None]:
    """A function that gives EasyCache back the state that it has now; does nothing where there is none."""
    holder = model_options.get("transformer_options", {}).get(_KEY)
    if holder is None:
        return lambda: None
    state = {name: _copied(value) for name, value in vars(holder).items()}

    def give_back() -> None:
        vars(holder).clear()
        vars(holder).update(state)

    return give_back


def _copied(value: Any) -> Any:
    """What it changes in place: collections, and single numbers that it sums up."""
    if isinstance(value, dict | list):
        return value.copy()
    return value.clone() if isinstance(value, Tensor) and not value.ndim else value
