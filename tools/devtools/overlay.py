"""Other versions of single packages over the one environment: folders that come first on sys.path. torch stays.

`python -m devtools.overlay oldest` prints the requirements of an environment of that age, with its torch and the tools
for the engine's tests: for a machine whose environment is not kept.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .cache import REPOSITORY, SetupError
from .environment import FOR_ENGINE, TOOLS, TORCH, requirement_name

# what a focused run proves: everything that touches diffusers, transformers or tokenizers
_TESTS = (
    "test_text_encoder",
    "test_tokenizers",
    "test_vision",
    "test_qwen3_vl",
    "test_qwen3_vl_prompts",
    "test_transformer",
    "test_vae",
    "test_sampling",
)

# parts of names of tests among them that other packages cannot change
_OWN = (
    "staged",
    "thread",
    "tile",
    "under_a_limit",
    "out_of_memory",
    "in_chunks",
    "after_unloading",
    "the_plan",
    "errs_no_more",
)


@dataclass(frozen=True)
class Overlay:
    """Releases that are tested together, and tests of what else they hold: of the engine's, or with their folder."""

    name: str
    requirements: tuple[str, ...]
    more: tuple[str, ...] = ()

    @property
    def tests(self) -> list[str]:
        return [f"tests/{name if '/' in name else f'engine/{name}'}.py" for name in (*_TESTS, *self.more)]


# the least that README promises; the other packages of the environment are within what these ask for
OLDEST = Overlay(
    "oldest packages",
    (
        "diffusers==0.37.0",
        "transformers==4.57.1",
        "huggingface_hub==0.36.2",
        "tokenizers==0.22.0",
        "accelerate==1.0.0",
        "safetensors==0.4.3",
        "httpx<1",
        "httpcore==1.*",
    ),
)
# what people have who installed diffusers themselves: later than the pack asks for, with the huggingface_hub it needs
NEWEST = Overlay(
    "newest packages",
    (
        "diffusers==0.42.1",
        "transformers==5.24.0",
        "huggingface_hub==2.4.0",
        "tokenizers==0.23.3",
        "httpx2==2.16.2",
        "httpcore2==2.16.2",
        "truststore==0.10.5",
        "comfy-kitchen==0.2.40",
    ),
    (
        "test_comfy_quant",
        "test_w4a8",
        "test_stored_w4a8",
        "simulated_gpu/test_stored_w4a8",
        "test_transformer_21_against_diffusers",
        "test_vae_21_against_diffusers",
        "test_pipeline_21_against_diffusers",
        "test_qwen3_vl_21_against_diffusers",
        "test_miniature_21_against_diffusers",
    ),
)
OVERLAYS = (OLDEST, NEWEST)
OLDEST_TORCH = ("torch==2.6.0", "torchvision==0.21.0")
_STAMP = "overlay.txt"


def prepare_overlay(overlay: Overlay, python: Path) -> Path:
    """The folder with the overlay's packages, made where it is not there yet. Raises SetupError."""
    folder = python.parents[1] / "overlays" / overlay.name.replace(" ", "-")
    stamp = folder / _STAMP
    wanted = "\n".join(overlay.requirements)
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    command: list[str | Path] = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    if subprocess.run([*command, "--target", folder, *overlay.requirements]).returncode:
        raise SetupError(f"pip could not install the {overlay.name} into {folder}. Its message stands above.")
    stamp.write_text(wanted, encoding="utf-8")
    return folder


def with_overlay(environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The environment for programs that are to see the overlay's packages first."""
    return {**environment, "PYTHONPATH": os.pathsep.join([str(folder), environment["PYTHONPATH"]])}


def environment_lines(overlay: Overlay) -> list[str]:
    """What pip is to install, all together: the overlay's packages and, of the others, what the engine's tests need."""
    torch = OLDEST_TORCH if overlay is OLDEST else TORCH
    ours = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines()
    chosen = {requirement_name(line) for line in overlay.requirements}
    rest = [line for line in (*TOOLS, *FOR_ENGINE, *ours) if requirement_name(line) not in chosen]
    return [*torch, *overlay.requirements, *rest]


def overlay_arguments(overlay: Overlay) -> list[str]:
    """What pytest is to run there: one way to a slot, and nothing of tiles and memory, which are this code's alone."""
    names = " and ".join(f"not {name}" for name in _OWN)
    return ["-q", "-p", "no:cacheprovider", "-k", names, *overlay.tests]


if __name__ == "__main__":
    print("\n".join(environment_lines({"oldest": OLDEST, "newest": NEWEST}[sys.argv[1]])))
