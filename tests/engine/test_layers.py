"""The engine stands alone, its imports point one way, and nothing in its modules changes while it runs."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ENGINE = Path(__file__).parents[2] / "engine"
MODULES = sorted(ENGINE.rglob("*.py"))
COMFYUI = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "nodes", "server", "execution"}
COMFYUI |= {"latent_preview", "node_helpers", "app", "api_server"}

# a room may import the rooms of lower layers, and those of its own layer where IN_LAYER says so
LAYERS = (
    {"errors"},
    {"gguf_header", "footprint", "hardware", "latents", "chunking"},
    {"checkpoint", "families", "formats", "gguf_names", "plan", "report"},
    {"streaming"},
    {"modulation", "prompts", "sampling", "text_encoder", "transformer", "vae"},
)
IN_LAYER = {
    "families": {"checkpoint", "gguf_names"},
    "formats": {"checkpoint"},
    "gguf_names": {"checkpoint"},
    "report": {"plan"},
    "transformer": {"modulation"},
}


def room_of(module: Path) -> str:
    return module.relative_to(ENGINE).parts[0].removesuffix(".py")


def imports(module: Path) -> Iterator[tuple[int, str]]:
    """(level, dotted name) of every import statement, wherever it stands."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module:
                yield node.level, node.module
            else:  # from . import name
                yield from ((node.level, alias.name) for alias in node.names)


def rooms_imported(module: Path) -> set[str]:
    inside = len(module.relative_to(ENGINE).parts)  # 1 in the engine's own folder, 2 in a package of it
    names = set()
    for level, name in imports(module):
        if level == inside:
            names.add(name.split(".")[0])
        elif level > inside:
            names.add(f"beyond the engine: {name}")
    return names - {room_of(module)}


def names_of(modules: list[Path]) -> list[str]:
    return [str(module.relative_to(ENGINE)) for module in modules]


def test_every_room_has_its_layer() -> None:
    assert {room_of(module) for module in MODULES} - {"__init__"} == set().union(*LAYERS)


@pytest.mark.parametrize("module", MODULES, ids=names_of(MODULES))
def test_the_engine_imports_nothing_of_comfyui(module: Path) -> None:
    assert not {name for level, name in imports(module) if level == 0 and name.split(".")[0] in COMFYUI}


@pytest.mark.parametrize("module", MODULES, ids=names_of(MODULES))
def test_imports_point_one_way(module: Path) -> None:
    room = room_of(module)
    if room == "__init__":
        assert not rooms_imported(module)
        return
    (layer,) = (i for i, rooms in enumerate(LAYERS) if room in rooms)
    allowed = set().union(*LAYERS[:layer]) | IN_LAYER.get(room, set())
    assert rooms_imported(module) <= allowed


@pytest.mark.parametrize("name", ["plan", "footprint", "checkpoint", "families", "report", "errors"])
def test_what_plans_needs_no_torch(name: str) -> None:
    assert not {n for level, n in imports(ENGINE / f"{name}.py") if n.split(".")[0] in ("torch", "diffusers")}


_MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)


@pytest.mark.parametrize("module", MODULES, ids=names_of(MODULES))
def test_no_module_has_a_variable_that_changes(module: Path) -> None:
    tree = ast.parse(module.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global), f"global {node.names} in line {node.lineno}"
    for node in tree.body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign)):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        made = ast.unparse(node.value.func) if isinstance(node.value, ast.Call) else ""
        if isinstance(node.value, _MUTABLE) or made in ("list", "dict", "set", "deque", "defaultdict"):
            assert all(name.isupper() or name == "__all__" for name in names), f"{names} in line {node.lineno}"
