"""The real page in a real browser, driven from Python.

A page takes 10 to 20 seconds to open. `page` is one that tests of all modules share, as `PAGES` has it; tests say which
with `in_both_renderers` or `in_chinese`. `open_page(settings)` gives another one, closed with its module.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from devtools.browser import PageTools, find_page_tools
from devtools.cache import cache_folder
from devtools.client import ComfyClient
from devtools.comfyui import comfyui_version
from devtools.environment import venv_folder
from devtools.page import Page
from devtools.server import ComfyServer

_LAST = pytest.StashKey[bool]()  # of the test after which no page is needed
HINT = "qwenLowVRAM.PreviewHintShown"  # a test asks for it by itself
_DEFAULTS = {"Comfy.VueNodes.Enabled": False, "Comfy.Locale": "en", HINT: True}
PAGES: dict[str, dict[str, Any]] = {
    "classic-nodes": _DEFAULTS,
    "vue-nodes": _DEFAULTS | {"Comfy.VueNodes.Enabled": True},
    "chinese": _DEFAULTS | {"Comfy.VueNodes.Enabled": True, "Comfy.Locale": "zh"},
    "chinese-classic": _DEFAULTS | {"Comfy.Locale": "zh"},
}
in_both_renderers = pytest.mark.parametrize("shown_in", ["classic-nodes", "vue-nodes"], indirect=True)
in_chinese = pytest.mark.parametrize("shown_in", ["chinese"], indirect=True)
in_chinese_in_both_renderers = pytest.mark.parametrize("shown_in", ["chinese", "chinese-classic"], indirect=True)
in_every_page = pytest.mark.parametrize("shown_in", PAGES, indirect=True)
in_both_languages = pytest.mark.parametrize("shown_in", ["classic-nodes", "chinese"], indirect=True)


@pytest.hookimpl(trylast=True)  # when pytest has put them in its order
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of a page run after each other: it is opened once, and draws while no other does."""

    def page_of(item: pytest.Item) -> int:
        shown_in = getattr(item, "callspec", None) and item.callspec.params.get("shown_in")  # type: ignore[attr-defined]
        return list(PAGES).index(shown_in) if shown_in in PAGES else -1

    here = [number for number, item in enumerate(items) if item.path.parent == Path(__file__).parent]
    in_order = sorted((items[number] for number in here), key=page_of)
    for number, item in zip(here, in_order, strict=True):
        items[number] = item
    if in_order:
        in_order[-1].stash[_LAST] = True


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
            page = opened(page_tools, server, settings or {}, viewport)
            pages.callback(page.close)
            return page

        yield open_one


def opened(tools: PageTools, server: ComfyServer, settings: dict[str, Any], viewport: tuple[int, int]) -> Page:
    page = Page(tools, server.url, settings, {"width": viewport[0], "height": viewport[1]})
    try:
        page.open()
    except BaseException:
        page.close()
        raise
    return page


@pytest.fixture(scope="session", params=["classic-nodes"])
def shown_in(request: pytest.FixtureRequest) -> str:
    """A name in `PAGES`."""
    return str(request.param)


@pytest.fixture(scope="session")
def shared_page(shown_in: str, page_tools: PageTools, comfy_server: ComfyServer, client: ComfyClient) -> Iterator[Page]:
    with opened(page_tools, comfy_server, PAGES[shown_in], (1600, 900)) as page:
        client.post("/settings", PAGES["classic-nodes"])  # the server keeps settings for the next page
        yield page


@pytest.fixture
def page(shared_page: Page, request: pytest.FixtureRequest) -> Iterator[Page]:
    """With whatever graph it had; its messages are those since the test before."""
    yield shared_page
    if request.node.stash.get(_LAST, False):
        shared_page.close()  # no other test draws in it
    else:
        shared_page.forget_messages()


@pytest.fixture
def language(shown_in: str) -> str:
    return str(PAGES[shown_in]["Comfy.Locale"])


@pytest.fixture
def vue(shown_in: str) -> bool:
    return bool(PAGES[shown_in]["Comfy.VueNodes.Enabled"])
