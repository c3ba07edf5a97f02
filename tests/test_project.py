"""What is released: versions, dependencies, the packed files, and the nodes' interface that saved graphs rely on."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from devtools.cache import REPOSITORY
from devtools.server import PACK_NAME

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SNAPSHOT = Path(__file__).parent / "data" / "object_info.json"
WORKFLOWS = sorted((REPOSITORY / "workflows").glob("*.json"))
MODELS_URL = "https://huggingface.co/Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files"
LOADER, LOAD_LORA = "QwenLowVRAMLoader", "QwenLowVRAMLoadLora"
EDIT_URL = (
    "https://huggingface.co/Comfy-Org/Qwen-Image-Edit_ComfyUI/resolve/main/split_files/diffusion_models/"
    "qwen_image_edit_2509_fp8_e4m3fn.safetensors"
)
LAYERED_URL = "https://huggingface.co/Comfy-Org/Qwen-Image-Layered_ComfyUI/resolve/main/split_files"
URL_21 = "https://huggingface.co/Comfy-Org/Qwen-Image-2.1/resolve/main"
LICENCE_21 = (
    "is for non-commercial use only: [Qwen Research License](https://huggingface.co/Qwen/Qwen-Image-2.1/blob/main/"
    "LICENSE)."
)
LIGHTNING_URLS = tuple(
    f"https://huggingface.co/lightx2v/Qwen-Image-Lightning/resolve/main/{file}"
    for file in (
        "Qwen-Image/qwen_image_fp8_e4m3fn_scaled.safetensors",
        "Qwen-Image-Lightning-8steps-V2.0-bf16.safetensors",
    )
)

# what the registry's scanner has flagged in packs, in any text file
FLAGGED = [
    r"\.connect\(",
    r"\.bind\(",
    r"\.send\(",
    r"\.sendall\(",
    r"urllib\.request",
    r"aiohttp\.ClientSession",
    r"\bos\.environ",
    r"\bos\.getenv",
    r"\bsubprocess\b",
    r"\bos\.system\b",
    r"://raw\.githubusercontent\.com",
    r"(?<![.\w])(eval|exec)\(",
]
DEVELOPERS_ONLY = ("tests/", "tools/", "benchmarks/", "docs/", "miniature", ".ci/", ".github/", ".pre-commit", "dev.py")
DEVELOPERS_ONLY += ("CONTRIBUTING.md", "SECURITY.md")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def packed() -> list[str]:
    """The files of the registry's archive: those of the repository less what .comfyignore names."""
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")

    def listed(*options: str) -> set[str]:
        command = ["git", "ls-files", "-z", "--cached", "--others", *options]
        return set(subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True).stdout.decode().split("\0"))

    files = listed("--exclude-standard") - listed("--ignored", "--exclude-from=.comfyignore")
    return sorted(name for name in files if (REPOSITORY / name).is_file())


@pytest.fixture(scope="module")
def ours(object_info: dict[str, Any]) -> dict[str, Any]:
    return {name: info for name, info in object_info.items() if info["python_module"] == f"custom_nodes.{PACK_NAME}"}


def test_requirements_equal_the_projects_dependencies(project: dict[str, Any]) -> None:
    lines = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert lines == project["project"]["dependencies"]
    for line in lines:  # installers take them one by one, and the user's torch is not ours to change
        assert re.fullmatch(r"[A-Za-z0-9._-]+(>=[\d.]+(,<[\d.]+)?)?", line), line
        assert not re.match(r"(torch\w*|numpy|transformers)\b", line), line


def test_the_version_has_a_changelog_entry(project: dict[str, Any]) -> None:
    version = project["project"]["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(version)}\b", changelog, re.MULTILINE), f"CHANGELOG.md has no '## {version}'."


def test_the_project_file_has_nothing_that_breaks_installers(project: dict[str, Any]) -> None:
    assert "build-system" not in project, "pip would try to build the flat folder."
    assert "web" not in project["tool"]["comfy"], "WEB_DIRECTORY serves the scripts already; both load them twice."
    assert "dynamic" not in project["project"], "the registry would see no dependencies."
    assert {"PublisherId", "DisplayName", "requires-comfyui"} <= set(project["tool"]["comfy"])


def test_every_script_of_the_web_folder_is_the_extension_of_a_node_or_shared(ours: dict[str, Any]) -> None:
    folder = REPOSITORY / "js"
    scripts = sorted(folder.rglob("*.js"))
    extensions = [script for script in scripts if script.parent.name != "shared"]
    assert extensions
    for script in scripts:
        for imported in re.findall(r'from "([^"]+)"', script.read_text(encoding="utf-8")):
            served = (script.parent / imported).resolve()
            of_the_page = (folder.parents[1] / "scripts" / name for name in ("app.js", "api.js"))
            assert served in scripts or served in of_the_page, f"{script}: the page has no {imported}."
    for script in extensions:
        assert script.stem in ours, f"{script}: the page loads every .js here as an extension."
        text = script.read_text(encoding="utf-8")
        assert len(re.findall(r"^(app\.registerExtension|showText)\(", text, re.MULTILINE)) == 1, script


def test_the_archive_holds_what_users_need(packed: list[str]) -> None:
    wanted = ["LICENSE", "README.md", "CHANGELOG.md", "__init__.py", "pyproject.toml", "requirements.txt"]
    for folder in ("nodes", "engine", "js", "locales", "workflows"):
        paths = (REPOSITORY / folder).rglob("*")
        files = [path.relative_to(REPOSITORY) for path in paths if path.is_file()]
        wanted += [file.as_posix() for file in files if "__pycache__" not in file.parts]
    missing = sorted(set(wanted) - set(packed))
    assert not missing, f".comfyignore leaves out, or nobody wrote: {missing}"


def test_the_archive_holds_nothing_for_developers(packed: list[str]) -> None:
    assert [name for name in packed if name.startswith(DEVELOPERS_ONLY) or "test" in Path(name).stem.lower()] == []
    assert sum((REPOSITORY / name).stat().st_size for name in packed) < 4_000_000


def test_the_archive_has_no_text_that_registries_flag(packed: list[str]) -> None:
    found = []
    for name in packed:
        if Path(name).suffix in (".jpg", ".png", ".webp"):
            continue
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        found += [f"{name}: {match[0]}" for pattern in FLAGGED for match in re.finditer(pattern, text)]
    assert found == []


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_says_where_its_models_are(file: Path) -> None:
    nodes = json.loads(file.read_text(encoding="utf-8"))["nodes"]
    (loader,) = (node for node in nodes if node["type"] == LOADER)
    models = loader["properties"]["models"]
    assert [model["name"] for model in models] == loader["widgets_values"][:3]
    assert [model["directory"] for model in models] == ["diffusion_models", "text_encoders", "vae"]
    for lora in (node for node in nodes if node["type"] == LOAD_LORA):
        models += lora["properties"]["models"]
        assert [model["name"] for model in lora["properties"]["models"]] == lora["widgets_values"][:1]
        assert models[-1]["directory"] == "loras"
    (note,) = (node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote")
    for model in models:
        folders = (MODELS_URL, LAYERED_URL, URL_21)
        common = [f"{folder}/{model['directory']}/{model['name']}" for folder in folders]
        assert model["url"] in (*common, EDIT_URL, *LIGHTNING_URLS)
        assert model["url"].endswith(f"/{model['name']}")
        assert f"[{model['name']}]({model['url']})" in note


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_begins_with_a_licence_that_forbids_something(file: Path) -> None:
    nodes = json.loads(file.read_text(encoding="utf-8"))["nodes"]
    (loader,) = (node for node in nodes if node["type"] == LOADER)
    (note,) = (node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote")
    transformer = loader["widgets_values"][0]
    model = "Qwen-Image-2.1-Turbo" if "turbo" in transformer else "Qwen-Image-2.1"
    assert (note.splitlines()[0] == f"{model} {LICENCE_21}") == ("2.1" in transformer)
    assert ("License" in note) == ("2.1" in transformer)


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_has_a_thumbnail(file: Path) -> None:
    thumbnail = file.with_suffix(".jpg")
    assert thumbnail.read_bytes().startswith(b"\xff\xd8\xff")
    assert thumbnail.stat().st_size < 100_000


def test_every_node_explains_itself(ours: dict[str, Any]) -> None:
    for name, info in ours.items():
        assert info["description"], name
        assert info["category"] == "Qwen-Image (low VRAM)", name
        assert info["search_aliases"], name
        assert len(info["output_tooltips"]) == len(info["output"]), name
        assert all(info["output_tooltips"]), name
        for group in info["input"].values():
            for input_name, spec in group.items():
                assert spec[1].get("tooltip"), f"{name}.{input_name} has no tooltip."


def test_advanced_inputs_come_last(ours: dict[str, Any]) -> None:
    for name, info in ours.items():
        advanced = [bool(spec[1].get("advanced")) for spec in info["input"]["required"].values()]
        assert advanced == sorted(advanced), name


def test_saved_graphs_still_fit_the_nodes(ours: dict[str, Any]) -> None:
    snapshot = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    now = {name: interface(info) for name, info in ours.items()}
    for name, before in snapshot.items():
        assert name in now, f"{name} is gone: graphs that use it no longer open."
        for part in ("inputs", "outputs"):
            kept = now[name][part][: len(before[part])]
            assert kept == before[part], (
                f"{name}'s {part} changed. Saved graphs hold them by position: {part} may only be appended, never "
                "renamed, reordered or removed, and types and defaults stay."
            )
    assert now == snapshot, f"Something was added. Add it to {SNAPSHOT.relative_to(REPOSITORY)}: {json.dumps(now)}"


def interface(info: dict[str, Any]) -> dict[str, Any]:
    """Inputs in their order and outputs, without the choices: those depend on the user's files and on ComfyUI."""
    inputs = []
    for group, names in info["input_order"].items():
        for name in names:
            kind, options = (*info["input"][group][name], {})[:2]
            entry = {"name": name, "group": group, "type": "COMBO" if isinstance(kind, list) else kind}
            inputs.append(entry | ({"default": options["default"]} if "default" in options else {}))
    outputs = [{"name": name, "type": kind} for name, kind in zip(info["output_name"], info["output"], strict=True)]
    return {"inputs": inputs, "outputs": outputs}
