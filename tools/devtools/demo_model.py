"""Which weights the demo runs on: the person's own, the repository's miniature, or a small random checkpoint."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .cache import REPOSITORY, SetupError
from .link import link_folder, remove_link

SMALL = "small_qwen_image"
MINIATURE = REPOSITORY / "miniature"
# of images that are compared with the diffusers pipeline's
COMPARED = {"dtype": "fp32", "positions": "diffusers"}
_LATENT, _ENCODE, _SAMPLE = "EmptySD3LatentImage", "QwenLowVRAMEncodePrompts", "QwenLowVRAMSample"


@dataclass(frozen=True)
class DemoModel:
    """A model in the server's folders, and which of the workflow's widgets it needs changed."""

    title: str
    transformer: str  # as the loader's combo shows it
    folder: Path | None = None  # a pipeline folder, which then also holds text encoder and VAE
    trained: bool = True
    compare: bool = False
    loader_inputs: Mapping[str, Any] = field(default_factory=dict)
    other_inputs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    server_arguments: tuple[str, ...] = ()


def choose_model(path: Path | None, base: Path) -> DemoModel:
    """Put the model where the server of `base` finds it. Raises SetupError where `path` is none."""
    if path is None:
        return _miniature(base) if (MINIATURE / "model_index.json").exists() else _small(base)
    path = path.expanduser().resolve()
    if (path / "model_index.json").exists():
        return _folder(path, base)
    if path.is_file() and path.suffix == ".safetensors":
        return _file(path, base)
    raise SetupError(f"{path} is neither a pipeline folder (with model_index.json) nor a .safetensors file.")


def _small(base: Path) -> DemoModel:
    from small_checkpoint import make_pipeline

    from .reference import quiet_libraries

    quiet_libraries()
    folder = base / "models" / "diffusers" / SMALL
    shutil.rmtree(folder, ignore_errors=True)
    make_pipeline(folder)
    return DemoModel(
        "a small checkpoint of the real architecture with random weights, made just now",
        f"{SMALL} (folder)",
        folder,
        trained=False,
        compare=True,
        loader_inputs=COMPARED,
        other_inputs={_LATENT: {"width": 256, "height": 144, "batch_size": 1}, _SAMPLE: {"steps": 8}},
    )


def _miniature(base: Path) -> DemoModel:
    link_folder(MINIATURE, base / "models" / "diffusers" / "miniature")
    return DemoModel(
        "the miniature: small, and trained to draw the shapes that its prompt names",
        "miniature (folder)",
        MINIATURE,
        compare=True,
        loader_inputs=COMPARED,
        other_inputs={
            _LATENT: {"width": 128, "height": 128, "batch_size": 1},
            _ENCODE: {"positive": "a large red circle in the middle of a blue background", "negative": " "},
            _SAMPLE: {"steps": 20, "cfg": 4.0},
        },
    )


def _folder(path: Path, base: Path) -> DemoModel:
    target = base / "models" / "diffusers" / path.name
    if path != target:
        try:
            link_folder(path, target, may_copy=False)
        except OSError as error:
            raise SetupError(f"{path} cannot be linked into {target.parent} ({error}).") from None
    return DemoModel(f"the pipeline folder {path}", f"{path.name} (folder)", path)


def _file(path: Path, base: Path) -> DemoModel:
    models = path.parent.parent
    folders = {"diffusion_models": [path.parent.name], "text_encoders": ["text_encoders", "clip"], "vae": ["vae"]}
    missing = [name for name, options in folders.items() if not any((models / option).is_dir() for option in options)]
    if missing:
        raise SetupError(
            f"{models} has no folder {', '.join(missing)}. The text encoder and the VAE must be beside the "
            "transformer's folder, as in ComfyUI's models folder: diffusion_models/, text_encoders/, vae/."
        )
    lines = ["demo:", f"  base_path: {json.dumps(str(models))}"]
    lines += [f"  {name}: |\n" + "\n".join(f"    {option}" for option in options) for name, options in folders.items()]
    config = base / "extra_model_paths.yaml"
    config.write_text("\n".join(lines) + "\n", encoding="utf-8")
    remove_link(base / "models" / "diffusion_models" / path.name)
    return DemoModel(f"the file {path}", path.name, server_arguments=("--extra-model-paths-config", str(config)))
