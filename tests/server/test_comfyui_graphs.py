"""ComfyUI's own Qwen-Image graphs with nothing but the three loaders replaced by ours: the same latents and image.

The image that they are shown has the size that their nodes give a reference.
"""

import io
import json
from pathlib import Path
from typing import Any

import comfyui_workflow_templates_json
import numpy as np
import pytest
import torch
from devtools.client import Run
from devtools.comfyui import require_comfyui
from devtools.workflow import to_prompt
from lora_files import make_parts, write_lora
from PIL import Image

from .conftest import SHARED, Mixing
from .graphs import Prompt, with_our_loader

BLUEPRINTS = require_comfyui() / "blueprints"
TEMPLATES = Path(next(iter(comfyui_workflow_templates_json.__path__))) / "templates"
EDIT, EDIT_2509, EDIT_2511 = "Qwen-Image-Edit", "Qwen-Image-Edit-2509", "Qwen-Image-Edit-2511"
# how many images each shows. Edits are made at 1024x1024, a minute each on a CPU: of those, one of each model. That all
# templates make the same prompts is seen in tests/page/test_use_loader.py.
GRAPHS: list[tuple[Path, str, int]] = [
    (BLUEPRINTS / "Text to Image (Qwen-Image).json", "auto", 0),
    (BLUEPRINTS / "Text to Image (Qwen-Image 2512).json", "auto", 0),
    (BLUEPRINTS / "Image Edit (Qwen 2509).json", EDIT_2509, 1),
    (TEMPLATES / "image_qwen_image.json", "auto", 0),
    (TEMPLATES / "image_qwen_Image_2512.json", "auto", 0),
    (TEMPLATES / "image_qwen_image_2512_with_2steps_lora.json", "auto", 0),
    (TEMPLATES / "image_qwen_image_edit.json", EDIT, 1),
    (TEMPLATES / "image_qwen_image_edit_2511.json", EDIT_2511, 2),
]
# graphs that control, pad and scale, made small; their images have even numbers of patches, see above
SMALL: dict[str, dict[str, dict[str, Any]]] = {
    "Image Outpainting (Qwen-Image)": {
        "PrimitiveInt": {"value": 192},
        "ControlNetLoader": {"control_net_name": "inpaint.safetensors"},
        "ImagePadForOutpaint": {"left": 40, "right": 24, "top": 0, "bottom": 0},
    },
    "image_qwen_image_instantx_inpainting_controlnet": {
        "ControlNetLoader": {"control_net_name": "inpaint.safetensors"},
        "ImageScaleToMaxDimension": {"largest_size": 128},
    },
    "image_qwen_image_controlnet_patch": {
        "ModelPatchLoader": {"name": "canny.safetensors"},
        "ImageScaleToTotalPixels": {"megapixels": 0.0176, "resolution_steps": 1},
    },
    "image_qwen_image_union_control_lora": {"ImageScaleToTotalPixels": {"megapixels": 0.0176}},
}
LAYERS = {f"transformer_blocks.{i}.attn.{name}": (64, 64) for i in range(4) for name in ("to_q", "to_out.0")}


@pytest.fixture(scope="module")
def server_nodes(mixing: Mixing) -> dict[str, Any]:
    return mixing.client.object_info()


@pytest.fixture(scope="module")
def lora(mixing: Mixing) -> str:
    """A small LoRA in the names of Lightning's files."""
    folder = mixing.server.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    layers = {
        name: make_parts("lora", shape, seed=i) | {"alpha": torch.tensor(2.0)}
        for i, (name, shape) in enumerate(LAYERS.items())
    }
    return write_lora(folder / "lightning.safetensors", layers, "Lightning").name


def opened(
    path: Path, mixing: Mixing, server_nodes: Any, lora: str, variant: str = "auto", turbo: bool = False
) -> Prompt:
    """The graph as a prompt at a small size, on the small files, its latents and its image saved."""
    graph = json.loads(path.read_text(encoding="utf-8"))
    graph["nodes"] = [node for node in graph["nodes"] if not node["type"].startswith("SaveImage")]
    prompt = to_prompt(_with_image(graph), server_nodes)
    steps = 1 if "dit" in path.stem else 3
    files = mixing.files["2511" if variant == EDIT_2511 else "plain"]
    changes: dict[str, dict[str, Any]] = {
        "UNETLoader": {"unet_name": files.transformer},
        "CLIPLoader": {"clip_name": files.text_encoder},
        "VAELoader": {"vae_name": files.vae},
        "LoraLoaderModelOnly": {"lora_name": lora},
        "LoadImage": {"image": mixing.photo("square.png", 1024, 1024)},
        "EmptySD3LatentImage": {"width": 128, "height": 96},
        "PrimitiveBoolean": {"value": turbo},
        "PrimitiveInt": {"value": steps},
        "CLIPTextEncode": {"text": "a red circle"},
        "TextEncodeQwenImageEdit": {"prompt": "make it red"},
        "TextEncodeQwenImageEditPlus": {"prompt": "make it red"},
    }
    changes |= SMALL.get(path.stem, {})
    (sampler,) = (node for node, value in prompt.items() if value["class_type"] == "KSampler")
    (decoder,) = (node for node, value in prompt.items() if value["class_type"] == "VAEDecode")
    for value in prompt.values():
        value["inputs"] |= changes.get(value["class_type"], {})
    if not isinstance(prompt[sampler]["inputs"]["steps"], list):
        prompt[sampler]["inputs"]["steps"] = steps
    return prompt | {
        "latents": {"class_type": "SaveLatent", "inputs": {"samples": [sampler, 0], "filename_prefix": "graph"}},
        "image": {"class_type": "SaveImage", "inputs": {"images": [decoder, 0], "filename_prefix": "graph"}},
    }


def _with_image(graph: Any) -> Any:
    """A blueprint is one node whose image comes from the graph that it is put in."""
    (node, *others) = graph["nodes"]
    first = next((entry for entry in node["inputs"] if entry["name"] in ("image", "image1")), None)
    if others or first is None:
        return graph
    first["link"] = 90001
    loader = {
        "id": 90000, "type": "LoadImage", "mode": 0, "inputs": [], "outputs": [{"type": "IMAGE"}],
        "widgets_values": ["square.png", "image"],
    }  # fmt: skip
    link = [90001, 90000, 0, node["id"], node["inputs"].index(first), "IMAGE"]
    return {**graph, "nodes": [node, loader], "links": [link]}


def made_image(mixing: Mixing, run: Run) -> np.ndarray:
    (saved,) = run.outputs["image"]["images"]
    return np.asarray(Image.open(io.BytesIO(mixing.client.image(saved))).convert("RGB")).astype(int)


CASES = [
    pytest.param(*graph, turbo, id=f"{graph[0].stem}{', LoRA' if turbo else ''}")
    for graph in GRAPHS
    for turbo in ((False, True) if not graph[2] else ("2509" in graph[1],))
]


@pytest.mark.parametrize(("path", "variant", "images", "turbo"), CASES)
def test_a_graph_of_comfyui_makes_the_same_with_our_loader(
    mixing: Mixing, server_nodes: Any, lora: str, path: Path, variant: str, images: int, turbo: bool
) -> None:
    prompt = opened(path, mixing, server_nodes, lora, variant, turbo)
    assert sum(value["class_type"] == "LoadImage" for value in prompt.values()) == images
    if images:
        del prompt["image"]  # a CPU takes half a minute to decode 1024x1024; `test_editing.py` decodes smaller ones
    chosen = "auto" if variant == EDIT_2511 else variant  # that model's file has a mark
    assert_same(mixing, prompt, chosen)


@pytest.mark.parametrize("name", SMALL)
def test_a_controlled_graph_of_comfyui_makes_the_same_with_our_loader(
    controls: Mixing, server_nodes: Any, lora: str, name: str
) -> None:
    path = next(path for path in (BLUEPRINTS / f"{name}.json", TEMPLATES / f"{name}.json") if path.exists())
    prompt = opened(path, controls, server_nodes, lora)
    for value in prompt.values():
        if value["class_type"] == "LoadImage":
            value["inputs"]["image"] = "wide.png"
    assert_same(controls, prompt)


def assert_same(mixing: Mixing, prompt: Prompt, variant: str = "auto") -> None:
    """Latents, and the image where the graph saves one."""
    theirs = mixing.client.run(prompt)
    ours = mixing.client.run(with_our_loader(prompt, replaced=SHARED, variant=variant))
    made, wanted = mixing.latents(ours), mixing.latents(theirs)
    assert made.shape == wanted.shape
    assert wanted.std() > 0.3
    assert (made - wanted).abs().max() < 1e-4 * max(1.0, float(wanted.std()))
    if "image" in prompt:
        assert np.abs(made_image(mixing, ours) - made_image(mixing, theirs)).max() <= 1
