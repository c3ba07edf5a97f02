"""Where in a file a component lies: the prefix before its tensors' names. Renames; reads no file.

A prefix is found by the names that must be there, not by a list of prefixes: trainers and programs make up new ones,
and a file that holds a transformer, a text encoder and a VAE has one for each.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

_T = TypeVar("_T")


def find_prefix(names: Iterable[str], anchors: Sequence[Sequence[str]]) -> str | None:
    """The text before a component's names, empty where they stand bare; None where none has all of its anchors.

    `anchors`: alternatives, each a list of names that must be there together. Of several prefixes the shortest counts.
    """
    known = set(names)
    for wanted in anchors:
        first, *others = wanted
        prefixes = (name.removesuffix(first) for name in known if name.endswith(first))
        whole = [
            prefix
            for prefix in prefixes
            if (not prefix or prefix.endswith(".")) and all(prefix + other in known for other in others)
        ]
        if whole:
            return min(whole, key=lambda prefix: (len(prefix), prefix))
    return None


def under_prefix(tensors: Mapping[str, _T], prefix: str) -> dict[str, _T]:
    """What stands under the prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
