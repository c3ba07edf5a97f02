"""The parts of dev.py that need no server: places, digests, links, conversion, tables."""

import json
import os
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from devtools import bench, link
from devtools.bench import table
from devtools.browser import installed_browsers
from devtools.cache import REPOSITORY, SetupError, cache_folder
from devtools.comfyui import find_comfyui, unpack_folder, verify_digest
from devtools.demo import ProgressPrinter, format_report
from devtools.demo_model import choose_model
from devtools.environment import (
    TORCH,
    engine_requirement_lines,
    requirement_lines,
    requirement_name,
    unsatisfied,
    venv_folder,
)
from devtools.link import LinkKind, link_folder, remove_link
from devtools.overlay import OLDEST_TORCH, OVERLAYS, environment_lines, with_overlay
from devtools.prepare import Need, announce
from devtools.workflow import CannotConvert, choices, set_widgets, to_prompt, widget_names
from qwenimage_lowvram.engine.environment import PACKAGES

INFO: dict[str, Any] = {
    "Load": {
        "input": {
            "required": {
                "name": [["a", "b"], {}],
                "kind": ["COMBO", {"options": ["x", "y"]}],
                "given": ["INT", {"forceInput": True}],
            },
            "optional": {"limit": ["FLOAT", {"default": 0.0}]},
        },
        "input_order": {"required": ["name", "kind", "given"], "optional": ["limit"]},
    },
    "Sample": {"input": {"required": {"model": ["MODEL"], "seed": ["INT", {}], "steps": ["INT", {}]}}},
    "Pass": {"input": {"required": {"other": ["CLIP"], "model": ["MODEL"]}}},
}


def node(identity: int, kind: str, values: Any = (), inputs: Any = (), outputs: Any = (), mode: int = 0) -> Any:
    return {
        "id": identity,
        "type": kind,
        "mode": mode,
        "order": identity,
        "inputs": [{"name": name, "type": wire, "link": link_id} for name, wire, link_id in inputs],
        "outputs": [{"name": wire, "type": wire} for wire in outputs],
        "widgets_values": values,
    }


def chain(middle_mode: int = 0, middle: str = "Pass") -> dict[str, Any]:
    """Load -> middle -> Sample, and a note."""
    return {
        "nodes": [
            node(1, "Load", ["b", "y", 2.5], outputs=["MODEL"]),
            node(2, middle, [], [("other", "CLIP", None), ("model", "MODEL", 7)], ["MODEL"], middle_mode),
            node(3, "Sample", [42, "randomize", 20], [("model", "MODEL", 8)]),
            node(4, "MarkdownNote", ["words"]),
        ],
        "links": [[7, 1, 0, 2, 1, "MODEL"], [8, 2, 0, 3, 0, "MODEL"]],
    }


def test_widgets_and_links_become_inputs() -> None:
    prompt = to_prompt(chain(), INFO)
    assert prompt["1"] == {"class_type": "Load", "inputs": {"name": "b", "kind": "y", "limit": 2.5}}
    assert prompt["2"]["inputs"] == {"model": ["1", 0]}
    assert prompt["3"]["inputs"] == {"seed": 42, "steps": 20, "model": ["2", 0]}
    assert set(prompt) == {"1", "2", "3"}


def test_a_bypassed_node_hands_the_input_of_its_type_through() -> None:
    prompt = to_prompt(chain(middle_mode=4), INFO)
    assert "2" not in prompt
    assert prompt["3"]["inputs"]["model"] == ["1", 0]


def test_a_muted_node_leaves_its_successors_without_input() -> None:
    prompt = to_prompt(chain(middle_mode=2), INFO)
    assert prompt["3"]["inputs"] == {"seed": 42, "steps": 20}


def test_a_reroute_is_followed() -> None:
    graph = chain(middle="Reroute")
    graph["nodes"][1]["inputs"] = [{"name": "", "type": "*", "link": 7}]
    assert to_prompt(graph, INFO)["3"]["inputs"]["model"] == ["1", 0]


def nested(values: Any = ()) -> dict[str, Any]:
    """Load -> a subgraph with a Pass and a Sample in it -> Pass."""
    inside = {
        "id": "sub",
        "inputNode": {"id": -10},
        "outputNode": {"id": -20},
        "inputs": [{"name": "wire", "linkIds": [1]}, {"name": "steps", "linkIds": [4]}],
        "outputs": [{"name": "MODEL", "linkIds": [3]}],
        "nodes": [
            node(1, "Pass", [], [("model", "MODEL", 1)], ["MODEL"]),
            node(2, "Sample", [42, "randomize", 20], [("model", "MODEL", 2), ("steps", "INT", 4)]),
        ],
        "links": [
            {"id": i, "origin_id": a, "origin_slot": b, "target_id": c, "target_slot": d, "type": kind}
            for i, a, b, c, d, kind in (
                (1, -10, 0, 1, 0, "MODEL"),
                (2, 1, 0, 2, 0, "MODEL"),
                (3, 1, 0, -20, 0, "MODEL"),
                (4, -10, 1, 2, 1, "INT"),
            )
        ],
    }
    graph = chain(middle="sub")
    instance = node(2, "sub", values, [("wire", "MODEL", 7), ("steps", "INT", None)], ["MODEL"])
    graph["nodes"][1] = instance | {"properties": {"proxyWidgets": [["-1", "steps"], ["2", "seed"]]}}
    graph["nodes"][2] = node(3, "Pass", [], [("model", "MODEL", 8)])
    return graph | {"definitions": {"subgraphs": [inside]}}


def test_a_subgraph_is_unpacked_and_what_its_node_says_of_widgets_counts() -> None:
    prompt = to_prompt(nested(), INFO)
    assert set(prompt) == {"1", "2:1", "2:2", "3"}
    assert prompt["2:1"]["inputs"] == {"model": ["1", 0]}
    assert prompt["2:2"]["inputs"] == {"seed": 42, "steps": 20, "model": ["2:1", 0]}
    assert prompt["3"]["inputs"] == {"model": ["2:1", 0]}
    assert to_prompt(nested([9, 7]), INFO)["2:2"]["inputs"] == {"seed": 7, "steps": 9, "model": ["2:1", 0]}


def test_a_bypassed_subgraph_hands_its_input_through() -> None:
    graph = nested()
    graph["nodes"][1]["mode"] = 4
    assert to_prompt(graph, INFO)["3"]["inputs"] == {"model": ["1", 0]}


def test_unknown_nodes_are_refused() -> None:
    with pytest.raises(CannotConvert, match=r"'Nope' \(node 2\)"):
        to_prompt(chain(middle="Nope"), INFO)


def test_a_widget_is_set_behind_a_seed_control_and_the_graph_stays_as_it_was() -> None:
    graph = chain()
    changed = set_widgets(graph, INFO, "Sample", steps=4)
    assert to_prompt(changed, INFO)["3"]["inputs"]["steps"] == 4
    assert graph["nodes"][2]["widgets_values"] == [42, "randomize", 20]
    with pytest.raises(CannotConvert, match="no widget cfg; it has seed, steps"):
        set_widgets(graph, INFO, "Sample", cfg=1)


def test_widget_order_is_that_of_the_file() -> None:
    assert list(widget_names(INFO["Load"])) == ["name", "kind", "limit"]
    assert list(widget_names(INFO["Sample"])) == ["seed", None, "steps"]
    assert choices(INFO, "Load", "name") == ["a", "b"]
    assert choices(INFO, "Load", "kind") == ["x", "y"]


@pytest.mark.parametrize(
    ("platform", "environ", "expected"),
    [
        ("linux", {"HOME": "/home/a"}, "/home/a/.cache"),
        ("linux", {"HOME": "/home/a", "XDG_CACHE_HOME": "/scratch"}, "/scratch"),
        ("darwin", {"HOME": "/Users/a", "XDG_CACHE_HOME": "/scratch"}, "/Users/a/Library/Caches"),
        ("win32", {"USERPROFILE": "/U/a", "LOCALAPPDATA": "/U/a/Local"}, "/U/a/Local"),
        ("win32", {"USERPROFILE": "/U/a"}, "/U/a/AppData/Local"),
    ],
)
def test_the_cache_lies_where_the_platform_wants_it(platform: str, environ: dict[str, str], expected: str) -> None:
    assert cache_folder(platform, environ) == Path(expected) / "comfyui-qwenimage-lowvram"


def test_a_wrong_digest_is_an_error_that_names_both(tmp_path: Path) -> None:
    file = tmp_path / "archive.tar.gz"
    file.write_bytes(b"something else")
    with pytest.raises(SetupError, match=r"archive.tar.gz has SHA-256 \w{64}, expected de5d.*COMFYUI_PATH"):
        verify_digest(file, "de5d")


def test_only_the_inner_folder_is_unpacked_and_nothing_outside_it(tmp_path: Path) -> None:
    content = tmp_path / "x"
    content.write_text("hello")
    archive = tmp_path / "a.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(content, "top/vendor/ComfyUI/comfy/a.py")
        tar.add(content, "top/other.py")
    unpack_folder(archive, "vendor/ComfyUI/", tmp_path / "out")
    assert [file.relative_to(tmp_path / "out") for file in (tmp_path / "out").rglob("*.py")] == [Path("comfy/a.py")]
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(content, "top/vendor/ComfyUI/../../../outside.py")
    with pytest.raises(SetupError, match="points outside"):
        unpack_folder(archive, "vendor/ComfyUI/", tmp_path / "out2")
    assert not (tmp_path / "outside.py").exists()


def make_comfyui(folder: Path) -> Path:
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").touch()
    (folder / "nodes.py").touch()
    return folder


def test_comfyui_path_comes_before_the_one_around_the_pack_and_the_cached_one(tmp_path: Path) -> None:
    given, around = make_comfyui(tmp_path / "given"), make_comfyui(tmp_path / "around")
    cached = make_comfyui(tmp_path / "cache" / "ComfyUI-0.30.0")
    pack, cache = around / "custom_nodes" / "pack", tmp_path / "cache"
    assert find_comfyui({"COMFYUI_PATH": str(given)}, pack, cache) == given
    assert find_comfyui({}, pack, cache) == around
    assert find_comfyui({}, tmp_path / "elsewhere" / "pack", cache) == cached
    assert find_comfyui({}, tmp_path / "elsewhere" / "pack", tmp_path) is None
    with pytest.raises(SetupError, match="COMFYUI_PATH is"):
        find_comfyui({"COMFYUI_PATH": str(tmp_path)}, pack, cache)


def test_a_folder_is_linked_and_the_link_replaced(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        (folder / "file").write_text(folder.name)
    target = tmp_path / "custom_nodes" / "pack"
    for folder in (first, second):
        link_folder(folder, target)
        assert (target / "file").read_text() == folder.name
    remove_link(target)
    assert not target.exists()
    assert (second / "file").exists()


def test_where_no_link_can_be_made_the_folder_is_copied_or_the_error_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    monkeypatch.setattr(link, "_make_junction", lambda *_: False)
    source = tmp_path / "pack"
    (source / ".git").mkdir(parents=True)
    (source / "file").write_text("1")
    assert link_folder(source, tmp_path / "copy") is LinkKind.COPY
    assert [entry.name for entry in (tmp_path / "copy").iterdir()] == ["file"]
    (source / "file").write_text("2")
    link_folder(source, tmp_path / "copy")  # a copy is made anew each time
    assert (tmp_path / "copy" / "file").read_text() == "2"
    with pytest.raises(OSError, match="no links here"):
        link_folder(source, tmp_path / "other", may_copy=False)


def test_each_comfyui_version_has_its_environment(tmp_path: Path) -> None:
    assert venv_folder(tmp_path, "0.30.0") == tmp_path / "venv"
    assert venv_folder(tmp_path, "0.33.0") == tmp_path / "venv-0.33.0"


def test_requirements_are_comfyuis_and_ours_with_torch_pinned(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("torch\ncomfyui-frontend-package==1.2.3\n\n#optional:\nav>=16 # video\n")
    lines = requirement_lines(tmp_path)
    assert "torch==2.14.1" in lines
    assert "torch" not in lines
    assert "comfyui-frontend-package==1.2.3" in lines
    assert "av>=16" in lines
    assert any(line.startswith("diffusers") for line in lines)
    assert not [line for line in lines if "#" in line]


def test_an_environment_is_asked_for_what_it_lacks(tmp_path: Path) -> None:
    assert unsatisfied(tmp_path / "none", ["pip"]) == ["pip"]
    here = Path(sys.prefix)
    stamp = here / "installed-requirements.txt"
    before = stamp.read_bytes() if stamp.exists() else None
    wanted = ["pytest>=1", "pytest<1", "no-such-package-at-all", "no-such-package; python_version < '3'"]
    assert unsatisfied(here, wanted) == ["pytest<1", "no-such-package-at-all"]
    assert (stamp.read_bytes() if stamp.exists() else None) == before


def test_other_packages_come_before_those_of_the_environment_and_are_no_torch(tmp_path: Path) -> None:
    found = with_overlay({"PYTHONPATH": "ours", "HOME": "h"}, tmp_path)
    assert found == {"PYTHONPATH": os.pathsep.join([str(tmp_path), "ours"]), "HOME": "h"}
    for overlay in OVERLAYS:
        assert not [line for line in overlay.requirements if line.startswith("torch")]
        assert [name for name in overlay.tests if not (REPOSITORY / name).exists()] == []
    oldest = dict(line.split("==") for line in OVERLAYS[0].requirements if "==" in line)
    for bounds in PACKAGES:
        if bounds.name in oldest:
            assert oldest[bounds.name].startswith(bounds.oldest), "the README and the check promise an older one"


def test_what_is_missing_is_announced_and_a_full_disk_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    announce(tmp_path / "not" / "there", [Need("ComfyUI", 12, 60)])
    assert "ComfyUI" in (printed := capsys.readouterr().out)
    assert "GB free" in printed
    with pytest.raises(SetupError, match="That needs 1000000000"):
        announce(tmp_path, [Need("everything", 1, 10**12)])
    announce(tmp_path, [])
    assert "everything" in capsys.readouterr().out


def test_browsers_are_found_on_the_path_and_in_the_usual_places(tmp_path: Path) -> None:
    edge = tmp_path / "Microsoft" / "Edge" / "Application" / "msedge.exe"
    edge.parent.mkdir(parents=True)
    edge.touch()
    assert list(installed_browsers("win32", {"PROGRAMFILES": str(tmp_path), "PATH": ""})) == [edge]
    if os.name == "posix":
        chrome = tmp_path / "google-chrome"
        chrome.touch(mode=0o755)
        assert list(installed_browsers("linux", {"PATH": str(tmp_path)})) == [chrome]


def test_a_transformer_file_needs_its_neighbours(tmp_path: Path) -> None:
    file = tmp_path / "models" / "diffusion_models" / "qwen_image_bf16.safetensors"
    file.parent.mkdir(parents=True)
    file.touch()
    base = tmp_path / "base"
    (base / "models" / "diffusion_models").mkdir(parents=True)
    with pytest.raises(SetupError, match="no folder text_encoders, vae"):
        choose_model(file, base)
    (tmp_path / "models" / "clip").mkdir()
    (tmp_path / "models" / "vae").mkdir()
    model = choose_model(file, base)
    assert model.transformer == file.name
    assert json.dumps(str(tmp_path / "models")) in Path(model.server_arguments[1]).read_text()
    with pytest.raises(SetupError, match="neither a pipeline folder"):
        choose_model(tmp_path, base)


def test_a_report_is_readable() -> None:
    text = format_report({"peak_vram_bytes": 1_900_000_000, "seconds": 1.23456, "plan": "2 slots\n4 GB"})
    assert text.splitlines() == [
        "  peak vram        1.900 GB",
        "  seconds          1.235",
        "  plan             2 slots",
        "                   4 GB",
    ]
    assert format_report("words") == "words"


def test_progress_prints_one_line_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    printer = ProgressPrinter()
    for step, block in ((1, 1), (1, 2), (2, 1)):
        printer("qwen_lowvram.progress", {"stage": "sampling", "step": step, "steps": 2, "block": block, "blocks": 2})
    printer("status", {})
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_benchmarks_table_lines_up() -> None:
    rows = [{"case": "a", "who": "ours", "seconds": 1.0, "peak_bytes": 2_000_000_000}, {"who": "peer", "error": "OOM"}]
    assert table(rows).splitlines() == [
        "who   case  seconds  peak GB  error",
        "ours  a       1.000    2.000",
        "peer                          OOM",
    ]


def test_a_benchmark_prints_its_table_and_writes_rows_and_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = "def rows(quick):\n    return [{'who': 'ours', 'case': 'quick' if quick else 'full', 'seconds': 0.5}]\n"
    (tmp_path / "step.py").write_text(source)
    monkeypatch.setattr(bench, "BENCHMARKS", tmp_path)
    assert bench.main(["step", "--quick", "--json", str(tmp_path / "out.json")]) == 0
    assert "ours  quick    0.500" in capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["rows"] == [{"who": "ours", "case": "quick", "seconds": 0.5}]
    assert written["machine"]["cores"] == os.cpu_count()
    assert written["machine"]["torch"]
    with pytest.raises(SystemExit):
        bench.main(["nothing-of-the-kind"])


def test_an_environment_of_another_age_has_each_package_once() -> None:
    for overlay, torch in zip(OVERLAYS, (OLDEST_TORCH, TORCH), strict=True):
        lines = environment_lines(overlay)
        assert {*torch, *overlay.requirements} <= set(lines)
        names = [requirement_name(line) for line in lines]
        assert len(names) == len(set(names))
        assert {"pytest", "gguf", "transformers", "bitsandbytes"} <= set(names)
    bounds = {bounds.name: bounds for bounds in PACKAGES}
    assert OLDEST_TORCH[0].startswith(f"torch=={bounds['torch'].oldest}")


def test_the_engines_tests_ask_for_no_package_of_comfyui_alone() -> None:
    lines = engine_requirement_lines()
    assert any(line.startswith("transformers") for line in lines)
    assert not [line for line in lines if "comfyui" in line and "guard" not in line]
