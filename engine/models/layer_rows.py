"""Layers that some files hold joined and others apart: which rows of a file's weights a layer's other name stands for.
Names and shapes in; holds no weight."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rows:
    """`start` to `stop` of the weight of that name."""

    weight: str
    start: int
    stop: int


# a weight's name that a file does not have -> the rows that are its, one after another
OtherNames = Mapping[str, tuple[Rows, ...]]
NO_OTHER_NAMES: OtherNames = {}


def other_names(weights: Mapping[str, Shape], joined: Mapping[str, Sequence[str]]) -> dict[str, tuple[Rows, ...]]:
    """`weights`: of a file, by their names in the whole model. `joined`: the end of a layer's name -> the ends of those
    whose rows it holds, one after another, as many of each."""
    found: dict[str, tuple[Rows, ...]] = {}
    for whole, parts in joined.items():
        for name, shape in weights.items():
            if name.endswith(f".{whole}.weight"):
                before, each = name.removesuffix(f"{whole}.weight"), shape[0] // len(parts)
                for i, part in enumerate(parts):
                    found[f"{before}{part}.weight"] = (Rows(name, i * each, (i + 1) * each),)
            elif name.endswith(f".{parts[0]}.weight"):
                before = name.removesuffix(f"{parts[0]}.weight")
                own = [f"{before}{part}.weight" for part in parts]
                if weights.keys() >= set(own):
                    found[f"{before}{whole}.weight"] = tuple(Rows(one, 0, weights[one][0]) for one in own)
    return found


def shapes_by_any_name(weights: Mapping[str, Shape], others: OtherNames) -> dict[str, Shape]:
    """Of the file's weights, and of those that it has by other names."""
    shapes = {
        name: (sum(part.stop - part.start for part in rows), *weights[rows[0].weight][1:])
        for name, rows in others.items()
    }
    return {**weights, **shapes}
