"""Say which input of a node is wrong, where ComfyUI does not, and look at inputs before the run."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..engine.errors import QwenLowVRAMError


@contextmanager
def at_input(name: str) -> Iterator[None]:
    """Errors of ours raised within begin with the input's name: what fails in a run is shown at the node as a whole."""
    try:
        yield
    except QwenLowVRAMError as error:
        raise error.saying(f"{name}: {error}", input=name) from error


async def before_the_run(require: Callable[[str], object], choice: str | None) -> bool | str:
    """The answer of a VALIDATE_INPUTS: what `require` raises of the choice as text, or True. A linked input (None) is
    not known yet.

    In a thread: ComfyUI validates on the loop that serves all pages, which must not wait for a disk.
    """
    if choice is None:
        return True
    try:
        await asyncio.to_thread(require, choice)
    except QwenLowVRAMError as error:
        return str(error)
    return True
