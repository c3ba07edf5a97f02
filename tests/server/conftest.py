"""A server whose own loaders open small files too; the same graph runs there with theirs and with our loader."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from control_files import write_diffsynth, write_fun, write_instantx
from devtools.client import ComfyClient, Run
from devtools.server import ComfyServer
from PIL import Image
from qwenimage_lowvram.engine.models.qwen_image.variants import MARK_2511
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_checkpoint import SplitFiles, write_split_files
from small_pipeline_21 import make_pipeline_21

from .graphs import EDITING, LIGHTNING, Prompt, with_our_loader

SHARED = ("model", "clip", "vae")  # what our loader may stand for in a graph
TOLERANCE = 1e-4  # of fp32 latents whose standard deviation is about 1
# a custom node, one file
SMALL_SIZES = f"""import sys

import nodes

sys.path.insert(0, {str(Path(__file__).parents[2] / "tools")!r})
from native_sizes import teach_patches, teach_text_encoder, teach_transformer

teach_transformer()
teach_text_encoder()
teach_patches(nodes.NODE_CLASS_MAPPINGS["ModelPatchLoader"], layers=4, width=64)
NODE_CLASS_MAPPINGS = {{}}
"""


@dataclass(frozen=True)
class Mixing:
    """The server, the names of its files, and what a graph makes there. `files["2511"]` has that model's mark."""

    server: ComfyServer
    client: ComfyClient
    files: dict[str, SplitFiles]

    def photo(self, name: str, width: int, height: int, *, mode: str = "RGB", seed: int = 0) -> str:
        """A smooth random image in the server's input folder."""
        values = np.random.default_rng(seed).integers(0, 255, (max(1, height // 8), max(1, width // 8), 3), np.uint8)
        image = Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR)
        image.convert(mode).save(self.server.base / "input" / name)
        return name

    def latents(self, run: Run) -> torch.Tensor:
        """What the run's only SaveLatent saved."""
        (saved,) = (entry for output in run.outputs.values() for entry in output.get("latents", ()))
        return load_file(self.server.base / "output" / saved["subfolder"] / saved["filename"])["latent_tensor"]

    def both(
        self, prompt: Prompt, *, replaced: tuple[str, ...] = SHARED, variant: str = "auto"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents of a graph that has ComfyUI's loaders: with our loader in their place, and as it is."""
        ours = with_our_loader(prompt, replaced=replaced, variant=variant)
        theirs = self.latents(self.client.run(prompt))
        return self.latents(self.client.run(ours)), theirs

    def assert_same(self, prompt: Prompt, **options: Any) -> None:
        ours, theirs = self.both(prompt, **options)
        assert ours.shape == theirs.shape
        assert theirs.std() > 0.3
        assert (ours - theirs).abs().max() < TOLERANCE * max(1.0, float(theirs.std()))


@pytest.fixture(scope="session")
def mixing(
    start_server: Callable[..., ComfyServer], full_pipeline: Path, tmp_path_factory: pytest.TempPathFactory
) -> Mixing:
    base = tmp_path_factory.mktemp("mixing")
    plain = write_split_files(full_pipeline, base / "models", dtype="fp32")
    marked = f"marked_{plain.transformer}"
    _mark(base / "models" / "diffusion_models" / plain.transformer, marked)
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "small_sizes.py").write_text(SMALL_SIZES, encoding="utf-8")
    server = start_server(base=base)
    files = {"plain": plain, "2511": SplitFiles(marked, plain.text_encoder, plain.vae)}
    return Mixing(server, ComfyClient(server.url), files)


@pytest.fixture(scope="session")
def controls(mixing: Mixing, full_pipeline: Path) -> Mixing:
    """The server with ControlNets, and images to control with, of which a part is transparent: a mask."""
    folder, patches = (mixing.server.base / "models" / name for name in ("controlnet", "model_patches"))
    folder.mkdir(exist_ok=True)
    patches.mkdir(exist_ok=True)
    write_instantx(folder / "union.safetensors", full_pipeline / "transformer", layers=20)
    write_instantx(folder / "inpaint.safetensors", full_pipeline / "transformer", layers=2, mask_channels=4)
    write_fun(folder / "fun.safetensors", full_pipeline / "transformer")
    write_diffsynth(patches / "canny.safetensors", full_pipeline / "transformer")
    values = np.random.default_rng(0).integers(0, 255, (9, 15, 4), dtype=np.uint8)
    for name, size in (("control", (120, 72)), ("wide", (128, 64))):
        Image.fromarray(values).resize(size).save(mixing.server.base / "input" / f"{name}.png")
    return mixing


@pytest.fixture(scope="session")
def layered_folder(layered_pipeline: Path, models_dir: Path) -> str:
    """The loader's name of Qwen-Image-Layered's folder."""
    shutil.copytree(layered_pipeline, models_dir / "diffusers" / layered_pipeline.name)
    return f"{layered_pipeline.name} (folder)"


@pytest.fixture(scope="session")
def folders_21(models_dir: Path, comfyui_path: Path) -> dict[str, str]:
    """The loader's names of a small Qwen-Image-2.1, and of the same weights as 2.1-Turbo, which it is by its name."""
    folders = models_dir / "diffusers"
    made = make_pipeline_21(folders / "small-2.1", comfyui=comfyui_path)
    shutil.copytree(made, folders / "small-2.1-turbo")
    return {"2.1": "small-2.1 (folder)", "2.1-Turbo": "small-2.1-turbo (folder)"}


@pytest.fixture(scope="session")
def lora(full_pipeline: Path, models_dir: Path) -> str:
    """A LoRA for the small checkpoint, under the name that the graphs from text ask for."""
    (name,) = lora_names(LIGHTNING)
    _write_lora(full_pipeline, models_dir, name)
    return name


@pytest.fixture(scope="session")
def edit_loras(full_pipeline: Path, models_dir: Path) -> set[str]:
    """The same under the names that the edit graphs ask for."""
    names = lora_names(EDITING)
    for name in names:
        _write_lora(full_pipeline, models_dir, name)
    return names


def lora_names(paths: Sequence[Path]) -> set[str]:
    nodes = (node for path in paths for node in json.loads(path.read_text(encoding="utf-8"))["nodes"])
    return {node["widgets_values"][0] for node in nodes if node["type"] == "QwenLowVRAMLoadLora"}


def _write_lora(pipeline: Path, models_dir: Path, name: str) -> None:
    weights = load_file(next((pipeline / "transformer").glob("*.safetensors")))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, weight in weights.items():
        if key.endswith(("attn.to_q.weight", "img_mlp.net.2.weight")):
            layer = f"diffusion_model.{key.removesuffix('.weight')}"
            tensors[f"{layer}.lora_up.weight"] = torch.randn(weight.shape[0], 4, generator=generator)
            tensors[f"{layer}.lora_down.weight"] = torch.randn(4, weight.shape[1], generator=generator) / 8
    (models_dir / "loras").mkdir(exist_ok=True)
    save_file(tensors, models_dir / "loras" / name)


def _mark(file: Path, name: str) -> None:
    """A copy of the file as ComfyUI tells Edit-2511 from its elders."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(file) | {MARK_2511: torch.empty(0)}, file.with_name(name), metadata)
