"""The bundled workflows and native nodes through the real server, to the PNG."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from devtools.client import ComfyClient, ExecutionFailed, PromptRefused, RunInterrupted
from devtools.server import ComfyServer
from diffusers import QwenImagePipeline
from PIL import Image
from safetensors.torch import load_file
from split_files import SplitFiles

from .graphs import FOLDER, WORKFLOWS, changed, with_inputs, workflow

SMALL_SIZE = {"width": 112, "height": 80, "batch_size": 1}
STEPS = 4
SEED = 5
PROMPT, NEGATIVE = "a red circle", "blurry"


def pixels(client: ComfyClient, run: Any) -> np.ndarray:
    """All saved images of a run, (n, H, W, 3) int."""
    opened = [Image.open(io.BytesIO(client.image(image))).convert("RGB") for image in run.images()]
    return np.stack([np.asarray(each) for each in opened]).astype(int)


@pytest.fixture(scope="session")
def folder_inputs(full_pipeline: Path) -> dict[str, Any]:
    name = f"{full_pipeline.name} (folder)"
    return {"transformer": name, "text_encoder": FOLDER, "vae": FOLDER, "dtype": "fp32"}


@pytest.fixture(scope="session")
def base_prompt(object_info: dict[str, Any], folder_inputs: dict[str, Any]) -> dict[str, Any]:
    """The 4 GB graph on the pipeline folder: loader 1, prompts 2, empty latent 3, sampler 4, decode 5, save 6."""
    return small(WORKFLOWS[0], object_info, folder_inputs)


def small(path: Path, object_info: Mapping[str, Any], loader: Mapping[str, Any]) -> dict[str, Any]:
    """A bundled graph as a prompt, on the small checkpoint and at a small size."""
    prompts = {"positive": PROMPT, "negative": NEGATIVE}
    sample = {"seed": SEED, "steps": STEPS}
    return workflow(path, object_info, loader, prompts=prompts, size=SMALL_SIZE, sample=sample)


def diffusers_pixels(pipeline: QwenImagePipeline) -> np.ndarray:
    image = pipeline(
        PROMPT,
        negative_prompt=NEGATIVE,
        true_cfg_scale=4.0,
        width=SMALL_SIZE["width"],
        height=SMALL_SIZE["height"],
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(SEED),
        max_sequence_length=1024,
        output_type="np",
    ).images
    return (255 * image).clip(0, 255).astype(np.uint8).astype(int)  # ComfyUI cuts off, diffusers' PIL output rounds


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_bundled_workflow_makes_the_image_of_diffusers(
    path: Path,
    client: ComfyClient,
    object_info: dict[str, Any],
    folder_inputs: dict[str, Any],
    full_pipeline: Path,
) -> None:
    assert len(WORKFLOWS) >= 3
    run = client.run(small(path, object_info, folder_inputs))
    pipeline = QwenImagePipeline.from_pretrained(full_pipeline)
    pipeline.set_progress_bar_config(disable=True)
    assert np.abs(pixels(client, run) - diffusers_pixels(pipeline)).max() <= 1
    report = run.ui("qwen_lowvram_report")[0]
    assert report["passes"] == report["steps"] == STEPS
    assert report["plan"]["limits"]["vram_bytes"] > 0


@pytest.mark.parametrize("storage", ["bf16", "fp8", "fp8_scaled"])
def test_split_files_make_the_image_of_their_decoded_weights(
    storage: str,
    client: ComfyClient,
    object_info: dict[str, Any],
    split_files: dict[str, SplitFiles],
    models_dir: Path,
    full_pipeline: Path,
) -> None:
    files = split_files[storage]
    loader = {
        "transformer": files.transformer,
        "text_encoder": files.text_encoder,
        "vae": files.vae,
        "dtype": "fp32",
    }
    run = client.run(small(WORKFLOWS[0], object_info, loader))
    pipeline = QwenImagePipeline.from_pretrained(full_pipeline)
    pipeline.set_progress_bar_config(disable=True)
    _use(pipeline.transformer, models_dir / "diffusion_models" / files.transformer)
    _use(pipeline.text_encoder, models_dir / "text_encoders" / files.text_encoder, "model.", "model.language_model.")
    for parameter in pipeline.vae.parameters():  # split VAE files are bf16
        parameter.data = parameter.data.bfloat16().float()
    assert np.abs(pixels(client, run) - diffusers_pixels(pipeline)).max() <= 1


def _use(model: torch.nn.Module, file: Path, prefix: str = "", own_prefix: str = "") -> None:
    """Give a model of diffusers or transformers the weights that a split file stores, decoded to fp32."""
    stored = load_file(file)
    parameters = dict(model.named_parameters())
    used = 0
    for key, value in stored.items():
        name = key.replace(prefix, own_prefix, 1) if prefix and key.startswith(prefix) else key
        if name not in parameters:
            continue
        weight = value.float()
        scale = stored.get(f"{key.removesuffix('weight')}scale_weight") if key.endswith(".weight") else None
        parameters[name].data = weight if scale is None else weight * scale
        used += 1
    assert used > len(parameters) / 3


# native nodes and ours in any mix


def text_encode(text: str) -> tuple[str, dict[str, Any]]:
    return "CLIPTextEncode", {"clip": ["1", 1], "text": text}


def ksampler(**inputs: Any) -> tuple[str, dict[str, Any]]:
    settings = {
        "model": ["1", 0], "positive": ["2", 0], "negative": ["2", 1], "latent_image": ["3", 0], "seed": SEED,
        "steps": STEPS, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
    }  # fmt: skip
    return "KSampler", settings | inputs


def test_native_text_encode_gives_the_same_image(client: ComfyClient, base_prompt: dict[str, Any]) -> None:
    native = changed(base_prompt, "2", n20=text_encode(PROMPT), n21=text_encode(NEGATIVE))
    native = with_inputs(native, "4", positive=["20", 0], negative=["21", 0])
    assert (pixels(client, client.run(native)) == pixels(client, client.run(base_prompt))).all()


def test_native_ksampler_gives_the_same_image_and_visits_each_block_once_per_step(
    client: ComfyClient, comfy_server: ComfyServer, base_prompt: dict[str, Any]
) -> None:
    plain = with_inputs(base_prompt, "4", scheduler="simple", norm_rescale=False)
    expected = pixels(client, client.run(plain))
    native = changed(base_prompt, n4=ksampler())
    logged = len(comfy_server.log)
    assert (pixels(client, client.run(native)) == expected).all()
    assert f"{STEPS} passes" in comfy_server.log[logged:]


def test_native_custom_sampling_works(client: ComfyClient, base_prompt: dict[str, Any]) -> None:
    native = changed(
        base_prompt,
        n4=(
            "SamplerCustomAdvanced",
            {
                "noise": ["40", 0],
                "guider": ["41", 0],
                "sampler": ["42", 0],
                "sigmas": ["43", 0],
                "latent_image": ["3", 0],
            },
        ),
        n40=("RandomNoise", {"noise_seed": SEED}),
        n41=("CFGGuider", {"model": ["1", 0], "positive": ["2", 0], "negative": ["2", 1], "cfg": 4.0}),
        n42=("KSamplerSelect", {"sampler_name": "euler"}),
        n43=("BasicScheduler", {"model": ["1", 0], "scheduler": "simple", "steps": STEPS, "denoise": 1.0}),
    )
    expected = pixels(client, client.run(changed(base_prompt, n4=ksampler())))
    assert (pixels(client, client.run(native)) == expected).all()


@pytest.mark.parametrize(
    "decoder",
    [
        ("VAEDecode", {}),
        ("VAEDecodeTiled", {"tile_size": 64, "overlap": 32, "temporal_size": 64, "temporal_overlap": 8}),
        ("QwenLowVRAMDecode", {"tile_size": 64}),
    ],
    ids=lambda decoder: decoder[0],
)
def test_every_decoder_gives_the_same_image(
    client: ComfyClient, base_prompt: dict[str, Any], decoder: tuple[str, dict[str, Any]]
) -> None:
    kind, inputs = decoder
    prompt = changed(base_prompt, n5=(kind, {"samples": ["4", 0], "vae": ["1", 2], **inputs}))
    difference = pixels(client, client.run(prompt)) - pixels(client, client.run(base_prompt))
    assert np.abs(difference).max() <= 1


@pytest.fixture
def photo(comfy_server: ComfyServer) -> str:
    values = np.random.default_rng(0).integers(0, 255, (80, 112, 3), dtype=np.uint8)
    Image.fromarray(values).save(comfy_server.base / "input" / "photo.png")
    return "photo.png"


def test_image_to_image_and_inpainting_with_native_encoders(
    client: ComfyClient, base_prompt: dict[str, Any], photo: str
) -> None:
    encoded = changed(
        base_prompt,
        "3",
        n30=("LoadImage", {"image": photo}),
        n31=("VAEEncode", {"pixels": ["30", 0], "vae": ["1", 2]}),
        n32=("SolidMask", {"value": 1.0, "width": 112, "height": 80}),
        n33=("SetLatentNoiseMask", {"samples": ["31", 0], "mask": ["32", 0]}),
        n34=("VAEEncodeForInpaint", {"pixels": ["30", 0], "vae": ["1", 2], "mask": ["32", 0], "grow_mask_by": 6}),
    )
    images = {}
    for source, denoise in (("31", 0.3), ("31", 1.0), ("33", 0.3), ("34", 1.0)):
        prompt = with_inputs(encoded, "4", latent_image=[source, 0], denoise=denoise)
        images[source, denoise] = pixels(client, client.run(prompt))
        assert images[source, denoise].shape == (1, 80, 112, 3)
    assert (images["31", 0.3] == images["33", 0.3]).all()  # a mask that covers everything changes nothing
    assert np.abs(images["31", 0.3] - images["31", 1.0]).mean() > 1


def test_a_batch_is_a_batch(client: ComfyClient, base_prompt: dict[str, Any]) -> None:
    both = pixels(client, client.run(with_inputs(base_prompt, "3", batch_size=2)))
    assert both.shape == (2, 80, 112, 3)
    assert np.abs(both[0] - both[1]).mean() > 1


def test_latent_previews_arrive(client: ComfyClient, start_server: Any, base_prompt: dict[str, Any]) -> None:
    server = start_server("--preview-method", "latent2rgb")
    run = ComfyClient(server.url).run(base_prompt)
    assert run.previews


def test_the_second_image_reads_nothing_that_the_first_has_read(
    client: ComfyClient, base_prompt: dict[str, Any]
) -> None:
    client.run(with_inputs(base_prompt, "4", seed=100))
    run = client.run(with_inputs(base_prompt, "4", seed=101))
    assert {"4", "5", "6"} <= run.executed()
    assert not {"1", "2", "3"} & run.executed()
    report = run.ui("qwen_lowvram_report")[0]
    assert report["fetched_bytes"] == report["modulation_bytes"] == 0


def test_freeing_memory_gives_back_everything_and_the_next_run_works(
    client: ComfyClient, base_prompt: dict[str, Any]
) -> None:
    first = pixels(client, client.run(with_inputs(base_prompt, "4", seed=200)))
    client.free()
    run = client.run(with_inputs(base_prompt, "4", seed=200))
    assert run.ui("qwen_lowvram_report")[0]["fetched_bytes"] > 0
    assert (pixels(client, run) == first).all()


def test_progress_names_step_and_block(client: ComfyClient, base_prompt: dict[str, Any]) -> None:
    events: list[dict[str, Any]] = []

    def on_event(kind: str, data: dict[str, Any]) -> None:
        if kind == "qwen_lowvram.progress":
            events.append(data)

    client.run(with_inputs(base_prompt, "4", seed=300, steps=12), on_event=on_event)
    assert [event for event in events if event["node"] == "4"][-1]["stage"] == "done"  # decoding tells of itself
    sampling = [event for event in events if event["stage"] == "sampling"]
    assert sampling
    assert all(event["node"] == "4" and 1 <= event["block"] <= event["blocks"] for event in sampling)
    of_run = [event for event in events if "ram_bytes" in event]
    assert all(event["ram_bytes"] > 0 and event["facts"]["blocks"] == event["blocks"] for event in of_run[1:])
    assert "Memory plan for " in of_run[0]["plan"]
    assert len({event["prompt_id"] for event in events}) == 1


def test_an_interruption_stops_the_run_and_the_next_one_works(client: ComfyClient, base_prompt: dict[str, Any]) -> None:
    def on_event(kind: str, data: dict[str, Any]) -> None:
        if kind == "qwen_lowvram.progress" and data["stage"] == "sampling":
            client.interrupt()

    with pytest.raises(RunInterrupted):
        client.run(with_inputs(base_prompt, "4", seed=400, steps=500), on_event=on_event)
    assert client.run(with_inputs(base_prompt, "4", seed=401)).images()


# bad input


def test_a_request_that_cannot_be_met_says_what_would_work(client: ComfyClient, base_prompt: dict[str, Any]) -> None:
    with pytest.raises(ExecutionFailed, match=r"needs .*\nUse .*VRAM limit"):
        client.run(with_inputs(base_prompt, "1", vram_limit_gb=0.0005))


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"transformer": "nothing.safetensors"}, "There is no 'nothing.safetensors'"),
        ({"transformer": "../../outside.safetensors"}, "There is no"),
        ({"transformer": "nowhere (folder)"}, "no pipeline folder 'nowhere'"),
        ({"transformer": "encoder.safetensors"}, r"is a Qwen2.5-VL text encoder.*text_encoders"),
        ({"transformer": "cut.safetensors"}, "cut off"),
    ],
)
def test_wrong_files_are_named_before_the_run(
    client: ComfyClient,
    base_prompt: dict[str, Any],
    models_dir: Path,
    split_files: dict[str, SplitFiles],
    inputs: dict[str, Any],
    words: str,
) -> None:
    transformers = models_dir / "diffusion_models"
    whole = (transformers / split_files["bf16"].transformer).read_bytes()
    (transformers / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    encoder = (models_dir / "text_encoders" / split_files["bf16"].text_encoder).read_bytes()
    (transformers / "encoder.safetensors").write_bytes(encoder)
    try:
        others = {"text_encoder": split_files["bf16"].text_encoder, "vae": split_files["bf16"].vae}
        with pytest.raises(PromptRefused, match=words):
            client.run(with_inputs(base_prompt, "1", **(others | inputs)))
    finally:
        for name in ("cut", "encoder"):
            (transformers / f"{name}.safetensors").unlink()


def test_a_lora_of_another_model_is_refused_in_words(
    client: ComfyClient, base_prompt: dict[str, Any], models_dir: Path
) -> None:
    from safetensors.torch import save_file

    save_file({"nothing.lora_up.weight": torch.zeros(1, 1)}, models_dir / "loras" / "some.safetensors")
    lora = changed(
        base_prompt,
        n7=("LoraLoaderModelOnly", {"model": ["1", 0], "lora_name": "some.safetensors", "strength_model": 1.0}),
    )
    with pytest.raises(ExecutionFailed, match="None of the LoRA's keys fits this model") as failure:
        client.run(with_inputs(lora, "4", model=["7", 0]))
    assert failure.value.node_type == "LoraLoaderModelOnly"
