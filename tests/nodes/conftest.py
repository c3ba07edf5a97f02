"""Our MODEL and CLIP inside this process, on small random weights."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from devtools.cache import SetupError
from devtools.in_process import use_comfyui
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen25_vl.text_encoder import TextEncoder
from qwenimage_lowvram.engine.models.qwen_image.prompts import PromptTokenizer
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer

try:
    use_comfyui()  # before a module of tests imports our nodes, and they ComfyUI
except SetupError as error:
    pytest.exit(str(error), returncode=1)

DIM = 64  # of the small text encoder's embeddings
MiB = 1024**2

NAME_21 = "small-2.1"


@pytest.fixture(autouse=True)
def _as_nodes_run(comfy: ModuleType) -> Iterator[None]:
    """Nodes run in inference mode; nothing that one test loads is left in ComfyUI's list for the next."""
    import comfy.model_management as management

    with torch.inference_mode():
        yield
    management.unload_all_models()


@pytest.fixture
def models(comfy: Any, tmp_path: Path) -> Iterator[Callable[[str, Path], None]]:
    """`models(kind, folder)` adds a folder to ComfyUI's for one test."""
    import folder_paths

    before = {kind: (list(paths), set(suffixes)) for kind, (paths, suffixes) in _folders(folder_paths).items()}
    yield folder_paths.add_model_folder_path
    _folders(folder_paths).clear()
    _folders(folder_paths).update(before)
    folder_paths.filename_list_cache.clear()


@pytest.fixture(scope="session")
def diffusers_21(tmp_path_factory: pytest.TempPathFactory, comfyui_path: Path) -> Path:
    """A small Qwen-Image-2.1 as a person has it, of models/diffusers; its folder is called NAME_21."""
    from small_pipeline_21 import make_pipeline_21

    folder = tmp_path_factory.mktemp("models") / "diffusers"
    make_pipeline_21(folder / NAME_21, comfyui=comfyui_path)
    return folder


def _folders(folder_paths: Any) -> dict[str, Any]:
    folders: dict[str, Any] = folder_paths.folder_names_and_paths
    return folders


@pytest.fixture(scope="session")
def make_transformer(small_pipeline: Path) -> Callable[..., QwenImageTransformer]:
    def make(dtype: torch.dtype = torch.float32, **options: Any) -> QwenImageTransformer:
        hardware = Hardware.detect(torch.device("cpu"))
        return QwenImageTransformer(
            open_checkpoint(small_pipeline / "transformer"), dtype=dtype, hardware=hardware, **options
        )

    return make


@pytest.fixture
def transformer(make_transformer: Callable[..., QwenImageTransformer]) -> QwenImageTransformer:
    return make_transformer()


@pytest.fixture
def model(transformer: QwenImageTransformer) -> Any:
    """A MODEL that may use all memory."""
    from qwenimage_lowvram.nodes.adapters.model import make_model

    return make_model(transformer, None)


@pytest.fixture
def clip(small_pipeline: Path, comfy: Any) -> Any:
    from qwenimage_lowvram.nodes.adapters.clip import LowVRAMCLIP

    hardware = Hardware.detect(torch.device("cpu"))
    encoder = TextEncoder(open_checkpoint(small_pipeline / "text_encoder"), dtype=torch.float32, hardware=hardware)
    return LowVRAMCLIP(encoder, PromptTokenizer(small_pipeline / "tokenizer"), None)


@pytest.fixture
def vae(small_pipeline: Path, comfy: Any) -> Any:
    from qwenimage_lowvram.nodes.adapters.vae import make_vae

    return make_vae(open_checkpoint(small_pipeline / "vae"), dtype=torch.float32, limit_bytes=None)


def embeds(length: int, seed: int) -> torch.Tensor:
    return torch.randn(1, length, DIM, generator=torch.Generator().manual_seed(seed))


def cond(length: int = 9, seed: int = 1, **extra: Any) -> list[Any]:
    return [[embeds(length, seed), extra]]


def empty_latent(width: int = 96, height: int = 64, batch: int = 1) -> dict[str, torch.Tensor]:
    return {"samples": torch.zeros(batch, 16, 1, height // 8, width // 8)}


# what the widgets of our nodes give
SAMPLE = {
    "seed": 1,
    "steps": 1,
    "cfg": 1.0,
    "sampler": "euler",
    "scheduler": "qwen_image",
    "denoise": 1.0,
    "norm_rescale": True,
    "preset": "as set",
}
EDIT = {
    "positive": "a",
    "negative": " ",
    "megapixels": 0.02,
    "width": 0,
    "height": 0,
    "batch_size": 1,
    "variant": "auto",
}


def sample(model: Any, **inputs: Any) -> Any:
    from qwenimage_lowvram.nodes.sample import QwenLowVRAMSample

    usual = {"positive": cond(), "negative": cond(5, 2), "latent_image": empty_latent(), **SAMPLE}
    return QwenLowVRAMSample().sample(model, **{**usual, **inputs})


def decode(vae: Any, samples: Any, tile_size: Any = 0) -> torch.Tensor:
    from qwenimage_lowvram.nodes.decode import QwenLowVRAMDecode

    return QwenLowVRAMDecode().decode(samples, vae, tile_size)[0]
