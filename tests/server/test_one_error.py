"""One wrong input makes one error, at that input: before the run in the server's answer, or in the run at the node."""

import json
from pathlib import Path
from typing import Any

import pytest
from devtools.client import ComfyClient, ExecutionFailed, PromptRefused
from safetensors.torch import save_file
from small_checkpoint import SplitFiles
from torch import zeros

LOADER, PLAN, LORA, CACHE = (
    "QwenLowVRAMLoader",
    "QwenLowVRAMMemoryPlan",
    "QwenLowVRAMLoadLora",
    "QwenLowVRAMWeightCache",
)
Prompt = dict[str, Any]
ENGLISH = json.loads((Path(__file__).parents[2] / "locales" / "en" / "errors.json").read_text(encoding="utf-8"))


@pytest.fixture
def files(models_dir: Path, split_files: dict[str, SplitFiles]) -> Any:
    """The right files; beside them a transformer and a LoRA that are cut off, a VAE and an encoder of another kind."""
    right = split_files["bf16"]
    transformer = (models_dir / "diffusion_models" / right.transformer).read_bytes()
    encoder = (models_dir / "text_encoders" / right.text_encoder).read_bytes()
    made = {
        models_dir / "diffusion_models" / "cut.safetensors": transformer[: len(transformer) // 2],
        models_dir / "text_encoders" / "transformer.safetensors": transformer,
        models_dir / "vae" / "encoder.safetensors": encoder,
        models_dir / "loras" / "cut.safetensors": transformer[: len(transformer) // 2],
    }
    for file, content in made.items():
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
    save_file({"nothing.lora_up.weight": zeros(1, 1)}, models_dir / "loras" / "other.safetensors")
    yield {"transformer": right.transformer, "text_encoder": right.text_encoder, "vae": right.vae}
    for file in (*made, models_dir / "loras" / "other.safetensors"):
        file.unlink()


def prompt_of(node: str, object_info: Any, files: dict[str, str], **given: Any) -> Prompt:
    """The node with its defaults, the right files, and what is given; its text is shown."""
    specs = {name: spec for inputs in object_info[node]["input"].values() for name, spec in inputs.items()}
    values = {name: spec[1]["default"] for name, spec in specs.items() if "default" in (spec[1:] or [{}])[0]}
    if node == LORA:
        loader = prompt_of(LOADER, object_info, files)["1"]
        lora = {"class_type": LORA, "inputs": values | {"model": ["1", 0]} | given}
        return {"1": loader, "4": lora, "6": {"class_type": "PreviewAny", "inputs": {"source": ["4", 1]}}}
    if node == CACHE:
        return {"1": {"class_type": node, "inputs": values | given}}
    prompt = {"1": {"class_type": node, "inputs": values | files | given}}
    if node == PLAN:
        return prompt
    image = {"width": 64, "height": 64, "batch_size": 1, "color": 0}
    return prompt | {
        "2": {"class_type": "EmptyImage", "inputs": image},
        "3": {"class_type": "VAEEncode", "inputs": {"pixels": ["2", 0], "vae": ["1", 2]}},
        "5": {"class_type": "SaveLatent", "inputs": {"samples": ["3", 0], "filename_prefix": "one"}},
    }


BEFORE_THE_RUN = [
    *((node, "transformer", "cut.safetensors", "cut off") for node in (LOADER, PLAN)),
    *((node, "transformer", "gone.safetensors", "There is no") for node in (LOADER, PLAN)),
    *((node, "text_encoder", "gone.safetensors", "not in ") for node in (LOADER, PLAN)),
    *((node, "vae", "gone.safetensors", "not in ") for node in (LOADER, PLAN)),
    *((node, "weight_format", "q4", "not in ") for node in (LOADER, PLAN)),
    (LOADER, "variant", "Qwen-Image-3", "not in "),
    (LOADER, "dtype", "int3", "not in "),
    (LORA, "lora_name", "gone.safetensors", "There is no"),
    (LORA, "lora_name", "cut.safetensors", "cut off"),
    (CACHE, "action", "burn", "not in "),
]


@pytest.mark.parametrize(("node", "name", "value", "words"), BEFORE_THE_RUN)
def test_one_wrong_input_makes_one_error_at_that_input(
    node: str, name: str, value: str, words: str, client: ComfyClient, object_info: Any, files: dict[str, str]
) -> None:
    prompt = prompt_of(node, object_info, files, **{name: value})
    with pytest.raises(PromptRefused) as refused:
        client.queue(prompt)
    ((_, answer),) = refused.value.node_errors.items()
    (error,) = answer["errors"]
    assert answer["class_type"] == node
    assert error["extra_info"]["input_name"] == name
    assert words in error["details"]


IN_THE_RUN = [
    *((node, {"text_encoder": "transformer.safetensors"}, "text_encoder") for node in (LOADER, PLAN)),
    *((node, {"text_encoder": "from the folder"}, "text_encoder") for node in (LOADER, PLAN)),
    *((node, {"vae": "encoder.safetensors"}, "vae") for node in (LOADER, PLAN)),
    *((node, {"vae": "from the folder"}, "vae") for node in (LOADER, PLAN)),
    (PLAN, {"layers": 3}, "layers"),
    (LORA, {"lora_name": "other.safetensors"}, "lora_name"),
]


@pytest.mark.parametrize(("node", "given", "name"), IN_THE_RUN)
def test_what_only_the_run_can_know_is_one_error_that_begins_with_the_inputs_name(
    node: str, given: dict[str, Any], name: str, client: ComfyClient, object_info: Any, files: dict[str, str]
) -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    with pytest.raises(ExecutionFailed) as failed:
        client.run(prompt_of(node, object_info, files, **given), on_event=lambda *event: events.append(event))
    assert failed.value.node_type == node
    assert failed.value.message.startswith(f"{name}: ")
    event = the_error(events)
    assert event["node"] == failed.value.node_id
    assert failed.value.message.startswith(event["text"])
    assert event["values"]["input"] == name
    assert event["code"] in ENGLISH


def the_error(events: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """What a page is sent beside ComfyUI's message, and before it."""
    kinds = [kind for kind, _ in events]
    assert kinds.count("qwen_lowvram.error") == 1
    assert kinds.index("qwen_lowvram.error") < kinds.index("execution_error")
    return events[kinds.index("qwen_lowvram.error")][1]


IN_OTHERS_NODES = [
    ("KSampler", "graph.latent_with_layers", {"frames": 2, "variant": "Qwen-Image", "layered": "Qwen-Image-Layered"}),
    ("ModelComputeDtype", "graph.compute_dtype", {}),
    ("CLIPTextEncode", "clip.embedding", {}),
    ("VAEEncode", "vae.image_too_small", {"least_px": 8, "shape": [1, 4, 4, 3]}),
]


@pytest.mark.parametrize(("node", "code", "values"), IN_OTHERS_NODES)
def test_an_error_of_our_model_in_a_node_of_others_is_sent_with_its_code(
    node: str, code: str, values: dict[str, Any], client: ComfyClient, object_info: Any, files: dict[str, str]
) -> None:
    steps = {"seed": 0, "steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    latent = {"width": 64, "height": 64, "length": 5, "batch_size": 1}
    text = "embedding:cat" if node == "CLIPTextEncode" else "a cat"
    prompt = {
        "1": prompt_of(LOADER, object_info, files)["1"],
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": text}},
        "3": {"class_type": "EmptyHunyuanLatentVideo", "inputs": latent},
        "4": {"class_type": "ModelComputeDtype", "inputs": {"model": ["1", 0], "dtype": "default"}},
    }
    model = "4" if node == "ModelComputeDtype" else "1"
    links = {"positive": ["2", 0], "negative": ["2", 0], "latent_image": ["3", 0]}
    prompt["5"] = {"class_type": "KSampler", "inputs": {"model": [model, 0], **links, **steps}}
    prompt["6"] = {"class_type": "SaveLatent", "inputs": {"samples": ["5", 0], "filename_prefix": "none"}}
    if node == "VAEEncode":
        prompt = {"1": prompt["1"], "6": prompt["6"]}
        prompt["2"] = {"class_type": "EmptyImage", "inputs": {"width": 4, "height": 4, "batch_size": 1, "color": 0}}
        prompt["5"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["2", 0], "vae": ["1", 2]}}
    events: list[tuple[str, dict[str, Any]]] = []
    with pytest.raises(ExecutionFailed) as failed:
        client.run(prompt, on_event=lambda *event: events.append(event))
    assert failed.value.node_type == node
    event = the_error(events)
    assert (event["node"], event["code"]) == (failed.value.node_id, code)
    assert failed.value.message.startswith(event["text"])
    assert event["values"].items() >= values.items()
