"""Clearing the cache folder from the page or a program: a request, so that no graph holds it and does it again.

POST /qwen_lowvram/clear {"clear": "unused" | "all" | "prompts"}  ->  {"text": the list, and what was removed}
"""

import asyncio
import json
from typing import Any

from aiohttp import web
from server import PromptServer

from .cache_folder import weight_cache_folder
from .cache_report import CLEARABLE, cleared
from .weight_cache import prompt_cache

PATH = "/qwen_lowvram/clear"
_LONGEST_BODY = 1000


def register() -> None:
    """Once, while ComfyUI loads the pack; nothing where no server runs. ComfyUI refuses requests of other sites."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.routes.post(PATH)(clear)


async def clear(request: web.Request) -> web.Response:
    """The folder is ComfyUI's own: nothing of the request is ever a path. Forms of other pages cannot send JSON."""
    if request.content_type != "application/json":
        return _refused(415, "Send JSON, with the header Content-Type: application/json.")
    what = _wanted(await _body(request))
    if what is None:
        return _refused(400, f'Send {{"clear": X}}, with X one of: {", ".join(CLEARABLE)}.')
    loop = asyncio.get_running_loop()
    text = await loop.run_in_executor(None, cleared, weight_cache_folder(), prompt_cache(), what)
    return web.json_response({"text": text})


async def _body(request: web.Request) -> bytes:
    """In however many pieces it comes; cut off where it is longer than any that is answered."""
    body = b""
    async for piece in request.content.iter_any():
        body += piece
        if len(body) > _LONGEST_BODY:
            break
    return body


def _wanted(body: bytes) -> str | None:
    try:
        given: Any = json.loads(body) if len(body) <= _LONGEST_BODY else None
    except (ValueError, RecursionError):
        return None
    what = given.get("clear") if isinstance(given, dict) else None
    return what if isinstance(what, str) and what in CLEARABLE else None


def _refused(status: int, words: str) -> web.Response:
    return web.json_response({"error": words}, status=status)
