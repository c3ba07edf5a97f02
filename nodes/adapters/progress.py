"""Tell the page what a run does, or the log where no page listens; and which prompt and node runs."""

import html
import time
from collections.abc import Callable, Mapping
from typing import Any

import comfy.utils
from comfy.cli_args import LatentPreviewMethod, args
from comfy_execution.utils import get_executing_context
from server import PromptServer

from ...engine.log import logger
from ...engine.runs.phases import SECONDS_BETWEEN_EVENTS
from ...engine.runs.progress_lines import progress_line
from ...engine.runs.surroundings import Bar
from ...engine.texts import printable
from ...engine.told import Coded, Part, json_of, text_of

EVENT = "qwen_lowvram.progress"
TOLD = "qwen_lowvram.told"
SECONDS_BETWEEN_LINES = 10.0  # of a log that nobody asked for


def executing_node_id() -> str | None:
    """The id of the node that runs in this thread; composite inside subgraphs, so never a number."""
    context = get_executing_context()
    return None if context is None else context.node_id


def executing_prompt_id() -> str | None:
    """The id of the prompt that this thread runs."""
    context = get_executing_context()
    return None if context is None else context.prompt_id


def listens() -> bool:
    """Whether the page that queued the prompt is there; a program may have queued it, and pages of others are none of
    its."""
    server = getattr(PromptServer, "instance", None)
    return server is not None and server.client_id is not None and server.client_id in server.sockets


def send(event: str, data: dict[str, Any]) -> None:
    """Send to the page that queued the prompt; nothing where it does not listen."""
    if listens():
        server = PromptServer.instance
        server.send_sync(event, data, server.client_id)


def progress_sender() -> Callable[[Mapping[str, Any]], None]:
    """Sends a run's progress in the name of the node, the prompt and the graph that run now, and whether previews are
    on. Where no page listens, the log has it: the beginning and the end of each stage, and between them a line every
    SECONDS_BETWEEN_LINES."""
    node, prompt = executing_node_id(), executing_prompt_id()
    previews = args.preview_method is not LatentPreviewMethod.NoPreviews
    names = {"node": node, "prompt_id": prompt, "workflow_id": _workflow_id(prompt), "previews": previews}
    stage, last = "", 0.0

    def tell(progress: Mapping[str, Any]) -> None:
        nonlocal stage, last
        if listens():
            send(EVENT, {**progress, **names})
            return
        now = time.perf_counter()
        ends = 0 < progress.get("total", 0) == progress.get("done")
        if node is not None and (progress["stage"] != stage or ends or now - last >= SECONDS_BETWEEN_LINES):
            stage, last = progress["stage"], now
            logger.info("%s", progress_line(progress))

    return tell


def node_bar() -> Bar:
    """ComfyUI's bar on the node that runs. A bar of theirs moves by half a percent at least, which is many blocks of a
    long run; the first move of each is shown at once."""
    last = 0.0

    def move(done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if not done or done >= total or now - last >= SECONDS_BETWEEN_EVENTS:
            last = now
            comfy.utils.ProgressBar(total).update_absolute(done, total)

    return move


def tell(*parts: Part) -> None:
    """Show a text on the node that runs; nowhere without a server. Keys and file names in it stay what they are: the
    page reads such texts as HTML, and what no encoding has would end the connection. ComfyUI shows it in English; our
    own script then tells it in the page's language."""
    server, node = getattr(PromptServer, "instance", None), executing_node_id()
    if server is None or node is None:
        return
    text = printable(text_of(parts), lines=True)
    server.send_progress_text(html.escape(text, quote=False), node, server.client_id)
    if any(isinstance(part, Coded) for part in parts):
        prompt = executing_prompt_id()
        names = {"node": node, "prompt_id": prompt, "workflow_id": _workflow_id(prompt)}
        send(TOLD, {"parts": json_of(parts), **names})


def warn(*parts: Part) -> None:
    """Say it in the log, and show it on the node that runs."""
    logger.warning("%s", text_of(parts))
    tell(*parts)


def _workflow_id(prompt_id: str | None) -> str | None:
    """What the page calls the graph that the prompt was made of; None where a program queued it."""
    queue = getattr(getattr(PromptServer, "instance", None), "prompt_queue", None)
    running = [] if queue is None else queue.get_current_queue_volatile()[0]
    extra = next((item[3] for item in running if item[1] == prompt_id), None)
    for name in ("extra_pnginfo", "workflow", "id"):
        extra = extra.get(name) if isinstance(extra, dict) else None
    return extra if isinstance(extra, str) else None
