"""The bundled workflows as prompts, and small changes to prompts."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from devtools.workflow import set_widgets, to_prompt

_ALL = sorted((Path(__file__).parents[2] / "workflows").glob("*.json"))


def _with(*texts: str) -> list[Path]:
    return [path for path in _ALL if all(text in path.read_text(encoding="utf-8") for text in texts)]


QWEN_IMAGE_21 = _with("qwen_image_2.1")
EDITING = [path for path in _with("QwenLowVRAMEncodeEditPrompt") if path not in QWEN_IMAGE_21]
ONE_IMAGE, SEVERAL_IMAGES = (next(path for path in EDITING if name in path.stem) for name in ("an image", "three"))
LIGHTNING = [path for path in _with("QwenLowVRAMLoadLora") if path not in EDITING]  # with a LoRA, from text
LAYERED = _with("EmptyQwenImageLayeredLatentImage")
IMAGE_TO_IMAGE, INPAINT, OUTPAINT = (
    next(path for path in _ALL if name in path.stem) for name in ("Image to image", "Inpaint", "Outpaint")
)
_OTHERS = (*QWEN_IMAGE_21, *LIGHTNING, *EDITING, *LAYERED, IMAGE_TO_IMAGE, INPAINT, OUTPAINT)
WORKFLOWS = [path for path in _ALL if path not in _OTHERS]  # guided, from text
FOLDER = "from the folder"

Prompt = dict[str, Any]

# of the scaled image in the tests: ComfyUI's node counts 1024 * 1024 px
MEGAPIXELS = 128 * 128 / 1024**2


def workflow(
    path: Path,
    object_info: Mapping[str, Any],
    loader: Mapping[str, Any],
    *,
    prompts: Mapping[str, str],
    size: Mapping[str, int],
    sample: Mapping[str, Any],
) -> Prompt:
    """A bundled graph with other values: loader 1, prompts 2, empty latent 3, sampler 4, decode 5, save 6."""
    graph = json.loads(path.read_text(encoding="utf-8"))
    graph = _adapted(graph, object_info, loader, prompts, sample)
    return to_prompt(set_widgets(graph, object_info, "EmptySD3LatentImage", **size), object_info)


def workflow_from_image(
    path: Path,
    object_info: Mapping[str, Any],
    loader: Mapping[str, Any],
    image: str,
    *,
    prompts: Mapping[str, str],
    sample: Mapping[str, Any],
) -> Prompt:
    """A bundled graph that starts from an image, worked on at 128x128 px or as much in another shape, its edges in
    proportion: sampler 4, decoder 5, save 6, the picture 10, what is scaled 11, and 13 which grows mask or image."""
    graph = json.loads(path.read_text(encoding="utf-8"))
    graph = _adapted(graph, object_info, loader, prompts, sample)
    small: dict[str, dict[str, Any]] = {
        "LoadImage": {"image": image},
        "ImageScaleToTotalPixels": {"megapixels": MEGAPIXELS},
        "GrowMask": {"expand": 4},
        "ImageBlur": {"blur_radius": 2},
        "ImagePadForOutpaint": {"left": 0, "right": 64, "feathering": 4},
    }
    for node, values in small.items():
        graph = set_widgets(graph, object_info, node, **values)
    return to_prompt(graph, object_info)


def _adapted(
    graph: dict[str, Any],
    object_info: Mapping[str, Any],
    loader: Mapping[str, Any],
    prompts: Mapping[str, str],
    sample: Mapping[str, Any],
) -> dict[str, Any]:
    # what most tests compare with is the diffusers pipeline
    settings = {"weight_format": "as stored", "positions": "diffusers", **loader}
    graph = set_widgets(graph, object_info, "QwenLowVRAMLoader", **settings)
    graph = set_widgets(graph, object_info, "QwenLowVRAMEncodePrompts", **prompts)
    return set_widgets(graph, object_info, "QwenLowVRAMSample", **sample)


def changed(prompt: Mapping[str, Any], *removed: str, **nodes: tuple[str, dict[str, Any]]) -> Prompt:
    """The prompt without some nodes and with others put in: n4=("KSampler", {...})."""
    kept = {node: value for node, value in prompt.items() if node not in removed}
    return kept | {name[1:]: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def with_inputs(prompt: Mapping[str, Any], node: str, **inputs: Any) -> Prompt:
    """The prompt with some inputs of one node changed."""
    return {**prompt, node: {**prompt[node], "inputs": {**prompt[node]["inputs"], **inputs}}}


# ComfyUI's loaders: the input of ours that takes the file, and the slot of ours that gives what theirs do
_NATIVE = {
    "UNETLoader": ("model", "unet_name", "transformer", 0),
    "CLIPLoader": ("clip", "clip_name", "text_encoder", 1),
    "VAELoader": ("vae", "vae_name", "vae", 2),
}


def with_our_loader(prompt: Prompt, *, replaced: Sequence[str], variant: str = "auto") -> Prompt:
    """A prompt that has ComfyUI's three loaders, with ours for those of "model", "clip" and "vae" that are named."""
    loader: dict[str, Any] = {"dtype": "fp32", "weight_format": "as stored", "vram_limit_gb": 0.0}
    loader |= {"timesteps": "fp32", "variant": variant}
    slots = {}
    for node, value in prompt.items():
        if value["class_type"] in _NATIVE:
            kind, theirs, ours, slot = _NATIVE[value["class_type"]]
            loader[ours] = value["inputs"][theirs]
            if kind in replaced:
                slots[node] = slot
    rest = {node: value for node, value in prompt.items() if node not in slots}

    def moved(value: Any) -> Any:
        linked = isinstance(value, list) and len(value) == 2 and value[0] in slots
        return ["ours", slots[value[0]]] if linked else value

    return {
        "ours": {"class_type": "QwenLowVRAMLoader", "inputs": loader},
        **{
            node: {**value, "inputs": {name: moved(given) for name, given in value["inputs"].items()}}
            for node, value in rest.items()
        },
    }
