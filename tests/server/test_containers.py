"""The same weights in other containers through the real server: the latents of ComfyUI's own loaders on plain files."""

import json
from pathlib import Path

import pytest
import torch
from bnb_folder import write_quantized_pipeline
from devtools.client import ExecutionFailed, PromptRefused
from diffusers import QwenImageTransformer2DModel
from gguf_files import write_gguf_transformer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from .conftest import TOLERANCE, Mixing
from .graphs import FOLDER, Prompt, changed, with_inputs, with_our_loader
from .test_mixing import graph

CONFIG = "config"  # the metadata key: a small model's heads cannot be told from shapes


@pytest.fixture(scope="module")
def plain(mixing: Mixing) -> torch.Tensor:
    """What ComfyUI's own loaders make of the plain files."""
    return mixing.latents(mixing.client.run(graph(mixing)))


def ours(mixing: Mixing, **choices: str) -> Prompt:
    """The graph on our loader, with other files chosen."""
    return with_inputs(with_our_loader(graph(mixing), replaced=("model", "clip", "vae")), "ours", **choices)


def assert_same(mixing: Mixing, plain: torch.Tensor, **choices: str) -> None:
    latents = mixing.latents(mixing.client.run(ours(mixing, **choices)))
    assert plain.std() > 0.3
    assert (latents - plain).abs().max() < TOLERANCE


@pytest.fixture(scope="module")
def all_in_one(mixing: Mixing) -> str:
    """ComfyUI's own Save Checkpoint on the plain files, with the small sizes noted; the file's name."""
    saver = ("CheckpointSave", {"model": ["1", 0], "clip": ["2", 0], "vae": ["3", 0], "filename_prefix": "all"})
    mixing.client.run(changed(graph(mixing), "4", "5", "6", "7", "8", n9=saver))
    (written,) = (mixing.server.base / "output").glob("all*.safetensors")
    models = mixing.server.base / "models"
    (models / "checkpoints").mkdir(exist_ok=True)
    config = _config(models / "text_encoders" / mixing.files["plain"].text_encoder)
    save_file(load_file(written), models / "checkpoints" / "all_in_one.safetensors", {CONFIG: config})
    written.unlink()
    return "all_in_one.safetensors (checkpoint)"


def _config(file: Path) -> str:
    with safe_open(file, framework="pt") as opened:
        config: str = opened.metadata()[CONFIG]
    return config


@pytest.mark.parametrize("by", ["each input", "the transformer alone"])
def test_an_all_in_one_file_of_comfyuis_saver_is_read_as_all_three(
    by: str, mixing: Mixing, plain: torch.Tensor, all_in_one: str
) -> None:
    other = all_in_one if by == "each input" else FOLDER
    assert_same(mixing, plain, transformer=all_in_one, text_encoder=other, vae=other)


def test_one_component_of_an_all_in_one_file_goes_with_other_files(
    mixing: Mixing, plain: torch.Tensor, all_in_one: str
) -> None:
    assert_same(mixing, plain, text_encoder=all_in_one)
    assert_same(mixing, plain, transformer=all_in_one, vae=all_in_one)


def test_all_in_one_files_are_listed_by_the_nodes_that_open_models(mixing: Mixing, all_in_one: str) -> None:
    nodes = mixing.client.object_info()
    for node in ("QwenLowVRAMLoader", "QwenLowVRAMMemoryPlan"):
        inputs = nodes[node]["input"]["required"]
        for name in ("transformer", "text_encoder", "vae"):
            assert all_in_one in inputs[name][0]
            assert inputs[name][0].index(all_in_one) > 0  # no default where there is another file


def test_a_checkpoint_without_the_component_is_named(mixing: Mixing) -> None:
    models, files = mixing.server.base / "models", mixing.files["plain"]
    bare = models / "checkpoints" / "bare.safetensors"
    bare.parent.mkdir(exist_ok=True)
    bare.hardlink_to(models / "diffusion_models" / files.transformer)
    try:
        chosen = f"{bare.name} (checkpoint)"
        with pytest.raises(ExecutionFailed, match=r"vae: .*bare\.safetensors is a Qwen-Image transformer .*a VAE is"):
            mixing.client.run(ours(mixing, transformer=chosen, vae=chosen))
        with pytest.raises(ExecutionFailed, match=r"text_encoder: .* has no text_encoder in it or beside it"):
            mixing.client.run(ours(mixing, transformer=chosen, text_encoder=FOLDER))
    finally:
        bare.unlink()


def shards_of(folder: Path, pipeline: Path, component: str) -> str:
    """The component as diffusers or transformers writes it in shards, with their index; the first one's name."""
    made = {"transformer": QwenImageTransformer2DModel, "text_encoder": Qwen2_5_VLForConditionalGeneration}[component]
    made.from_pretrained(pipeline / component).save_pretrained(folder, max_shard_size="1MB")
    return f"{folder.name}/{sorted(folder.glob('*-of-*'))[0].name}"


@pytest.fixture(scope="module")
def shards(mixing: Mixing, full_pipeline: Path) -> dict[str, str]:
    models = mixing.server.base / "models"
    return {
        "transformer": shards_of(models / "diffusion_models" / "Qwen-Image", full_pipeline, "transformer"),
        "text_encoder": shards_of(models / "text_encoders" / "Qwen2.5-VL", full_pipeline, "text_encoder"),
    }


def test_shards_are_offered_once_and_make_the_same_latents(
    mixing: Mixing, plain: torch.Tensor, shards: dict[str, str]
) -> None:
    inputs = mixing.client.object_info()["QwenLowVRAMLoader"]["input"]["required"]
    for name, first in shards.items():
        folder = first.partition("/")[0]
        assert [choice for choice in inputs[name][0] if choice.startswith(folder)] == [first]
        assert len(list(mixing.server.base.glob(f"models/*/{folder}/*-of-*"))) > 1
    assert_same(mixing, plain, **shards)
    later = shards["transformer"].replace("-00001-of", "-00002-of")
    assert_same(mixing, plain, transformer=later)


def test_a_missing_shard_is_named_before_the_run(mixing: Mixing, shards: dict[str, str]) -> None:
    second = (
        mixing.server.base / "models" / "diffusion_models" / shards["transformer"].replace("-00001-of", "-00002-of")
    )
    second.rename(second.with_suffix(".away"))
    try:
        with pytest.raises(PromptRefused, match=rf"is part 1 of \d+; missing: {second.name}\. Put"):
            mixing.client.run(ours(mixing, transformer=shards["transformer"]))
    finally:
        second.with_suffix(".away").rename(second)


def test_gguf_parts_make_the_latents_of_the_whole_file(mixing: Mixing, full_pipeline: Path) -> None:
    folder = mixing.server.base / "models" / "diffusion_models"
    weights = {k: v for f in (full_pipeline / "transformer").glob("*.safetensors") for k, v in load_file(f).items()}
    config = json.loads((full_pipeline / "transformer" / "config.json").read_text(encoding="utf-8"))
    write_gguf_transformer(folder / "whole-Q8_0.gguf", weights, config, "Q8_0")
    write_gguf_transformer(folder / "split-Q8_0.gguf", weights, config, "Q8_0", split_max_tensors=50)
    assert len(list(folder.glob("split-Q8_0-*.gguf"))) > 1
    (first,) = (
        choice
        for choice in mixing.client.object_info()["QwenLowVRAMLoader"]["input"]["required"]["transformer"][0]
        if choice.startswith("split-Q8_0")
    )
    whole, parts = (
        mixing.latents(mixing.client.run(ours(mixing, transformer=name))) for name in ("whole-Q8_0.gguf", first)
    )
    assert torch.equal(whole, parts)


def test_single_files_of_bitsandbytes_make_the_latents_of_their_folder(mixing: Mixing, full_pipeline: Path) -> None:
    models = mixing.server.base / "models"
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    folder = models / "diffusers" / "nf4"
    write_quantized_pipeline(full_pipeline, folder, **options)
    chosen = {"transformer": "diffusion_models", "text_encoder": "text_encoders"}
    for component, kind in chosen.items():
        (written,) = (folder / component).glob("*.safetensors")
        config = (folder / component / "config.json").read_text(encoding="utf-8")
        save_file(load_file(written), models / kind / "bnb-nf4.safetensors", {CONFIG: config})
    single = dict.fromkeys(chosen, "bnb-nf4.safetensors")
    of_folder = {"transformer": "nf4 (folder)", "text_encoder": FOLDER}
    files, pipeline = (mixing.latents(mixing.client.run(ours(mixing, **given))) for given in (single, of_folder))
    assert torch.equal(files, pipeline)
    assert files.std() > 0.3


def test_a_doubt_about_the_edit_model_is_told_on_the_loader_until_one_is_chosen(mixing: Mixing) -> None:
    folder = mixing.server.base / "models" / "diffusion_models"
    named = folder / "QIE_merge.safetensors"
    named.hardlink_to(folder / mixing.files["plain"].transformer)
    words = b"set variant to that in 'Load Qwen-Image (low VRAM)'"
    prompt = {"ours": ours(mixing, transformer=named.name)["ours"]}
    prompt["clip"] = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["ours", 1], "text": "a dog"}}
    prompt["shown"] = {"class_type": "PreviewAny", "inputs": {"source": ["clip", 0]}}
    told = [message for message in mixing.client.run(prompt).previews if words in message]
    assert len(told) == 1
    assert b"ours" in told[0]  # the node that shows it
    assert b"used as Qwen-Image-Edit. If it is Qwen-Image-Edit-2509 or Qwen-Image-Edit-2511, set" in told[0]
    chosen = with_inputs(prompt, "ours", variant="Qwen-Image-Edit-2511")
    assert not any(words in message for message in mixing.client.run(chosen).previews)
