"""Tell the page what a run does, and which prompt and node runs."""

import html
from collections.abc import Callable, Mapping
from typing import Any

from comfy_execution.utils import get_executing_context
from server import PromptServer

from ...engine.log import logger
from ...engine.texts import printable

EVENT = "qwen_lowvram.progress"


def executing_node_id() -> str | None:
    """The id of the node that runs in this thread; composite inside subgraphs, so never a number."""
    context = get_executing_context()
    return None if context is None else context.node_id


def executing_prompt_id() -> str | None:
    """The id of the prompt that this thread runs."""
    context = get_executing_context()
    return None if context is None else context.prompt_id


def send(event: str, data: dict[str, Any]) -> None:
    """Send to the page that queued the prompt; nothing where no server runs."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.send_sync(event, data, server.client_id)


def progress_sender() -> Callable[[Mapping[str, Any]], None]:
    """Sends a run's progress in the name of the node that runs now."""
    node = executing_node_id()
    return lambda progress: send(EVENT, {**progress, "node": node})


def tell(text: str) -> None:
    """Show a text on the node that runs; nowhere without a server. Keys and file names in it stay what they are: the
    page reads such texts as HTML, and what no encoding has would end the connection."""
    server, node = getattr(PromptServer, "instance", None), executing_node_id()
    if server is not None and node is not None:
        server.send_progress_text(html.escape(printable(text, lines=True), quote=False), node, server.client_id)


def warn(text: str) -> None:
    """Say it in the log, and show it on the node that runs."""
    logger.warning("%s", text)
    tell(text)
