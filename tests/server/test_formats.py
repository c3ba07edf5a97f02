"""Files in further weight formats through the real server: the image is that of their decoded weights."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bnb_folder import dequantized, write_quantized_pipeline
from comfy_files import read_dequantized
from devtools.client import ComfyClient, PromptRefused
from devtools.workflow import set_widgets, to_prompt
from diffusers import QwenImagePipeline
from gguf_files import llama_name, read_gguf
from nunchaku_files import write_nunchaku_transformer
from PIL import Image
from small_checkpoint import SplitFiles, make_transformer, write_split_files

WORKFLOW = sorted((Path(__file__).parents[2] / "workflows").glob("*.json"))[0]
SIZE = {"width": 112, "height": 80}
STEPS, SEED = 4, 5
PROMPT, NEGATIVE = "a red circle", "blurry"


@pytest.fixture(scope="module", params=["gguf_q8_0", "gguf_q4_1"])
def gguf_files(request: pytest.FixtureRequest, full_pipeline: Path, models_dir: Path) -> SplitFiles:
    return write_split_files(full_pipeline, models_dir, dtype=request.param)


@pytest.fixture(scope="module")
def files_in_place(models_dir: Path, gguf_files: SplitFiles) -> Mapping[str, str]:
    """The loader's widgets."""
    return {
        "transformer": gguf_files.transformer,
        "text_encoder": gguf_files.text_encoder,
        "vae": gguf_files.vae,
        "dtype": "fp32",
    }


def prompt_of(object_info: Mapping[str, Any], loader: Mapping[str, str]) -> dict[str, Any]:
    """The first bundled graph on the small checkpoint, at a small size."""
    graph = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    # as the diffusers pipeline, with which images are compared, counts positions
    graph = set_widgets(graph, object_info, "QwenLowVRAMLoader", positions="diffusers", **loader)
    graph = set_widgets(graph, object_info, "QwenLowVRAMEncodePrompts", positive=PROMPT, negative=NEGATIVE)
    graph = set_widgets(graph, object_info, "EmptySD3LatentImage", **SIZE, batch_size=1)
    graph = set_widgets(graph, object_info, "QwenLowVRAMSample", seed=SEED, steps=STEPS)
    return to_prompt(graph, object_info)


def made_image(client: ComfyClient, prompt: Mapping[str, Any]) -> np.ndarray:
    (image,) = client.run(prompt).images()
    return np.asarray(Image.open(io.BytesIO(client.image(image))).convert("RGB")).astype(int)


def diffusers_image(pipeline: QwenImagePipeline) -> np.ndarray:
    image = pipeline(
        PROMPT,
        negative_prompt=NEGATIVE,
        true_cfg_scale=4.0,
        **SIZE,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(SEED),
        max_sequence_length=1024,
        output_type="np",
    ).images[0]
    return (255 * image).clip(0, 255).astype(np.uint8).astype(int)


def test_gguf_files_make_the_image_of_their_decoded_weights(
    client: ComfyClient,
    object_info: dict[str, Any],
    models_dir: Path,
    full_pipeline: Path,
    files_in_place: dict[str, str],
) -> None:
    ours = made_image(client, prompt_of(object_info, files_in_place))
    pipeline = QwenImagePipeline.from_pretrained(full_pipeline)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.load_state_dict(read_gguf(models_dir / "diffusion_models" / files_in_place["transformer"]))
    stored = read_gguf(models_dir / "text_encoders" / files_in_place["text_encoder"])
    for name, parameter in pipeline.text_encoder.named_parameters():
        llama = llama_name(name.replace("language_model.", ""))
        if llama is not None:
            parameter.data = stored.pop(llama)
    assert not stored
    for parameter in pipeline.vae.parameters():  # split VAE files are bf16
        parameter.data = parameter.data.bfloat16().float()
    assert np.abs(ours - diffusers_image(pipeline)).max() <= 1
    assert ours.std() > 10


@pytest.mark.parametrize("double", [False, True])
def test_a_folder_quantized_by_bitsandbytes_makes_the_image_of_its_decoded_weights(
    double: bool, client: ComfyClient, object_info: dict[str, Any], models_dir: Path, full_pipeline: Path
) -> None:
    name = f"quantized_{'doubly' if double else 'once'}"
    transformer, text_encoder = write_quantized_pipeline(
        full_pipeline,
        models_dir / "diffusers" / name,
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
    )
    own = "from the folder"
    loader = {"transformer": f"{name} (folder)", "text_encoder": own, "vae": own, "dtype": "fp32"}
    ours = made_image(client, prompt_of(object_info, loader))
    pipeline = QwenImagePipeline.from_pretrained(full_pipeline)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.load_state_dict(dequantized(transformer))
    pipeline.text_encoder.load_state_dict(dequantized(text_encoder))
    assert np.abs(ours - diffusers_image(pipeline)).max() <= 1


@pytest.mark.parametrize(
    ("kind", "compute"), [("fp8mixed", "auto"), ("int8_convrot", "auto"), ("int8_convrot", "fast")]
)
def test_files_that_comfyui_quantized_make_the_image_of_their_decoded_weights_or_one_near_it(
    kind: str,
    compute: str,
    client: ComfyClient,
    object_info: dict[str, Any],
    models_dir: Path,
    full_pipeline: Path,
) -> None:
    files = write_split_files(full_pipeline, models_dir, dtype=kind, text_dtype=kind)
    loader = {
        "transformer": files.transformer,
        "text_encoder": files.text_encoder,
        "vae": files.vae,
        "dtype": "fp32",
        "compute": compute,
    }
    ours = made_image(client, prompt_of(object_info, loader))
    pipeline = QwenImagePipeline.from_pretrained(full_pipeline)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.load_state_dict(read_dequantized(models_dir / "diffusion_models" / files.transformer))
    stored = read_dequantized(models_dir / "text_encoders" / files.text_encoder)
    for name, parameter in pipeline.text_encoder.named_parameters():
        # ComfyUI's names of the language model and of the vision tower
        parameter.data = stored.pop(name.replace("model.language_model.", "model.").replace("model.visual.", "visual."))
    assert not stored
    for parameter in pipeline.vae.parameters():  # split VAE files are bf16
        parameter.data = parameter.data.bfloat16().float()
    difference = np.abs(ours - diffusers_image(pipeline))
    # on a CPU, auto is exact; numbers that are quantized make another image, near this one
    assert difference.max() <= 1 if compute == "auto" else 1 < difference.max() < 30
    assert ours.std() > 10


def test_a_file_of_nunchakus_makes_the_image_of_its_formula(
    client: ComfyClient,
    object_info: dict[str, Any],
    models_dir: Path,
    full_pipeline: Path,
) -> None:
    pipeline = QwenImagePipeline.from_pretrained(full_pipeline)
    pipeline.set_progress_bar_config(disable=True)
    text_dim = pipeline.transformer.config.joint_attention_dim
    model = make_transformer(layers=2, heads=4, text_dim=text_dim)  # 128 wide: nunchaku's files have tiles of 128 rows
    file = models_dir / "diffusion_models" / "svdq-int4_r32-qwen-image.safetensors"
    model.load_state_dict(write_nunchaku_transformer(file, model.state_dict(), dict(model.config)))
    pipeline.transformer = model
    split = write_split_files(full_pipeline, models_dir, dtype="fp32")
    loader = {"transformer": file.name, "text_encoder": split.text_encoder, "vae": split.vae, "dtype": "fp32"}
    ours = made_image(client, prompt_of(object_info, loader))
    assert np.abs(ours - diffusers_image(pipeline)).max() <= 1
    assert ours.std() > 10


def test_gguf_files_are_offered_for_transformer_and_text_encoder(
    client: ComfyClient, models_dir: Path, gguf_files: SplitFiles
) -> None:
    (models_dir / "vae" / "vae.gguf").write_bytes(b"GGUF")
    (models_dir / "diffusion_models" / "sub").mkdir(exist_ok=True)
    (models_dir / "diffusion_models" / "sub" / "deep.GGUF").write_bytes(b"GGUF")
    try:
        inputs = client.object_info()["QwenLowVRAMLoader"]["input"]["required"]
        assert {gguf_files.transformer, str(Path("sub") / "deep.GGUF")} <= set(inputs["transformer"][0])
        assert gguf_files.text_encoder in inputs["text_encoder"][0]
        assert not any(name.endswith(".gguf") for name in inputs["vae"][0])
    finally:
        (models_dir / "vae" / "vae.gguf").unlink()
        (models_dir / "diffusion_models" / "sub" / "deep.GGUF").unlink()


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"transformer": "../../outside.gguf"}, "There is no"),
        ({"transformer": "cut.gguf"}, "cut off"),
        ({"transformer": "encoder.gguf"}, r"is a Qwen2.5-VL text encoder.*text_encoders"),
        ({"text_encoder": "../diffusion_models/cut.gguf"}, "Value not in list: text_encoder"),
    ],
)
def test_wrong_gguf_files_are_named_before_the_run(
    client: ComfyClient,
    object_info: dict[str, Any],
    models_dir: Path,
    files_in_place: dict[str, str],
    inputs: dict[str, str],
    words: str,
) -> None:
    transformers = models_dir / "diffusion_models"
    whole = (transformers / files_in_place["transformer"]).read_bytes()
    encoder = (models_dir / "text_encoders" / files_in_place["text_encoder"]).read_bytes()
    (transformers / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    (transformers / "encoder.gguf").write_bytes(encoder)
    (models_dir.parent / "outside.gguf").write_bytes(whole)
    try:
        with pytest.raises(PromptRefused, match=words):
            client.run(prompt_of(object_info, {**files_in_place, **inputs}))
    finally:
        for file in (transformers / "cut.gguf", transformers / "encoder.gguf", models_dir.parent / "outside.gguf"):
            file.unlink()
