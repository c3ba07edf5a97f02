"""The real page in a real browser, driven from Python: `open_page(settings)` gives one, closed with its module."""

import json
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from devtools.browser import PageTools, find_page_tools
from devtools.cache import cache_folder
from devtools.comfyui import comfyui_version
from devtools.environment import venv_folder
from devtools.server import ComfyServer

DRIVER = Path(__file__).with_name("driver.mjs")
SCREENSHOTS = Path(__file__).resolve().parents[2] / ".pytest_cache" / "screenshots"
# no template dialog, no restored tabs
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Workflow.Persist": False}

# What ComfyUI's own page says on every start, by pattern of "kind text url". Anything else is an error of ours.
EXPECTED_NOISE = [
    r"Failed to load resource.* 404 .*(/user\.css|/api/userdata)",
    r"Failed to load resource: net::ERR_FAILED https://",  # hosts that the driver cuts off
    r"ComfyApp graph accessed before initialization",
    r"(getExtraMenuOptions|getCanvasMenuOptions|legacy|Legacy).*menu",
    r"MaskEditor",
]


class PageError(AssertionError):
    """The page or the browser failed; the message is the browser's."""


class Page:
    """One open page. Requests go to driver.mjs, one at a time."""

    def __init__(self, tools: PageTools, url: str, settings: dict[str, Any], viewport: dict[str, int]) -> None:
        options = {
            "url": url,
            "modules": str(tools.modules),
            "executable": tools.browser.executable,
            "arguments": tools.browser.arguments,
            "settings": SETTINGS | settings,
            "viewport": viewport,
        }
        self._process = subprocess.Popen(
            [tools.node, DRIVER, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | dict(tools.browser.environment),
            encoding="utf-8",
        )

    def open(self) -> None:
        """Go to the page and wait until it has loaded its first graph."""
        self._ask("open")

    def load(self, workflow: dict[str, Any], name: str = "test") -> None:
        """Open a UI graph as a person does from a file."""
        self._ask("load", workflow=workflow, name=name)

    def prompt(self) -> dict[str, Any]:
        """The prompt that the page would send for its graph."""
        return self._ask("prompt")

    def serialize(self) -> dict[str, Any]:
        """The graph as the page saves it."""
        return self._ask("serialize")

    def run(self, timeout_seconds: float = 120) -> dict[str, Any]:
        """Press Run and wait for the end: {"status": success | error | interrupted | refused, "detail": ...}."""
        return self._ask("run", timeout_seconds + 30, timeout=timeout_seconds * 1000)

    def evaluate(self, function: str, argument: Any = None) -> Any:
        """Call a JavaScript function in the page with one argument: `page.evaluate("(x) => x + 1", 1)`."""
        return self._ask("evaluate", code=function, argument=argument)

    def screenshot(self, name: str) -> Path:
        """Keep what the page looks like as .pytest_cache/screenshots/<name>.png."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self._ask("screenshot", file=str(SCREENSHOTS / f"{name}.png"))
        return SCREENSHOTS / f"{name}.png"

    def console(self) -> list[str]:
        """Every warning and error so far, as "kind text url"."""
        return [f"{m['kind']} {m['text']} {m['url']}" for m in self._ask("messages")]

    def unexpected_messages(self) -> list[str]:
        """Warnings and errors that ComfyUI's page does not give by itself."""
        return [line for line in self.console() if not any(re.search(noise, line) for noise in EXPECTED_NOISE)]

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()  # the driver then closes its browser
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _ask(self, action: str, timeout_seconds: float = 180, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        guard = threading.Timer(timeout_seconds, self._process.kill)
        guard.start()
        try:
            self._process.stdin.write(json.dumps({"action": action, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            guard.cancel()
        if not line:
            assert self._process.stderr is not None
            raise PageError(f"The browser ended during {action!r}:\n{self._process.stderr.read()[-3000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise PageError(f"{action}: {answer['error']}")
        return answer["result"]


@pytest.fixture(scope="session")
def page_tools(comfyui_path: Path) -> PageTools:
    """Node, playwright-core and a browser, as `python dev.py test` set them up."""
    cache = cache_folder()
    tools = find_page_tools(cache, venv_folder(cache, comfyui_version(comfyui_path)))
    if tools is None:
        pytest.fail(
            "There is no browser for the page tests yet. Run `python dev.py test` once: it finds or fetches one."
        )
    return tools


@pytest.fixture(scope="module")
def open_page(page_tools: PageTools, comfy_server: ComfyServer) -> Iterator[Callable[..., Page]]:
    """Open the page of the session's server: `open_page()`, or with settings: `open_page({"Comfy.Locale": "zh"})`."""
    with ExitStack() as pages:

        def open_one(
            settings: dict[str, Any] | None = None,
            *,
            server: ComfyServer = comfy_server,
            viewport: tuple[int, int] = (1600, 900),
        ) -> Page:
            size = {"width": viewport[0], "height": viewport[1]}
            page = Page(page_tools, server.url, settings or {}, size)
            pages.callback(page.close)
            page.open()
            return page

        yield open_one


@pytest.fixture(scope="module")
def page(open_page: Callable[..., Page]) -> Page:
    """One page with the default settings for a whole test module."""
    return open_page()
