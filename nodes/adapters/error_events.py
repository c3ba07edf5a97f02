"""Send errors with their codes and values to the page: ComfyUI's own message of them has the English text only."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ...engine.errors import QwenLowVRAMError
from .progress import executing_node_id, executing_prompt_id, send

EVENT = "qwen_lowvram.error"
_WATCHED: ContextVar[bool] = ContextVar("_WATCHED", default=False)


@contextmanager
def errors_sent() -> Iterator[None]:
    """Errors of ours that leave it are sent to the page that queued the prompt, by the outermost of several: what is
    caught on the way out is no error to a person, and what is said in other words is sent in these.

    The event comes before ComfyUI's execution_error, and alone where another node catches what was raised.
    """
    if _WATCHED.get():
        yield
        return
    before = _WATCHED.set(True)
    try:
        yield
    except QwenLowVRAMError as error:
        node = executing_node_id()
        if node is not None:
            send(EVENT, {"prompt_id": executing_prompt_id(), "node": node, **error.as_dict()})
        raise
    finally:
        _WATCHED.reset(before)
