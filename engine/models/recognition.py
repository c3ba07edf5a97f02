"""What kind of model a file is, by its tensors' names, and whether it is the one that is wanted. Touches no weight."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..errors import WrongModel
from ..files.checkpoint import Checkpoint, TensorEntry
from ..texts import shown
from .component import Component
from .foreign import UNKNOWN
from .prefixes import find_prefix, find_prefixes, is_average
from .table import COMPONENTS

_LANGUAGE_MODEL = re.compile(r"((?<![^.])(language_)?model\.)+$")  # the vision part stands beside it


def identify(tensors: Mapping[str, TensorEntry], table: Sequence[Component] = COMPONENTS) -> Component:
    """What kind of model these tensor names belong to."""
    telling = [(sign, kind) for kind in table for sign in kind.telling_signs]
    signs = [(sign, kind) for kind in table for sign in kind.signs]
    for sign, component in telling + signs:
        if _any_matches(sign, tensors):
            if component.otherwise and not _any_matches(component.needed_sign, tensors):
                return component.otherwise
            return component
    return UNKNOWN


def components(tensors: Mapping[str, TensorEntry], table: Sequence[Component] = COMPONENTS) -> set[Component]:
    """Which kinds of our models a file holds whole, by names that must be there: several in an all-in-one file."""
    return set(_roots(tensors, table))


def only(checkpoint: Checkpoint, component: Component, table: Sequence[Component] = COMPONENTS) -> Checkpoint:
    """Of an all-in-one file the tensors of one component, under the names that they have there; other files as they
    are."""
    roots = _roots(checkpoint.tensors, table)
    if component not in roots or len(roots) == 1:
        return checkpoint
    own = roots.pop(component)
    others = tuple(root for root in roots.values() if root.startswith(own) and root != own)
    return replace(
        checkpoint,
        tensors={n: e for n, e in checkpoint.tensors.items() if n.startswith(own) and not n.startswith(others)},
    )


def require(checkpoint: Checkpoint, wanted: Component, table: Sequence[Component] = COMPONENTS) -> None:
    """Raise WrongModel, saying what the file is and where it belongs, unless it is `wanted`, or holds it beside
    others."""
    found = identify(checkpoint.tensors, table)
    architecture = checkpoint.metadata.get("general.architecture")
    if found.otherwise and found.architectures and architecture not in (None, *found.architectures):
        found = found.otherwise
    if found is wanted or {found, wanted} <= components(checkpoint.tensors, table):
        _require_all_kinds(checkpoint, wanted)
        _require_one(checkpoint, wanted)
        return
    size = f"{len(checkpoint.tensors)} tensors"
    stated = size if architecture is None else f"GGUF architecture {architecture!r:.99}, {size}"
    belongs = f" It belongs in models/{found.folder}." if found.folder not in (None, wanted.folder) else ""
    raise WrongModel(
        "{file} is {found} ({stated}); {wanted} is needed here.{belongs}{hint} Choose a file from models/{folder}, "
        "such as {example}.",
        code="model.other_kind",
        file=checkpoint.path,
        found=found.value,
        stated=stated,
        wanted=wanted.value,
        belongs=belongs,
        hint=found.hint,
        folder=wanted.folder,
        example=wanted.example,
    )


def _any_matches(pattern: str, names: Mapping[str, TensorEntry]) -> bool:
    search = re.compile(pattern).search
    return any(search(name) for name in names)


def _roots(tensors: Mapping[str, TensorEntry], table: Sequence[Component]) -> dict[Component, str]:
    """What stands before all names of each component that a file holds: a text encoder's vision part too."""
    found = {component: find_prefix(tensors, component.whole) for component in table if component.whole}
    return {component: _LANGUAGE_MODEL.sub("", prefix) for component, prefix in found.items() if prefix is not None}


def _require_all_kinds(checkpoint: Checkpoint, wanted: Component) -> None:
    """Raise WrongModel for a file of some of a model's layers, such as its attention alone."""
    missing = [
        kind[0]
        for kind in wanted.kinds_of_layers
        if not any(part in name for name in checkpoint.tensors for part in kind)
    ]
    if missing:
        raise WrongModel(
            "{file} holds only part of {wanted} ({tensor_count} tensors; none is called {missing}), such as layers "
            "that were trained or saved separately. Use the whole model, such as {example}; changes to some layers "
            "belong in a LoRA.",
            code="model.part_of_one",
            file=checkpoint.path,
            wanted=wanted.value,
            tensor_count=len(checkpoint.tensors),
            missing=missing,
            example=wanted.example,
        )


def _require_one(checkpoint: Checkpoint, wanted: Component) -> None:
    """Raise WrongModel for a file of several, such as a teacher's and a student's; a running average (EMA) of one is no
    other."""
    prefixes = find_prefixes(checkpoint.tensors, wanted.whole) if wanted.several else []
    models = [prefix for prefix in prefixes if not is_average(prefix)]
    if len(models) > 1:
        raise WrongModel(
            "{file} holds {count} {several}, whose tensors' names begin with {prefixes}, and nothing says which one "
            "is meant. Use a file that holds one.",
            code="model.several_in_file",
            file=checkpoint.path,
            count=len(models),
            several=wanted.several,
            prefixes=" and ".join(shown(prefix) for prefix in models[:3]),
        )
