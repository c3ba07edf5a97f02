"""The real page in a real browser, driven from Python: `open_page(settings)` gives one, closed with its module."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from devtools.browser import PageTools, find_page_tools
from devtools.cache import cache_folder
from devtools.comfyui import comfyui_version
from devtools.environment import venv_folder
from devtools.page import Page
from devtools.server import ComfyServer


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
