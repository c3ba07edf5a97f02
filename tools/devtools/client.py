"""Speak ComfyUI's HTTP API: queue a prompt, follow its events to the end, collect what it made."""

import asyncio
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Prompt = Mapping[str, Mapping[str, Any]]
Event = tuple[str, dict[str, Any]]
IDLE_SECONDS = 1.5  # after which a server without prompts has looked at its flags


class PromptRefused(Exception):
    """The server's validation turned the prompt down; `node_errors` is its answer, node by node."""

    def __init__(self, answer: Mapping[str, Any]) -> None:
        self.node_errors: Mapping[str, Any] = answer.get("node_errors") or {}
        error = answer.get("error") or {}
        lines = [f"{error.get('message', answer)} {error.get('details', '')}".strip()]
        for node_id, node in self.node_errors.items():
            for problem in node["errors"]:
                lines.append(f"{node['class_type']} (node {node_id}): {problem['message']}: {problem['details']}")
        super().__init__("\n".join(lines))


class ExecutionFailed(Exception):
    """A node raised. `message` is what it said, `exception_type` its class."""

    def __init__(self, event: Mapping[str, Any]) -> None:
        self.node_id = str(event.get("node_id"))
        self.node_type = str(event.get("node_type"))
        self.exception_type = str(event.get("exception_type"))
        self.message = str(event.get("exception_message")).strip()
        self.traceback = "".join(event.get("traceback") or ())
        super().__init__(f"{self.node_type} (node {self.node_id}): {self.exception_type}: {self.message}")


class RunInterrupted(Exception):
    """Somebody stopped the run."""


@dataclass(frozen=True)
class Run:
    """What one prompt left behind."""

    prompt_id: str
    seconds: float
    outputs: Mapping[str, Mapping[str, list[Any]]]  # node id -> ui key -> list
    events: tuple[Event, ...] = field(repr=False)
    previews: tuple[bytes, ...] = field(repr=False)

    def images(self) -> list[dict[str, str]]:
        """The saved images: filename, subfolder, type."""
        return [image for output in self.outputs.values() for image in output.get("images", ())]

    def ui(self, key: str) -> list[Any]:
        """Everything that nodes returned under one ui key."""
        return [entry for output in self.outputs.values() for entry in output.get(key, ())]

    def executed(self) -> set[str]:
        """Ids of the nodes that really ran: not those answered from the server's cache."""
        return {str(data["node"]) for kind, data in self.events if kind == "executing" and data.get("node")}


class ComfyClient:
    """A client of one server, with an id of its own."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.client_id = uuid.uuid4().hex

    def get(self, path: str, **query: str) -> Any:
        return json.loads(self.get_bytes(path, **query))

    def get_bytes(self, path: str, **query: str) -> bytes:
        suffix = f"?{urllib.parse.urlencode(query)}" if query else ""
        with urllib.request.urlopen(f"{self.url}{path}{suffix}", timeout=60) as answer:
            return bytes(answer.read())

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            f"{self.url}{path}", json.dumps(body or {}).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def object_info(self) -> dict[str, Any]:
        info: dict[str, Any] = self.get("/object_info")
        return info

    def queue(self, prompt: Prompt) -> str:
        """Queue without waiting. Raises PromptRefused."""
        try:
            answer = self.post("/prompt", {"prompt": prompt, "client_id": self.client_id})
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            raise PromptRefused(json.loads(error.read())) from None
        return str(answer["prompt_id"])

    def interrupt(self) -> None:
        self.post("/interrupt")

    def free(self, *, unload_models: bool = True, free_memory: bool = True) -> None:
        self.post("/free", {"unload_models": unload_models, "free_memory": free_memory})
        time.sleep(IDLE_SECONDS)  # it is done when the server is idle; a prompt queued at once would go first

    def image(self, image: Mapping[str, str]) -> bytes:
        """The bytes of an entry of `Run.images`."""
        return self.get_bytes("/view", **image)

    def run(
        self,
        prompt: Prompt,
        *,
        on_event: Callable[[str, dict[str, Any]], None] = lambda kind, data: None,
        timeout_seconds: float = 600,
    ) -> Run:
        """Queue, follow the websocket to the end and return what the history holds.

        `on_event` sees every message (type, data) and may call `interrupt`.
        Raises PromptRefused, ExecutionFailed, RunInterrupted, ConnectionError or TimeoutError.
        """
        start = time.monotonic()
        try:
            prompt_id, events, previews = asyncio.run(asyncio.wait_for(self._follow(prompt, on_event), timeout_seconds))
        except asyncio.TimeoutError:  # not the builtin one before Python 3.11
            raise TimeoutError(f"The run took longer than {timeout_seconds} s.") from None
        for kind, data in events:
            if kind == "execution_error":
                raise ExecutionFailed(data)
            if kind == "execution_interrupted":
                raise RunInterrupted(f"Interrupted in {data.get('node_type')} (node {data.get('node_id')}).")
        outputs = self.get(f"/history/{prompt_id}")[prompt_id]["outputs"]
        return Run(prompt_id, time.monotonic() - start, outputs, tuple(events), tuple(previews))

    async def _follow(
        self, prompt: Prompt, on_event: Callable[[str, dict[str, Any]], None]
    ) -> tuple[str, list[Event], list[bytes]]:
        import aiohttp

        events: list[Event] = []
        previews: list[bytes] = []
        address = f"{self.url}/ws?clientId={self.client_id}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
            prompt_id = self.queue(prompt)
            async for message in socket:
                if message.type is aiohttp.WSMsgType.BINARY:
                    previews.append(message.data)
                    continue
                if message.type is not aiohttp.WSMsgType.TEXT:
                    break
                body = json.loads(message.data)
                kind, data = body["type"], body.get("data") or {}
                if data.get("prompt_id", prompt_id) != prompt_id:
                    continue
                events.append((kind, data))
                on_event(kind, data)
                if kind == "executing" and data.get("node") is None:  # sent after the history is written
                    return prompt_id, events, previews
        raise ConnectionError("The server closed the connection before the run ended. Its log says why.")
