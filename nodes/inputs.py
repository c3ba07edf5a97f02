"""Say which input of a node is wrong, where ComfyUI does not."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..engine.errors import QwenLowVRAMError


@contextmanager
def at_input(name: str) -> Iterator[None]:
    """Errors of ours raised within begin with the input's name: what fails in a run is shown at the node as a whole."""
    try:
        yield
    except QwenLowVRAMError as error:
        raise type(error)(f"{name}: {error}") from error
