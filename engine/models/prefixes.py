"""Where in a file a component lies: the prefix before its tensors' names. Renames; reads no file.

A prefix is found by the names that must be there, not by a list of prefixes: trainers and programs make up new ones,
and a file that holds a transformer, a text encoder and a VAE has one for each.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

_T = TypeVar("_T")
# running averages that trainers save beside the model: ema., model_ema., generator_ema.
_AVERAGE = re.compile(r"(?<![a-z])ema(?![a-z])", re.I)


def find_prefix(names: Iterable[str], anchors: Sequence[Sequence[str]]) -> str | None:
    """The text before a component's names, empty where they stand bare; None where none has all of its anchors.

    `anchors`: alternatives, each a list of names that must be there together. Of several prefixes the shortest counts,
    a running average's (EMA) after those of the model itself.
    """
    return next(iter(find_prefixes(names, anchors)), None)


def find_prefixes(names: Iterable[str], anchors: Sequence[Sequence[str]]) -> list[str]:
    """All such texts, the one that counts first."""
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
            return sorted(whole, key=lambda prefix: (is_average(prefix), len(prefix), prefix))
    return []


def is_average(prefix: str) -> bool:
    """Whether a running average of a model stands under this prefix, by its name."""
    return _AVERAGE.search(prefix) is not None


def under_prefix(tensors: Mapping[str, _T], prefix: str) -> dict[str, _T]:
    """What stands under the prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
