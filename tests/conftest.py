"""Shared fixtures: small checkpoints, ComfyUI inside this process, and real ComfyUI servers; and what a test needs."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # the servers compute too; spinning threads would starve them

import pytest
from devtools.cache import REPOSITORY, SetupError
from devtools.client import ComfyClient
from devtools.comfyui import require_comfyui
from devtools.in_process import use_comfyui
from devtools.server import ComfyServer, prepare_base

if TYPE_CHECKING:  # they import torch, which tests of plans and headers do without
    from split_files import SplitFiles

SMALL = "small_qwen_image"
SMALL_FULL = "small_qwen_image_full"
SMALL_LAYERED = "small_qwen_image_layered"

TESTS = Path(__file__).parent
LONGEST_FAILURE = 2000  # characters that are printed while tests run; the whole one stands at the end
# by marker: the fixture that brings what the marker says, and the folder whose tests all have it
NEEDS = {
    "comfyui": ("comfyui_path", TESTS / "nodes"),
    "server": ("start_server", TESTS / "server"),
    "page": ("page_tools", TESTS / "page"),
}

SERVERS = ("mixing", "page_tools", "start_server")  # fixtures whose tests one worker has


class _RepositoryIsNoPackage:
    """Keeps pytest from importing the repository's __init__.py, ComfyUI's way into the pack, under a second name."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == REPOSITORY else None


class _FailuresAtOnce:
    """Prints a failure when it happens: a run that is ended from outside never gets to pytest's summary."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._terminal.line(f"\nFAILED {report.nodeid} ({report.when})")
            self._terminal.line(report.longreprtext[-LONGEST_FAILURE:])


@pytest.hookimpl(trylast=True)  # when the terminal is there
def pytest_configure(config: pytest.Config) -> None:
    # a plugin of its own: hooks of this file do not see the folder above it
    config.pluginmanager.register(_RepositoryIsNoPackage())
    if not hasattr(config, "workerinput") and (terminal := config.pluginmanager.get_plugin("terminalreporter")):
        config.pluginmanager.register(_FailuresAtOnce(terminal))


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs ComfyUI, a server of it, or the page: by the fixtures that a test asks for, and by its folder.

    Of several workers one has all tests of a server, which is then started once, and one those of the page, with a
    server of its own; other tests stay with their file's.
    """
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        server = next((name for name in SERVERS if name in fixtures), None)
        item.add_marker(pytest.mark.xdist_group(server or item.path.relative_to(TESTS).as_posix()))
        for marker, (fixture, folder) in NEEDS.items():
            if fixture in fixtures or folder in item.path.parents:
                item.add_marker(marker)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Without groups each worker starts servers and pages of its own: a run takes more than twice as long."""
    in_groups = getattr(session.config.option, "loadgroup", False) and hasattr(session.config, "workerinput")
    if in_groups and not all("@" in item.nodeid for item in session.items):
        raise pytest.UsageError("this pytest-xdist does not keep groups of tests together under this pytest")


@pytest.fixture(scope="session", autouse=True)
def _only_what_was_asked_for(request: pytest.FixtureRequest) -> Iterator[None]:
    """ComfyUI comes into no process whose tests do without it, and torch into none of tests/without_torch alone."""
    yield
    items = request.session.items
    if not any(item.get_closest_marker("comfyui") for item in items):
        assert "comfy" not in sys.modules, "a test without the fixtures `comfyui_path` or `comfy` imported ComfyUI"
    if all(TESTS / "without_torch" in item.path.parents for item in items):
        assert "torch" not in sys.modules, "something that tests/without_torch imports brought torch in"


@pytest.fixture(autouse=True)
def _torch_as_the_test_knows_it(request: pytest.FixtureRequest) -> None:
    """ComfyUI lets attention sum in half precision, for all of its process, even if it only came in with another test's
    file. A test without ComfyUI gets torch's own sums."""
    if torch := sys.modules.get("torch"):
        with_comfyui = request.node.get_closest_marker("comfyui") is not None
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(with_comfyui)


@pytest.fixture(scope="session")
def comfyui_path() -> Path:
    """The ComfyUI folder that everything is tested against."""
    try:
        return require_comfyui()
    except SetupError as error:
        pytest.fail(str(error))


@pytest.fixture(scope="session")
def comfy(comfyui_path: Path) -> ModuleType:
    """ComfyUI's own package in this process, on the CPU; its folders lie in a scratch directory."""
    use_comfyui()
    importlib.import_module("comfy.model_management")
    return importlib.import_module("comfy")


@pytest.fixture(scope="session")
def small_pipeline(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pipeline folder in fp32 with a pruned tokenizer. Read only: copy it before changing it."""
    from small_checkpoint import make_pipeline

    return make_pipeline(tmp_path_factory.mktemp("checkpoint") / SMALL, comfyui=comfyui_path)


@pytest.fixture(scope="session")
def full_pipeline(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the whole tokenizer: split files are read with ComfyUI's, which knows every token."""
    from small_checkpoint import make_pipeline

    folder = tmp_path_factory.mktemp("checkpoint") / SMALL_FULL
    return make_pipeline(folder, full_tokenizer=True, comfyui=comfyui_path)


@pytest.fixture(scope="session")
def layered_pipeline(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen-Image-Layered's folder with the whole tokenizer."""
    from small_checkpoint import make_pipeline

    folder = tmp_path_factory.mktemp("checkpoint") / SMALL_LAYERED
    return make_pipeline(folder, full_tokenizer=True, layered=True, comfyui=comfyui_path)


@pytest.fixture(scope="session")
def server_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base folder of the session's server: models, input, output, user."""
    from PIL import Image

    base = tmp_path_factory.mktemp("comfyui")
    prepare_base(base)
    # every ComfyUI has this image, and the graphs that show one name it
    (base / "input").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), "white").save(base / "input" / "example.png")
    return base


@pytest.fixture(scope="session")
def split_files(full_pipeline: Path, server_base: Path) -> dict[str, SplitFiles]:
    """Names of the split files in `models_dir`, by storage format: the weights of `full_pipeline`."""
    from split_files import write_split_files

    formats = ("bf16", "fp8", "fp8_scaled")
    return {name: write_split_files(full_pipeline, server_base / "models", dtype=name) for name in formats}


@pytest.fixture(scope="session")
def models_dir(
    small_pipeline: Path, full_pipeline: Path, server_base: Path, split_files: dict[str, SplitFiles]
) -> Path:
    """ComfyUI's models folder: both pipelines under diffusers/ (by their folder names), and the split files."""
    for folder in (small_pipeline, full_pipeline):
        shutil.copytree(folder, server_base / "models" / "diffusers" / folder.name)
    return server_base / "models"


@pytest.fixture(scope="session")
def start_server(comfyui_path: Path, server_base: Path, models_dir: Path) -> Iterator[Callable[..., ComfyServer]]:
    """Boot a further server: `start_server("--cache-none")`; keywords are ComfyServer's. Ends with the session."""
    with ExitStack() as running:

        def start(*arguments: str, base: Path = server_base, cpu: bool = True, **options: Any) -> ComfyServer:
            return running.enter_context(ComfyServer(comfyui_path, base, cpu=cpu, arguments=arguments, **options))

        yield start


@pytest.fixture(scope="session")
def comfy_server(start_server: Callable[..., ComfyServer]) -> ComfyServer:
    """One real server for the whole session, with the pack linked into its custom_nodes."""
    return start_server()


@pytest.fixture(scope="session")
def client(comfy_server: ComfyServer) -> ComfyClient:
    return ComfyClient(comfy_server.url)


@pytest.fixture(scope="session")
def object_info(client: ComfyClient) -> dict[str, Any]:
    return client.object_info()
