"""Importing the pack costs little and prints nothing; a package is needed only where a file needs it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from devtools.cache import REPOSITORY
from devtools.server import PACK_NAME

# what people's other packs and ComfyUI itself may have, and ours needs at the first run only
HEAVY = ("diffusers", "accelerate", "bitsandbytes", "gguf", "peft", "transformers", "comfy_kitchen")

# loads the pack as ComfyUI does, looks at its nodes, and says which modules that has brought
LOAD = """
import asyncio, sys
sys.argv = ["main.py", "--cpu"]
import comfy.options; comfy.options.enable_args_parsing()
import folder_paths, nodes, comfy.sd, comfy.samplers, comfy_extras.nodes_qwen, server, execution, latent_preview
before = set(sys.modules)
print("MARK")
assert asyncio.run(nodes.load_custom_node(%r))
ours = [node for name, node in nodes.NODE_CLASS_MAPPINGS.items() if name.startswith("QwenLowVRAM")]
assert len(ours) > 8, len(ours)
for node in ours:
    node.INPUT_TYPES()
folder_paths.add_model_folder_path("diffusers", %r)
assert asyncio.run(nodes.NODE_CLASS_MAPPINGS["QwenLowVRAMLoader"].VALIDATE_INPUTS(%r)) is True
print("MARK")
print({name.partition(".")[0] for name in set(sys.modules) - before})
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """With ComfyUI and our tools importable, away from the repository, whose nodes/ is not ComfyUI's."""
    comfyui = os.path.expanduser(os.environ["COMFYUI_PATH"])
    paths = [*(str(REPOSITORY / part) for part in ("tools/alias", "tools")), comfyui]
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        cwd=comfyui,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_importing_the_pack_listing_its_nodes_and_checking_a_file_brings_nothing_heavy_and_prints_nothing(
    small_pipeline: Path,
) -> None:
    """Not one module more of these than ComfyUI had by then."""
    done = run_python(LOAD % (str(REPOSITORY), str(small_pipeline.parent), f"{small_pipeline.name} (folder)"))
    assert done.returncode == 0, done.stderr
    _, printed, brought = done.stdout.split("MARK\n")
    assert printed == ""
    assert "gemm_4bit" not in done.stderr
    assert "Traceback" not in done.stderr
    assert [name for name in HEAVY if f"'{name}'" in brought] == []


MISSING = """
import sys
for name in %r:
    sys.modules[name] = None
from pathlib import Path
import torch
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.errors import MissingPackage
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
def load(path):
    return QwenImageTransformer(
        open_checkpoint(Path(path)), dtype=torch.float32, hardware=Hardware.detect(torch.device("cpu"))
    )
%s
"""


def test_a_plain_file_needs_none_of_the_packages_for_formats(small_pipeline: Path) -> None:
    code = f"print(load({str(small_pipeline / 'transformer')!r}).config.num_layers)"
    done = run_python(MISSING % (["bitsandbytes", "gguf", "comfy_kitchen"], code))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "4"
    assert done.stderr == ""


def test_loading_a_transformer_prints_nothing_where_every_package_is_there(small_pipeline: Path) -> None:
    """diffusers imports bitsandbytes, which asks for another package: not in our users' log."""
    code = f"load({str(small_pipeline / 'transformer')!r}); print('bitsandbytes' in sys.modules)"
    done = run_python("import logging; logging.basicConfig()\n" + MISSING % ([], code))
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "True", "")


def test_a_package_that_breaks_another_ones_import_is_named(tmp_path: Path, small_pipeline: Path) -> None:
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").write_text("raise RuntimeError('CUDA setup failed')")
    code = f"""
sys.path.insert(0, {str(tmp_path)!r})
try:
    load({str(small_pipeline / "transformer")!r})
except MissingPackage as error:
    print(error)
"""
    done = run_python(MISSING % ([], code))
    assert "bitsandbytes, which diffusers imports, fails to import (RuntimeError: CUDA" in done.stdout
    assert "--no-deps bitsandbytes`" in done.stdout


def test_a_gguf_file_names_the_package_that_it_needs(tmp_path: Path, small_pipeline: Path) -> None:
    from split_files import write_split_files

    names = write_split_files(small_pipeline, tmp_path, dtype="gguf_q8_0", text_dtype="bf16")
    code = f"""
try:
    load({str(tmp_path / "diffusion_models" / names.transformer)!r})
except MissingPackage as error:
    print(error)
"""
    done = run_python(MISSING % (["gguf"], code))
    assert done.returncode == 0, done.stderr
    assert "The package gguf is missing; GGUF files are read with it." in done.stdout
    assert "pip install gguf" in done.stdout


def test_4_bit_weights_name_the_package_that_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwenimage_lowvram.engine.errors import MissingPackage
    from qwenimage_lowvram.engine.formats import bnb4

    bnb4.load_operators.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.functional", raising=False)
    with pytest.raises(MissingPackage, match=r"bitsandbytes is missing.*\n\nWhat to do: .*pip install bitsandbytes"):
        bnb4.NF4.encode(torch.zeros(64, 64))
    bnb4.load_operators.cache_clear()


def test_an_attention_kernel_that_diffusers_does_not_know_is_told_in_words(small_pipeline: Path) -> None:
    code = f"""
try:
    load({str(small_pipeline / "transformer")!r})
except MissingPackage as error:
    print(error)
"""
    done = run_python(MISSING % ([], code), DIFFUSERS_ATTN_BACKEND="no_such_kernel")
    assert done.returncode == 0, done.stderr
    assert "DIFFUSERS_ATTN_BACKEND" in done.stdout
    assert "What to do: remove DIFFUSERS_ATTN_BACKEND" in done.stdout


@pytest.mark.parametrize(("width", "channels"), [(4, 3), (96, 3), (8, 4)])
def test_the_table_of_the_vaes_tensors_is_that_of_diffusers_class(width: int, channels: int) -> None:
    from diffusers import AutoencoderKLQwenImage
    from qwenimage_lowvram.engine.models.qwen_image_vae.shapes import image_vae_shapes

    with torch.device("meta"):
        network = AutoencoderKLQwenImage(base_dim=width, z_dim=16, input_channels=channels)
    wanted = {name: tuple(p.shape) for name, p in network.named_parameters() if ".time_conv." not in name}
    assert image_vae_shapes(width, channels) == wanted


def test_no_name_of_comfyui_that_the_pack_uses_is_missing(tmp_path: Path) -> None:
    """By comfy-import-guard, which looks a pack's references up in a repository of ComfyUI."""
    comfyui, clone = Path(os.environ["COMFYUI_PATH"]).expanduser(), tmp_path / "guard" / "ComfyUI"
    shutil.copytree(comfyui, clone, ignore=shutil.ignore_patterns(".git", "__pycache__", "models", "input", "output"))
    for command in ("init", "add --all --force", "-c user.name=x -c user.email=x commit --message x", "tag v0"):
        subprocess.run(["git", "-C", clone, *command.split()], check=True, capture_output=True)
    packs = tmp_path / "install" / "custom_nodes"
    packs.mkdir(parents=True)
    names = ("__init__.py", "nodes", "engine", "pyproject.toml")
    for name in names:
        source, target = REPOSITORY / name, packs / PACK_NAME / name
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    guard = Path(sys.executable).with_name("comfy-import-guard")
    options = ["--offline", "--strict", "--no-update", "--target", "v0", "--comfy-dir", packs.parent]
    done = subprocess.run(
        [guard, "--cache-dir", clone.parent, "check", *options], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 will break, 1 safe, 0 warn" in done.stdout
