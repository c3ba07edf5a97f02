"""Whether the installed packages are ones that the pack runs with. Reads their metadata; imports none of them."""

import os
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

PACK = "ComfyUI-QwenImage-LowVRAM"


@dataclass(frozen=True)
class Bounds:
    """What runs: from `oldest` on, and before `beyond`, of which nothing is known yet. `install_below`: what is
    installed where nothing else is asked for; a later one may move packages that ComfyUI needs as they are."""

    name: str
    oldest: str
    beyond: str | None = None
    install_below: str | None = None

    @property
    def said(self) -> str:
        return f"{self.name} >= {self.oldest}" + (f", < {self.beyond}" if self.beyond else "")

    @property
    def to_install(self) -> str:
        """For pip."""
        below = self.install_below or self.beyond
        return f"{self.name}>={self.oldest}" + (f",<{below}" if below else "")


# torch.accelerator came with torch 2.6
PACKAGES = (
    Bounds("torch", "2.6", "3"),
    Bounds("transformers", "4.57", "6"),
    Bounds("diffusers", "0.37", "1", install_below="0.40"),  # as in requirements.txt: later ones move huggingface_hub
    Bounds("accelerate", "1.0", "2"),
    Bounds("safetensors", "0.4.3", "1"),
)
COMFYUI = Bounds("ComfyUI", "0.30.0")
# ComfyUI's owner has chosen their torch, and other packs may rely on it
_NOT_BY_PIP = ("torch", "ComfyUI")


def pip_name(package: str) -> str:
    """What pip is to install for that package, with its bounds where the pack has some."""
    return next((f'"{bounds.to_install}"' for bounds in PACKAGES if bounds.name == package), package)


def variable(name: str) -> str:
    """What the environment says; empty where it says nothing."""
    unset = f"${name}"
    said = os.path.expandvars(unset)
    return "" if said == unset else said


def environment_problem(comfyui_version: str, installed: Callable[[str], str] = version) -> str | None:
    """One line that says what is missing, too old or too new, and what to do; None where all is well.

    `installed` gives a package's version and raises PackageNotFoundError.
    """
    wrong: list[str] = []
    by_pip: list[Bounds] = []
    by_hand: list[Bounds] = []
    for bounds in (COMFYUI, *PACKAGES):
        try:
            found = (comfyui_version if bounds is COMFYUI else installed(bounds.name)) or ""  # damaged metadata: None
        except (PackageNotFoundError, KeyError):  # of metadata without a version
            found = ""
        state = _judge(found, bounds)
        if state is not None:
            wrong.append(f"{bounds.name} {found} {state}".replace("  ", " "))
            (by_hand if bounds.name in _NOT_BY_PIP else by_pip).append(bounds)
    if not wrong:
        return None
    steps = []
    if by_pip:
        wanted = " ".join(f'"{bounds.to_install}"' for bounds in by_pip)
        steps.append(f"run  python -m pip install {wanted}  with ComfyUI's Python")
    steps += [f"install {bounds.said}" for bounds in by_hand]
    return f"{PACK} is not loaded: {'; '.join(wrong)}. What to do: {', and '.join(steps)}, then restart ComfyUI."


def is_of_others(error: Exception, pack: str) -> bool:
    """Whether an import failed over what another package lacks or does; else it is a mistake of the pack's own.

    `pack` is the name that the pack was imported by.
    """
    if isinstance(error, ImportError):
        place: object = error.name
    elif isinstance(error, AttributeError) and error.obj is not None:
        place = getattr(error.obj, "__module__", None) or getattr(error.obj, "__name__", None)
    else:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        place = frames[-1].f_globals.get("__name__") if frames else None
    return not f"{place}.".startswith(f"{pack}.")


def import_problem(error: Exception, comfyui_version: str, installed: Callable[[str], str] = version) -> str:
    """One line for an import that failed although every version is within its bounds."""
    found = [f"ComfyUI {comfyui_version}"]
    for bounds in PACKAGES:
        try:
            found.append(f"{bounds.name} {installed(bounds.name)}")
        except (PackageNotFoundError, KeyError):
            continue
    reason = " ".join(str(error).split()) or type(error).__name__
    return (
        f"{PACK} is not loaded, because these versions do not fit together: {', '.join(found)} ({reason}). "
        "What to do: update the pack, run  python -m pip install -r requirements.txt  in its folder with ComfyUI's "
        "Python, then restart ComfyUI."
    )


def _judge(found: str, bounds: Bounds) -> str | None:
    release = _release(found)
    if not found:
        return f"is not installed ({bounds.said} is needed)"
    if release and release < _release(bounds.oldest):
        return f"is too old ({bounds.said} is needed)"
    if release and bounds.beyond and release >= _release(bounds.beyond):
        return f"is too new ({bounds.said} is needed)"
    return None


def _release(text: str) -> tuple[int, ...]:
    """The numbers that a version begins with: "2.14.1+cu130" -> (2, 14, 1), "2.6" -> (2, 6, 0). Empty where it begins
    with none."""
    match = re.match(r"v?(\d+(?:\.\d+)*)", text)
    numbers = [int(part) for part in match[1].split(".")] if match else []
    return tuple(numbers + [0] * (3 - len(numbers))) if numbers else ()
