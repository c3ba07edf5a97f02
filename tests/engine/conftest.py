"""Tiny transformers of the real architecture, and headers without data, for the engine's tests."""

import errno
import gc
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from qwenimage_lowvram.engine.files.safetensors_header import BITS_PER_ELEMENT
from qwenimage_lowvram.engine.hardware import Hardware

# of Qwen-Image-2.1: what compares with diffusers' classes is run with the newest packages
collect_ignore_glob = [] if Version(version("diffusers")) >= Version("0.42") else ["*_21_against_diffusers.py"]

TEXT_DIM = 32
LAYERS = 5

# (prefetch, host_device): with host_device False the way of a GPU is taken, through ring and staging
WAYS = {
    "straight": (True, True),
    "straight, no thread": (False, True),
    "staged": (True, False),
    "staged, no thread": (False, False),
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests that ask for bits: with more, libraries split the sums of one product otherwise than another's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=WAYS.values(), ids=WAYS.keys())
def hardware(request: pytest.FixtureRequest) -> Hardware:
    """Every way that a block can take to its slot, on the CPU."""
    prefetch, host_device = request.param
    return Hardware(torch.device("cpu"), streams=False, pinned=False, prefetch=prefetch, host_device=host_device)


@pytest.fixture
def cpu() -> Hardware:
    return Hardware.detect(torch.device("cpu"))


@pytest.fixture(scope="session")
def open_handles() -> Callable[[Path], int]:
    """`open_handles(file)` -> how often this process has the file open."""

    def count(file: Path) -> int:
        links = Path("/proc/self/fd")
        if links.exists():
            return sum(os.path.realpath(link).removesuffix(" (deleted)") == str(file) for link in links.iterdir())
        objects = gc.get_objects()
        return sum(type(o) is io.FileIO and not o.closed and str(o.name) == str(file) for o in objects)

    return count


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Path]]:
    """`tiny(dtype, **options)` -> diffusers' transformer and its folder; built once for equal arguments."""
    from small_checkpoint import make_transformer

    made: dict[Any, tuple[Any, Path]] = {}

    def make(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Path]:
        key = (dtype, *sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("tiny")
            model = make_transformer(layers=LAYERS, text_dim=TEXT_DIM, **options).to(dtype)
            model.save_pretrained(folder)
            made[key] = model, folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def transformer_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of a transformer of two blocks with heads of the real size."""
    from diffusers import QwenImageTransformer2DModel

    with torch.device("meta"):
        model = QwenImageTransformer2DModel(num_layers=2, num_attention_heads=1, joint_attention_dim=16)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def header_of(shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> dict[str, Any]:
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + prod(shape) * BITS_PER_ELEMENT[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    return header


def write_raw(file: Path, header: Any, data_bytes: int, *, announce: int | None = None) -> Path:
    """A file of a header (bytes, or JSON) and `data_bytes` of nothing, which take no room on most disks."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write((len(raw) if announce is None else announce).to_bytes(8, "little") + raw)
        stream.truncate(8 + len(raw) + data_bytes)
    return file


@pytest.fixture(scope="session")
def write_model() -> Callable[..., Path]:
    """`write_model(file, shapes, dtype="BF16", metadata=None)` -> the file, a model of nothing but its header."""

    def write(
        file: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: str = "BF16",
        metadata: Mapping[str, str] | None = None,
    ) -> Path:
        header = header_of(shapes, dtype)
        size = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        return write_raw(file, {"__metadata__": dict(metadata), **header} if metadata else header, size)

    return write


@pytest.fixture
def forbid(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """`forbid(file)`: opening it is refused from now on, as one that this user may not read (root may read all)."""
    opened = os.open

    def start(file: Path) -> None:
        def refused(path: Any, *args: Any, **options: Any) -> int:
            if path == str(file):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return opened(path, *args, **options)

        monkeypatch.setattr(os, "open", refused)

    return start


@pytest.fixture(scope="session")
def write_header() -> Callable[..., Path]:
    """`write_header(file, header, data_bytes, announce=None)` -> the file, whose header may be anything."""
    return write_raw
