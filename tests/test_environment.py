"""Where the installed packages or ComfyUI do not fit, one line says so, and ComfyUI runs on."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from devtools.cache import REPOSITORY
from qwenimage_lowvram.engine.environment import environment_problem, import_problem, pip_name

FITTING = {
    "torch": "2.6.0+cu124",
    "transformers": "4.57.1",
    "diffusers": "0.37.0",
    "accelerate": "1.0.0",
    "safetensors": "0.4.3",
}


def problem(comfyui: str = "0.30.0", **changed: str) -> str | None:
    versions = FITTING | changed

    def installed(name: str) -> str:
        if not versions[name]:
            raise PackageNotFoundError(name)
        return versions[name]

    return environment_problem(comfyui, installed)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"transformers": "5.24.0", "diffusers": "0.42.1", "torch": "2.14.1"},
        {"diffusers": "0.43.0.dev0"},
        {"comfyui": "0.30", "accelerate": "1"},
    ],
    ids=str,
)
def test_versions_within_the_bounds_are_no_problem(changed: dict[str, str]) -> None:
    assert problem(**changed) is None


def test_what_a_person_is_told_to_install_is_what_the_pack_installs_itself() -> None:
    lines = (REPOSITORY / "requirements.txt").read_text().split()
    wanted = {re.split("[<>=]", line)[0]: line for line in lines}
    for name in ("diffusers", "safetensors"):
        assert wanted[name] in pip_name(name)
    assert pip_name("gguf") == "gguf"


@pytest.mark.parametrize("nothing", [lambda name: None, lambda name: {}["Version"]])
def test_damaged_metadata_of_packages_is_told_as_missing_packages(nothing: Any) -> None:
    assert "diffusers is not installed" in str(environment_problem("0.30.0", nothing))
    assert "do not fit together" in import_problem(ImportError("x"), "0.30.0", nothing)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"transformers": "4.56.2"}, 'transformers 4.56.2 is too old .*pip install "transformers>=4.57,<6"'),
        ({"transformers": "6.0.0"}, "transformers 6.0.0 is too new"),
        ({"diffusers": "0.36.0"}, 'diffusers 0.36.0 is too old .*pip install "diffusers>=0.37,<0.40"'),
        ({"diffusers": ""}, 'diffusers is not installed .*pip install "diffusers>=0.37,<0.40"'),
        ({"torch": "2.5.1+cu121"}, r"torch 2.5.1\+cu121 is too old .*install torch >= 2.6, < 3, then restart"),
        ({"comfyui": "0.29.9"}, "ComfyUI 0.29.9 is too old .*install ComfyUI >= 0.30.0"),
        ({"comfyui": "0.29.9", "diffusers": "0.9"}, "ComfyUI 0.29.9 is too old.*; diffusers 0.9 is too old"),
    ],
    ids=str,
)
def test_a_version_beyond_the_bounds_is_named_in_one_line_with_what_to_do(changed: dict[str, str], words: str) -> None:
    said = problem(**changed)
    assert said is not None
    assert "\n" not in said
    assert "What to do" in said
    assert re.search(words, said), said


def test_an_import_that_fails_is_told_in_one_line_with_the_versions() -> None:
    said = import_problem(ImportError("cannot import\nname 'x'"), "9.9.9", lambda name: FITTING[name])
    assert "\n" not in said
    assert "ComfyUI 9.9.9, torch 2.6.0+cu124, transformers 4.57.1" in said
    assert "cannot import name 'x'" in said


LOAD = """
import asyncio, logging, sys
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stdout)
sys.path.insert(0, sys.argv[1])
from comfy.cli_args import args
args.cpu = True
import nodes
for pack in sys.argv[2:]:
    loaded = asyncio.run(nodes.load_custom_node(pack))
    print("loaded", loaded, len([name for name in nodes.NODE_CLASS_MAPPINGS if name.startswith("QwenLowVRAM")]))
    print("heavy", "diffusers" in sys.modules)
    print("next pack")
"""


def load(comfyui: Path, before: Path, *packs: Path) -> list[str]:
    """What ComfyUI's own loader makes of each, with `before` ahead of the installed packages. They share a process:
    none of them but the last may load."""
    environ = os.environ | {"PYTHONPATH": str(before), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD, str(comfyui), *map(str, packs)]
    result = subprocess.run(command, env=environ, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    return result.stdout.split("next pack\n")[: len(packs)]


@pytest.mark.parametrize(
    ("name", "version", "words"),
    [
        ("diffusers", "0.36.0", "diffusers 0.36.0 is too old"),
        ("transformers", "6.0.0", "transformers 6.0.0 is too new"),
    ],
)
def test_comfyui_loads_no_node_of_ours_and_runs_on_where_a_package_does_not_fit(
    name: str, version: str, words: str, comfyui_path: Path, tmp_path: Path
) -> None:
    said = tmp_path / f"{name}-{version}.dist-info"
    said.mkdir()
    (said / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    (output,) = load(comfyui_path, tmp_path, REPOSITORY)
    assert [line for line in output.splitlines() if line.startswith("ERROR")] == [
        line for line in output.splitlines() if words in line
    ]
    assert "Traceback" not in output
    assert "loaded True 0" in output
    assert "heavy False" in output


# of a decode node: what it asks for is gone, or is a mistake of its own
GONE = (
    "from comfy.model_management import what_is_gone",
    "import comfy.model_management\ncomfy.model_management.what_is_gone",
    "import comfy.model_base\ncomfy.model_base.BaseModel.what_is_gone",
    "import what_is_gone",
    "import torch\ntorch.ops.aten.what_is_gone",
)
MISTAKES = (
    "from .display_names import what_is_gone",
    "from . import display_names\ndisplay_names.what_is_gone",
    "from . import what_is_gone",
    "class Ours: pass\nOurs.what_is_gone",
    "raise RuntimeError('what_is_gone')",
)


@pytest.fixture(scope="module")
def loaded_with(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What ComfyUI says of copies of the pack, by the code of their decode node."""
    folder = tmp_path_factory.mktemp("packs")
    codes = (*GONE, *MISTAKES)
    packs = [with_decode(code, folder / f"pack{number}") for number, code in enumerate(codes)]
    return dict(zip(codes, load(comfyui_path, folder, *packs), strict=True))


def with_decode(code: str, pack: Path) -> Path:
    """A copy of the pack whose decode node is that code."""
    for part in ("engine", "nodes"):
        shutil.copytree(REPOSITORY / part, pack / part)
    shutil.copy(REPOSITORY / "__init__.py", pack)
    (pack / "nodes" / "decode.py").write_text(f"{code}\n", encoding="utf-8")
    return pack


@pytest.mark.parametrize("code", GONE)
def test_comfyui_loads_no_node_of_ours_and_runs_on_where_a_name_is_gone(code: str, loaded_with: dict[str, str]) -> None:
    output = loaded_with[code]
    (line,) = (line for line in output.splitlines() if line.startswith("ERROR"))
    assert "do not fit together" in line
    assert "what_is_gone" in line
    assert "Traceback" not in output
    assert "loaded True 0" in output


@pytest.mark.parametrize("code", MISTAKES)
def test_a_mistake_of_the_packs_own_is_shown_as_one_and_comfyui_runs_on(code: str, loaded_with: dict[str, str]) -> None:
    output = loaded_with[code]
    assert "what_is_gone" in output
    assert "do not fit together" not in output
    assert "loaded False 0" in output


def test_comfyui_loads_the_nodes_where_all_fits(comfyui_path: Path, tmp_path: Path) -> None:
    (output,) = load(comfyui_path, tmp_path, REPOSITORY)
    assert "ERROR" not in output
    nodes = json.loads((REPOSITORY / "tests" / "data" / "object_info.json").read_text())
    assert f"loaded True {len(nodes)}" in output
