"""What kinds of models files hold: the type of the entries in the table by which they are told. Holds no entry."""

from dataclasses import dataclass
from typing import Optional


@dataclass(frozen=True, eq=False)
class Component:
    """One kind of model, by the names of its tensors.

    value: worded for messages. folder: of ComfyUI's models folder that it belongs in, None where nothing says.
    hint: what a person cannot see there. example: a published file. signs: patterns, of which one matches any name;
    telling_signs: those that decide before all other kinds' signs. needed_sign: a pattern that a name has to match as
    well; without one, or with another GGUF architecture than `architectures`, the file is `otherwise`. anchors: names
    by which its prefix is found, alternatives, the fullest first; whole: those of them that a whole one has.
    kinds_of_layers: of each tuple one name is in every whole file. several: what more than one of them in a file are
    called, empty where several may be there.
    """

    value: str
    folder: str | None = None
    hint: str = ""
    example: str = ""
    signs: tuple[str, ...] = ()
    telling_signs: tuple[str, ...] = ()
    needed_sign: str = ""
    architectures: tuple[str, ...] = ()
    otherwise: Optional["Component"] = None
    anchors: tuple[tuple[str, ...], ...] = ()
    whole: tuple[tuple[str, ...], ...] = ()
    kinds_of_layers: tuple[tuple[str, ...], ...] = ()
    several: str = ""

    def __repr__(self) -> str:
        return f"<{self.value}>"
