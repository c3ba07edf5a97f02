"""Shared fixtures: small checkpoints, ComfyUI inside this process, and real ComfyUI servers."""

import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # the servers compute too; spinning threads would starve them

import pytest
from devtools.cache import REPOSITORY, SetupError
from devtools.client import ComfyClient
from devtools.comfyui import require_comfyui
from devtools.server import ComfyServer, prepare_base
from PIL import Image
from small_checkpoint import SplitFiles, make_pipeline, write_split_files

SMALL = "small_qwen_image"
SMALL_FULL = "small_qwen_image_full"
SMALL_LAYERED = "small_qwen_image_layered"
_scratch = pytest.StashKey[Path]()


class _RepositoryIsNoPackage:
    """Keeps pytest from importing the repository's __init__.py, ComfyUI's way into the pack, under a second name."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == REPOSITORY else None


def pytest_configure(config: pytest.Config) -> None:
    """Put ComfyUI on the path, set to the CPU and to a scratch folder, before any test module imports it."""
    # a plugin of its own: hooks of this file do not see the folder above it
    config.pluginmanager.register(_RepositoryIsNoPackage())
    try:
        comfyui = require_comfyui()
    except SetupError:
        return  # whoever needs it fails in the `comfyui_path` fixture, with the reason
    base = Path(tempfile.mkdtemp(prefix="qwenimage-lowvram-"))
    config.stash[_scratch] = base
    prepare_base(base)
    # `python -m pytest` adds the repository, where nodes/ would shadow ComfyUI's nodes.py
    sys.path[:] = [str(comfyui), *(entry for entry in sys.path if Path(entry).resolve() != REPOSITORY)]
    args = importlib.import_module("comfy.cli_args").args
    args.cpu = True
    args.base_directory = str(base)


def pytest_unconfigure(config: pytest.Config) -> None:
    if _scratch in config.stash:
        shutil.rmtree(config.stash[_scratch], ignore_errors=True)


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
    importlib.import_module("comfy.model_management")
    return importlib.import_module("comfy")


@pytest.fixture(scope="session")
def small_pipeline(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pipeline folder in fp32 with a pruned tokenizer. Read only: copy it before changing it."""
    return make_pipeline(tmp_path_factory.mktemp("checkpoint") / SMALL, comfyui=comfyui_path)


@pytest.fixture(scope="session")
def full_pipeline(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the whole tokenizer: split files are read with ComfyUI's, which knows every token."""
    folder = tmp_path_factory.mktemp("checkpoint") / SMALL_FULL
    return make_pipeline(folder, full_tokenizer=True, comfyui=comfyui_path)


@pytest.fixture(scope="session")
def layered_pipeline(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen-Image-Layered's folder with the whole tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint") / SMALL_LAYERED
    return make_pipeline(folder, full_tokenizer=True, layered=True, comfyui=comfyui_path)


@pytest.fixture(scope="session")
def server_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base folder of the session's server: models, input, output, user."""
    base = tmp_path_factory.mktemp("comfyui")
    prepare_base(base)
    # every ComfyUI has this picture, and the graphs that show one name it
    (base / "input").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), "white").save(base / "input" / "example.png")
    return base


@pytest.fixture(scope="session")
def split_files(full_pipeline: Path, server_base: Path) -> dict[str, SplitFiles]:
    """Names of the split files in `models_dir`, by storage format: the weights of `full_pipeline`."""
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
