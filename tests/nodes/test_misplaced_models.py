"""Models that stand where they do not belong are told, and refused, before anything of the graph has run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from devtools.cache import REPOSITORY
from qwenimage_lowvram.engine.errors import InvalidRequest, QwenLowVRAMError, WrongModel
from qwenimage_lowvram.nodes import live_plan
from qwenimage_lowvram.nodes.live_plan import PlanLine, lines_of, refuse_what_cannot_run

Nodes = dict[str, tuple[str, dict[str, Any]]]
FOLDERS = {"text_encoder": "from the folder", "vae": "from the folder", "dtype": "fp32"}


@pytest.fixture(autouse=True)
def _as_custom_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI knows what our nodes are called, too."""
    from qwenimage_lowvram.nodes import NODE_DISPLAY_NAME_MAPPINGS

    import nodes

    for kind, title in NODE_DISPLAY_NAME_MAPPINGS.items():
        monkeypatch.setitem(nodes.NODE_DISPLAY_NAME_MAPPINGS, kind, title)


@pytest.fixture
def line_of(
    models: Callable[[str, Path], None], small_pipeline: Path, diffusers_21: Path
) -> Callable[..., tuple[PlanLine, QwenLowVRAMError | None]]:
    """`line_of({node: (class, inputs)}, **loader's)`: what is told of a graph with these nodes beside or instead of its
    own, and what its Encode is refused with. Node 1 loads a 20B model, 9 one of 2.1."""
    models("diffusers", small_pipeline.parent)
    models("diffusers", diffusers_21)
    (other,) = (folder.name for folder in diffusers_21.iterdir())

    def line(changed: Nodes, **settings: Any) -> tuple[PlanLine, QwenLowVRAMError | None]:
        ends = {"model": ["1", 0], "positive": ["2", 0], "negative": ["2", 1], "latent_image": ["3", 0]}
        nodes: Nodes = {
            "1": ("QwenLowVRAMLoader", {"transformer": f"{small_pipeline.name} (folder)", **FOLDERS, **settings}),
            "2": ("QwenLowVRAMEncodePrompts", {"clip": ["1", 1], "positive": "a cat", "negative": " "}),
            "3": ("EmptySD3LatentImage", {"width": 64, "height": 64, "batch_size": 1}),
            "4": ("QwenLowVRAMSample", {**ends, "steps": 4, "cfg": 4.0}),
            "5": ("QwenLowVRAMDecode", {"samples": ["4", 0], "vae": ["1", 2], "tile_size": 0}),
            "9": ("QwenLowVRAMLoader", {"transformer": f"{other} (folder)", **FOLDERS}),
        }
        prompt = {id: {"class_type": kind, "inputs": inputs} for id, (kind, inputs) in (nodes | changed).items()}
        (told,) = lines_of(prompt)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(live_plan, "executing_node_id", lambda: "2")
            try:
                refuse_what_cannot_run(prompt)
            except QwenLowVRAMError as error:
                return told, error
        return told, None

    return line


def test_models_where_they_belong_are_not_refused(line_of: Any) -> None:
    told, refusal = line_of({})
    assert (told.fits, told.values["doubts"], refusal) == (True, [], None)


@pytest.mark.parametrize(
    ("node", "kind", "inputs", "title"),
    [
        ("5", "QwenLowVRAMDecode", {"samples": ["4", 0], "vae": ["9", 2], "tile_size": 0}, "Decode (tiled)"),
        ("7", "VAEDecode", {"samples": ["8", 0], "vae": ["9", 2]}, "VAE Decode"),  # of latents that are changed before
        ("2", "QwenLowVRAMEncodePrompts", {"clip": ["9", 1], "positive": "a", "negative": ""}, "Encode Prompts"),
        ("3", "VAEEncode", {"pixels": ["10", 0], "vae": ["9", 2]}, "VAE Encode"),
    ],
)
def test_a_part_of_another_model_is_told_at_its_node(
    line_of: Any, node: str, kind: str, inputs: dict[str, Any], title: str
) -> None:
    told, refusal = line_of(
        {
            "8": ("LatentUpscale", {"samples": ["4", 0]}),
            "10": ("LoadImage", {"image": "none.png"}),
            "11": ("SaveImage", {"images": [node, 0]}),
            node: (kind, inputs),
        }
    )
    assert isinstance(refusal, WrongModel)
    assert refusal.values["at"] == node
    assert title in str(refusal)
    assert "of the loader that has loaded Qwen-Image" in str(refusal)
    assert (told.fits, told.values) == (False, refusal.as_dict())


def test_another_models_image_is_no_part_of_this_run(line_of: Any) -> None:
    """An image that another model makes is edited, or goes on to it."""
    decoded = ("VAEDecode", {"samples": ["12", 0], "vae": ["9", 2]})
    edit = {"clip": ["1", 1], "vae": ["1", 2], "image1": ["10", 0], "positive": "a", "negative": "", "megapixels": 1.0}
    further = {"model": ["9", 0], "latent_image": ["4", 0]}  # makes other latents
    nodes = {
        "2": ("QwenLowVRAMEncodeEditPrompt", edit),
        "10": decoded,
        "12": ("SomeSampler", {}),
        "13": ("KSampler", further),
        "14": ("VAEDecode", {"samples": ["13", 0], "vae": ["9", 2]}),
    }
    nodes["13"] = ("KSampler", further | {"model": ["20", 0]})
    nodes["15"] = ("VAEDecode", {"samples": ["4", 0], "vae": ["9", 2]})  # which nothing takes
    told, refusal = line_of(nodes)
    assert (told.fits, refusal) == (True, None)
    assert [doubt["code"] for doubt in told.values["doubts"]] == ["told.image_for_no_editor"]
    assert "was not trained for" in told.text
    told, refusal = line_of(nodes, variant="Qwen-Image-Edit-2509")
    assert (told.values["doubts"], refusal) == ([], None)


def test_a_prompts_text_may_come_from_another_models_encoder(line_of: Any) -> None:
    enhanced = {"clip": ["1", 1], "positive": ["6", 0], "negative": ""}
    nodes = {"2": ("QwenLowVRAMEncodePrompts", enhanced), "6": ("TextGenerate", {"clip": ["9", 1], "prompt": "a"})}
    told, refusal = line_of(nodes)
    assert (told.fits, refusal) == (True, None)
    told, refusal = line_of(nodes, variant="Qwen-Image-Edit-2509")  # no image comes with a text
    assert refusal.code == "graph.no_image_to_edit"


def test_an_image_of_an_earlier_stage_is_not_shown_to_this_model(line_of: Any) -> None:
    edit = {"clip": ["1", 1], "vae": ["1", 2], "image1": ["10", 0], "positive": "a", "negative": "", "megapixels": 1.0}
    ends = {"positive": ["2", 0], "negative": ["2", 1], "control_net": ["16", 0], "image": ["14", 0], "strength": 0.0}
    nodes = {
        "12": ("QwenLowVRAMEncodeEditPrompt", edit),
        "13": ("KSampler", {"model": ["20", 0], "positive": ["12", 0], "latent_image": ["12", 2]}),
        "14": ("VAEDecode", {"samples": ["13", 0], "vae": ["1", 2]}),
        "17": ("ControlNetApplyAdvanced", ends),
        "4": ("QwenLowVRAMSample", {"model": ["1", 0], "positive": ["17", 0], "latent_image": ["3", 0], "steps": 4}),
    }
    told, _ = line_of(nodes)
    assert (told.fits, told.values["doubts"]) == (True, [])


def test_an_image_may_reach_an_editing_model_by_a_guider_of_two_prompts(line_of: Any) -> None:
    guider = {"model": ["1", 0], "cond1": ["6", 0], "cond2": ["2", 0], "negative": ["2", 1], "cfg_conds": 4.0}
    nodes = {
        "6": ("ReferenceLatent", {"conditioning": ["2", 0], "latent": ["3", 0]}),
        "7": ("DualCFGGuider", guider),
        "4": ("SamplerCustomAdvanced", {"guider": ["7", 0], "latent_image": ["3", 0], "sigmas": ["8", 0]}),
        "8": ("BasicScheduler", {"steps": 4}),
    }
    told, refusal = line_of(nodes, variant="Qwen-Image-Edit-2509")
    assert (told.fits, refusal) == (True, None)


def test_an_editing_model_that_no_image_reaches_is_refused_before_its_prompt_is_encoded(line_of: Any) -> None:
    told, refusal = line_of({}, variant="Qwen-Image-Edit-2509")
    assert isinstance(refusal, InvalidRequest)
    assert refusal.code == "graph.no_image_to_edit"
    assert (told.fits, told.text) == (False, str(refusal))
    image = ("ReferenceLatent", {"conditioning": ["2", 0], "latent": ["3", 0]})
    sampler = {"model": ["1", 0], "positive": ["6", 0], "negative": ["2", 1], "latent_image": ["3", 0], "steps": 4}
    told, refusal = line_of({"6": image, "4": ("QwenLowVRAMSample", sampler)}, variant="Qwen-Image-Edit-2509")
    assert (told.fits, refusal) == (True, None)


def test_a_vae_files_header_tells_whose_it_is(
    line_of: Any, models: Callable[[str, Path], None], diffusers_21: Path, small_pipeline: Path, tmp_path: Path
) -> None:
    (other,) = diffusers_21.iterdir()
    models("vae", tmp_path)
    for name, folder in (("misplaced_21.safetensors", other), ("misplaced_own.safetensors", small_pipeline)):
        (tmp_path / name).hardlink_to(folder / "vae" / "diffusion_pytorch_model.safetensors")
    decode = ("QwenLowVRAMDecode", {"samples": ["4", 0], "vae": ["6", 0], "tile_size": 0})
    for name, right in (("misplaced_21.safetensors", False), ("misplaced_own.safetensors", True), ("no", True)):
        told, _ = line_of(
            {"5": decode, "6": ("VAELoader", {"vae_name": name}), "7": ("PreviewImage", {"images": ["5", 0]})}
        )
        assert told.fits is right, name


def test_the_nodes_that_a_chinese_page_names_are_comfyuis() -> None:
    import nodes

    words = json.loads((REPOSITORY / "js" / "shared" / "error_words_zh.json").read_text(encoding="utf-8"))
    assert words["comfyui_nodes"].keys() <= set(nodes.NODE_DISPLAY_NAME_MAPPINGS.values())
