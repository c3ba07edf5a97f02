"""The real page in a real browser, driven from Python. Needs a running server, and what `browser.py` set up."""

import json
import os
import re
import subprocess
import threading
from pathlib import Path
from typing import Any

from .browser import PageTools
from .cache import REPOSITORY

DRIVER = REPOSITORY / "tests" / "page" / "driver.mjs"
SCREENSHOTS = REPOSITORY / ".pytest_cache" / "screenshots"
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

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

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

    def forget_messages(self) -> None:
        """Those until now are not told again."""
        self._ask("forget")

    def console(self) -> list[str]:
        """Every warning and error so far that is not forgotten, as "kind text url"."""
        return [f"{m['kind']} {m['text']} {m['url']}" for m in self._ask("messages")]

    def unexpected_messages(self) -> list[str]:
        """Warnings and errors that ComfyUI's page does not give by itself."""
        return [line for line in self.console() if not any(re.search(noise, line) for noise in EXPECTED_NOISE)]

    def close(self) -> None:
        """An open page draws all the time, which slows down all others. May be called twice."""
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
