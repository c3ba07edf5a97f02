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


def test_every_script_of_the_web_folder_is_of_a_node_or_a_command_or_shared(ours: dict[str, Any]) -> None:
    folder = REPOSITORY / "js"
    scripts = sorted(folder.rglob("*.js"))
    extensions = [script for script in scripts if script.parent.name not in ("shared", "commands")]
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


def test_every_node_explains_itself(ours: dict[str, Any]) -> None:
    for name, info in ours.items():
        assert info["description"], name
        assert info["category"] == "Qwen-Image (low VRAM)", name
        assert info["search_aliases"], name
        assert len(info["output_tooltips"]) == len(info["output"]), name
        assert all(info["output_tooltips"]), name
        for group in ("required", "optional"):
            for input_name, spec in info["input"].get(group, {}).items():
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
        for name in names if group != "hidden" else ():  # which graphs do not hold
            kind, options = (*info["input"][group][name], {})[:2]
            entry = {"name": name, "group": group, "type": "COMBO" if isinstance(kind, list) else kind}
            inputs.append(entry | ({"default": options["default"]} if "default" in options else {}))
    outputs = [{"name": name, "type": kind} for name, kind in zip(info["output_name"], info["output"], strict=True)]
    return {"inputs": inputs, "outputs": outputs}
