"""Imports point one way: engine, adapters, nodes; and nothing in the engine's modules changes while it runs."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ENGINE = Path(__file__).parents[2] / "engine"
MODULES = sorted(ENGINE.rglob("*.py"))
ADAPTERS = sorted((ENGINE.parent / "nodes" / "adapters").glob("*.py"))
COMFYUI = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "nodes", "server", "execution"}
COMFYUI |= {"latent_preview", "node_helpers", "app", "api_server"}

# of the engine, from the top: each imports from those below it
FLOORS = (
    {"runs"},
    {"caches", "lora"},
    {"models"},
    {"reports", "streaming"},
    {"planning"},
    {"compute", "formats"},
    {"files"},
    {"drivers", "environment", "hardware", "host_ram", "numerics", "out_of_memory", "packages", "page_locks"},
    {"errors", "log", "texts", "told"},
)
HEIGHT = {room: len(FLOORS) - floor for floor, rooms in enumerate(FLOORS) for room in rooms}


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


@pytest.mark.parametrize("module", MODULES, ids=names_of(MODULES))
def test_the_engine_imports_nothing_of_comfyui(module: Path) -> None:
    assert not {name for level, name in imports(module) if level == 0 and name.split(".")[0] in COMFYUI}


@pytest.mark.parametrize("module", MODULES, ids=names_of(MODULES))
def test_imports_point_one_way(module: Path) -> None:
    rooms = rooms_imported(module)
    assert not {room for room in rooms if room.startswith("beyond")}
    if room_of(module) == "__init__":
        assert not rooms
    else:
        assert not {room for room in rooms if HEIGHT[room] > HEIGHT[room_of(module)]}


def test_no_two_rooms_import_each_other() -> None:
    imported: dict[str, set[str]] = {}
    for module in MODULES:
        imported.setdefault(room_of(module), set()).update(rooms_imported(module))
    while free := [room for room, rooms in imported.items() if not rooms & imported.keys()]:
        for room in free:
            del imported[room]
    assert not imported


@pytest.mark.parametrize("module", ADAPTERS, ids=lambda module: module.stem)
def test_an_adapter_knows_no_node(module: Path) -> None:
    assert {name for level, name in imports(module) if level == 2} <= {"display_names"}


# of `models/`: what tells files apart, and what passes take
HEADERS = ("component", "foreign", "prefixes", "recognition", "sorting", "table", "tensors", "variants", "costs")
HEADERS += (
    "attention_kernels",
    "chunk_sizes",
    "step_schedules",
    "gguf_names",
    "vision_tensors",
    "text_tensors",
    "vision_files",
    "edit_sizes",
    "prompt_template",
)
WITHOUT_TORCH = sorted(
    [
        *(ENGINE / "planning").glob("*.py"),
        *(ENGINE / "files").glob("*.py"),
        *(
            module
            for room in ("models", "compute")
            for module in (ENGINE / room).rglob("*.py")
            if module.stem in HEADERS
        ),
        ENGINE / "errors.py",
    ]
)


@pytest.mark.parametrize("module", WITHOUT_TORCH, ids=lambda module: f"{module.parent.name}.{module.stem}")
def test_what_plans_needs_no_torch(module: Path) -> None:
    assert not {n for level, n in imports(module) if n.split(".")[0] in ("torch", "diffusers")}


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
