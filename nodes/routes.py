"""What the page asks for outside of a run. ComfyUI refuses requests of other sites.

POST /qwen_lowvram/clear {"clear": "unused" | "all" | "prompts"}  ->  {"text": the list, and what was removed, "parts":
the same, to be told in another language}: a request, so that no graph holds it and does it again.
POST /qwen_lowvram/plan {"prompt": what the page would send to /prompt}  ->  {"lines": [PlanLine, ...]}
POST /qwen_lowvram/models {"prompt": the same}  ->  {"files": [FileCheck, ...], "download": Download or null}
POST /qwen_lowvram/families {"files": [[folder, name], ...]}  ->  {"families": [key, ...]}, as family_of_file has them
POST /qwen_lowvram/download {"folder": X, "name": Y, "source": "hub" | "mirror"}  ->  {"download": Download}: a file of
the pack's own list, to its place; what is here and whole is never replaced. {"stop": true} stops it.
"""

import asyncio
import json
from dataclasses import asdict
from typing import Any

from aiohttp import web
from server import PromptServer

from ..engine.errors import InvalidRequest
from ..engine.files.known_files import known
from ..engine.told import json_of, text_of
from .cache_folder import weight_cache_folder
from .cache_report import CLEARABLE, cleared
from .live_plan import lines_of
from .model_check import HERE, checks_of, download_folder, family_of_file, state_of
from .model_downloads import Downloads
from .weight_cache import prompt_cache

CLEAR, PLAN = "/qwen_lowvram/clear", "/qwen_lowvram/plan"
MODELS, DOWNLOAD = "/qwen_lowvram/models", "/qwen_lowvram/download"
FAMILIES = "/qwen_lowvram/families"
_LONGEST_CLEAR, _LONGEST_PROMPT, _MOST_FILES = 1000, 4_000_000, 1000


def register() -> None:
    """Once, while ComfyUI loads the pack; nothing where no server runs."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.routes.post(CLEAR)(clear)
        server.routes.post(PLAN)(plan)
        server.routes.post(FAMILIES)(families)
        models = _Models(Downloads(server.send_sync))
        server.routes.post(MODELS)(models.check)
        server.routes.post(DOWNLOAD)(models.download)


async def clear(request: web.Request) -> web.Response:
    """The folder is ComfyUI's own: nothing of the request is ever a path."""
    given = await _given(request, _LONGEST_CLEAR)
    if isinstance(given, web.Response):
        return given
    what = given.get("clear")
    if not isinstance(what, str) or what not in CLEARABLE:
        return _refused(400, f'Send {{"clear": X}}, with X one of: {", ".join(CLEARABLE)}.')
    parts = await asyncio.to_thread(cleared, weight_cache_folder(), prompt_cache(), what)
    return web.json_response({"text": text_of(parts), "parts": json_of(parts)})


async def plan(request: web.Request) -> web.Response:
    """Headers are read in a thread: this loop serves all pages."""
    prompt = await _prompt(request)
    if isinstance(prompt, web.Response):
        return prompt
    lines = await asyncio.to_thread(lines_of, prompt)
    return web.json_response({"lines": [asdict(line) for line in lines]})


async def families(request: web.Request) -> web.Response:
    """Of files by their headers; names that are not in ComfyUI's folders reach nothing."""
    given = await _given(request, _LONGEST_PROMPT)
    if isinstance(given, web.Response):
        return given
    files = given.get("files")
    if not isinstance(files, list) or len(files) > _MOST_FILES or not all(map(_is_file, files)):
        return _refused(400, f'Send {{"files": [[folder, name], ...]}}, at most {_MOST_FILES} of them.')
    found = await asyncio.to_thread(lambda: [family_of_file(folder, name) for folder, name in files])
    return web.json_response({"families": found})


def _is_file(given: object) -> bool:
    return isinstance(given, list) and len(given) == 2 and all(isinstance(each, str) for each in given)


class _Models:
    """The files that graphs need, and the one download."""

    def __init__(self, downloads: Downloads) -> None:
        self._downloads = downloads

    async def check(self, request: web.Request) -> web.Response:
        """Headers are read in a thread: this loop serves all pages."""
        prompt = await _prompt(request)
        if isinstance(prompt, web.Response):
            return prompt
        files = await asyncio.to_thread(checks_of, prompt)
        return web.json_response({"files": [asdict(file) for file in files], "download": self._downloads.now})

    async def download(self, request: web.Request) -> web.Response:
        """Nothing of the request is ever a path or an address: it names an entry of the list."""
        given = await _given(request, _LONGEST_CLEAR)
        if isinstance(given, web.Response):
            return given
        if given.get("stop") is True:
            self._downloads.stop()
            return web.json_response({"download": self._downloads.now})
        folder, name, source = (given.get(key) for key in ("folder", "name", "source"))
        wanted = known(folder, name) if isinstance(folder, str) and isinstance(name, str) else None
        if wanted is None or wanted.name != name or source not in ("hub", "mirror"):
            return _refused(400, 'Send {"folder", "name", "source": "hub" or "mirror"} of a file that the pack knows.')
        if await asyncio.to_thread(state_of, wanted) == HERE:
            return _refused(409, f"{wanted.name} is in models/{wanted.folder} already.")
        try:
            self._downloads.start(wanted, download_folder(wanted), source)
        except InvalidRequest as error:
            return _refused(409, str(error), values=error.as_dict())
        return web.json_response({"download": self._downloads.now})


async def _prompt(request: web.Request) -> dict[str, Any] | web.Response:
    given = await _given(request, _LONGEST_PROMPT)
    if isinstance(given, web.Response):
        return given
    prompt = given.get("prompt")
    if not isinstance(prompt, dict) or not all(isinstance(node, dict) for node in prompt.values()):
        return _refused(
            400, 'Send {"prompt": X}, with X as /prompt takes it: {node id: {"class_type": ..., "inputs": ...}}.'
        )
    return prompt


async def _given(request: web.Request, longest: int) -> dict[str, Any] | web.Response:
    """The JSON that was sent, or the refusal of what is none. Forms of other pages cannot send JSON."""
    if request.content_type != "application/json":
        return _refused(415, "Send JSON, with the header Content-Type: application/json.")
    body = b""
    async for piece in request.content.iter_any():
        body += piece
        if len(body) > longest:
            return _refused(413, f"Send no more than {longest} bytes.")
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        given = None
    return given if isinstance(given, dict) else _refused(400, "Send a JSON object.")


def _refused(status: int, words: str, **more: Any) -> web.Response:
    return web.json_response({"error": words, **more}, status=status)
