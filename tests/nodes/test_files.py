"""The loader reaches the files of ComfyUI's own folders and of extra_model_paths.yaml, and no other, and says why."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import write_gguf_text_encoder, write_gguf_vision
from qwenimage_lowvram.engine.errors import MissingFile, QwenLowVRAMError, WrongModel
from qwenimage_lowvram.engine.models.qwen_image.variants import Variant
from safetensors.torch import load_file
from small_checkpoint import SplitFiles, TextSize, make_text_encoder, make_tokenizer, write_split_files

SMALL = "small (folder)"


@pytest.fixture
def split(full_pipeline: Path, models: Any, tmp_path: Path) -> tuple[SplitFiles, Path]:
    """Split files of the small model in ComfyUI's folders; beside those, what no graph may reach."""
    written = write_split_files(full_pipeline, tmp_path / "models", dtype="bf16")
    for kind in ("diffusion_models", "text_encoders", "vae"):
        models(kind, str(tmp_path / "models" / kind))
    (tmp_path / "models" / "diffusers" / "small").mkdir(parents=True)
    models("diffusers", str(tmp_path / "models" / "diffusers"))
    shutil.copytree(full_pipeline, tmp_path / "models" / "diffusers" / "small", dirs_exist_ok=True)
    shutil.copytree(full_pipeline, tmp_path / "outside")
    for kind, name in (
        ("diffusion_models", written.transformer), ("text_encoders", written.text_encoder), ("vae", written.vae)
    ):  # fmt: skip
        shutil.copy(tmp_path / "models" / kind / name, tmp_path / f"outside_{kind}.safetensors")
    return written, tmp_path


def loader() -> Any:
    from qwenimage_lowvram.nodes.loader import QwenLowVRAMLoader

    return QwenLowVRAMLoader


SETTINGS = {"dtype": "fp32", "weight_format": "as stored", "vram_limit_gb": 0.0, "timesteps": "fp32"}


def says(transformer: Any, text_encoder: Any, vae: Any, **settings: Any) -> str:
    """What the loader says of these inputs before it loads anything: of the transformer before the run, of the others
    when it runs. Empty if nothing."""
    said = asyncio.run(loader().VALIDATE_INPUTS(transformer))
    raised = ""
    try:
        loader()().load(transformer, text_encoder, vae, **(SETTINGS | settings))
    except QwenLowVRAMError as error:
        raised = str(error)
    assert said is True or raised == f"transformer: {said}"
    assert not raised or loader().IS_CHANGED(transformer, text_encoder, vae, **settings) == raised
    return raised


def choices(name: str) -> list[str]:
    listed: list[str] = loader().INPUT_TYPES()["required"][name][0]
    return listed


def test_the_files_of_comfyuis_folders_are_listed_and_open(split: tuple[SplitFiles, Path]) -> None:
    names, _ = split
    assert names.transformer in choices("transformer")
    assert SMALL in choices("transformer")
    assert names.text_encoder in choices("text_encoder")
    assert names.vae in choices("vae")
    assert says(names.transformer, names.text_encoder, names.vae) == ""
    assert says(SMALL, "from the folder", "from the folder") == ""


def test_the_folders_of_extra_model_paths_are_listed_and_open(models: Any, full_pipeline: Path, tmp_path: Path) -> None:
    from utils.extra_config import load_extra_path_config

    names = write_split_files(full_pipeline, tmp_path / "elsewhere", dtype="gguf_q8_0")
    (tmp_path / "elsewhere" / "diffusion_models").rename(tmp_path / "elsewhere" / "unet")
    shutil.copytree(full_pipeline, tmp_path / "elsewhere" / "pipelines" / "deep" / "small")
    (tmp_path / "extra_model_paths.yaml").write_text(
        "mine:\n    base_path: elsewhere\n    unet: unet\n    text_encoders: text_encoders\n    vae: vae\n"
        "    diffusers: pipelines\n"
    )
    load_extra_path_config(str(tmp_path / "extra_model_paths.yaml"))
    assert names.transformer in choices("transformer")
    assert says(names.transformer, names.text_encoder, names.vae) == ""
    assert says("deep/small (folder)", "from the folder", "from the folder") == ""


def _ways_out(root: Path, kind: str) -> list[Any]:
    """Ways of writing a path to a file that is there, and would load."""
    outside = f"outside_{kind}.safetensors"
    inside = next((root / "models" / kind).iterdir()).name
    return [
        f"../../{outside}",
        f"..\\..\\{outside}",
        f"./../../{outside}",
        f"sub/../../../{outside}",
        f"../{kind}/{inside}",
        f"./{inside}",
        f".\\{inside}",
        f"{inside}/",
        f"{inside}/.",
        f"{inside}\0",
        f"{inside}\0.safetensors",
        str(root / outside),
        "/" + str(root / outside),
        f"/{inside}",
        f"file://{root / outside}",
        f"C:{outside}",
        f"C:\\{outside}",
        f"\\\\?\\{root / outside}",
        f"//localhost/{root / outside}",
        f"{inside}::$DATA",
        f"%2e%2e/%2e%2e/{outside}",
        f"{root.name}/{outside}",
        "",
        ".",
        "..",
        f"../../{outside} (checkpoint)",
        f"../{kind}/{inside} (checkpoint)",
        f"{inside} (checkpoint)",
        " (checkpoint)",
        "../../outside (folder)",
        f"{root / 'outside'} (folder)",
        "small/../../../outside (folder)",
        ". (folder)",
        " (folder)",
        "../diffusers/small (folder)",
        "small/transformer (folder)",
        "Small (folder)",
        7,
        ["a", 0, 1],
        {},
    ]


@pytest.mark.parametrize("name", ["Wan2.1_VAE.pth", "vae.PT", "sub/vae.ckpt", "diffusion_pytorch_model.bin"])
def test_a_file_of_pytorchs_is_said_to_be_there_and_not_read(name: str, split: tuple[SplitFiles, Path]) -> None:
    names, root = split
    (root / "models" / "vae" / "sub").mkdir()
    torch.save({"decoder.conv1.weight": torch.zeros(3)}, root / "models" / "vae" / name)
    assert name not in choices("vae")
    said = says(names.transformer, names.text_encoder, name)
    assert said.startswith(f"vae: {name!r} in models/vae is a PyTorch file, which could run code")
    assert "use the model's .safetensors file" in said


def test_a_link_whose_file_is_gone_is_called_so(split: tuple[SplitFiles, Path]) -> None:
    names, root = split
    (root / "models" / "vae" / "linked.safetensors").symlink_to(root / "blobs" / "gone")
    said = says(names.transformer, names.text_encoder, "linked.safetensors")
    assert said.startswith("vae: 'linked.safetensors' in models/vae is a link whose target no longer exists.")


def test_a_gguf_file_in_a_folder_without_such_is_said_to_be_there(split: tuple[SplitFiles, Path]) -> None:
    names, root = split
    (root / "models" / "vae" / "qwen_image_vae.GGUF").write_bytes(b"GGUF")
    said = says(names.transformer, names.text_encoder, "qwen_image_vae.GGUF")
    assert said.startswith("vae: 'qwen_image_vae.GGUF' is in models/vae, and GGUF files are not read from there.")


@pytest.mark.parametrize("name", ["transformer", "text_encoder", "vae"])
def test_no_input_reaches_a_file_outside_the_folders(name: str, split: tuple[SplitFiles, Path]) -> None:
    names, root = split
    right = {"transformer": names.transformer, "text_encoder": names.text_encoder, "vae": names.vae}
    assert says(**right) == ""
    kind = {"transformer": "diffusion_models", "text_encoder": "text_encoders", "vae": "vae"}[name]
    for way in _ways_out(root, kind):
        with pytest.raises(MissingFile) as refused:
            loader()().load(**(right | {name: way}), **SETTINGS)
        said = says(**(right | {name: way}))
        assert said == str(refused.value)
        assert said.startswith(f"{name}: There is no"), way
        assert "outside" not in said.replace(repr(way), "").replace(repr(way).removesuffix(" (folder)'"), ""), way


def test_a_pipelines_index_leads_nowhere_else(split: tuple[SplitFiles, Path]) -> None:
    _, root = split
    transformer = root / "models" / "diffusers" / "small" / "transformer"
    (transformer / "x.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../../../../outside_diffusion_models.safetensors"}}'
    )
    said = says(SMALL, "from the folder", "from the folder")
    assert "not a .safetensors file in the same folder" in said


# what is wrong with a file, said before the run


@pytest.mark.parametrize("gguf", [False, True])
def test_a_text_encoder_of_another_size_is_named_before_the_run(gguf: bool, split: tuple[SplitFiles, Path]) -> None:
    names, root = split
    encoder = make_text_encoder(make_tokenizer(full=True), TextSize(hidden=128), seed=1)
    folder = root / "models" / "text_encoders"
    encoder.save_pretrained(folder / "qwen_3b")
    name = "qwen_3b/model.safetensors"
    if gguf:
        config = json.loads((folder / "qwen_3b" / "config.json").read_text(encoding="utf-8"))
        write_gguf_text_encoder(folder / "qwen_3b.gguf", load_file(folder / name), config, "Q8_0")
        name = "qwen_3b.gguf"
    said = says(names.transformer, name, names.vae)
    assert said.startswith("text_encoder: ")
    assert f"makes embeddings of 128 numbers, but the transformer {names.transformer} takes 64" in said


def test_a_vae_of_another_kind_is_named_before_the_run(split: tuple[SplitFiles, Path]) -> None:
    from diffusers import AutoencoderKL
    from safetensors.torch import save_file

    names, root = split
    flux = AutoencoderKL(block_out_channels=(32,), latent_channels=16).state_dict()
    save_file(flux, root / "models" / "vae" / "ae.safetensors")
    said = says(names.transformer, names.text_encoder, "ae.safetensors")
    assert said.startswith("vae: ")
    assert "ae.safetensors is a Stable Diffusion or Flux VAE. Use qwen_image_vae.safetensors." in said


def test_a_gguf_file_under_another_ending_is_named(split: tuple[SplitFiles, Path], full_pipeline: Path) -> None:
    names, root = split
    folder = root / "models" / "diffusion_models"
    quantized = write_split_files(full_pipeline, root / "quantized", dtype="gguf_q8_0")
    shutil.copy(root / "quantized" / "diffusion_models" / quantized.transformer, folder / "renamed.safetensors")
    shutil.copy(folder / names.transformer, folder / "renamed.gguf")
    said = says("renamed.safetensors", names.text_encoder, names.vae)
    assert "renamed.safetensors is not a safetensors file, but a GGUF file. Rename it so that it ends in .gguf." in said
    said = says("renamed.gguf", names.text_encoder, names.vae)
    assert "renamed.gguf is not a GGUF file, but a safetensors file. Rename it so that it ends in .safetensors." in said


def test_code_that_rounds_in_another_way_is_allowed_where_compute_is_fast(split: tuple[SplitFiles, Path]) -> None:
    files = (split[0].transformer, split[0].text_encoder, split[0].vae)
    models = [loader()().load(*files, **SETTINGS, compute=compute)[0] for compute in ("auto", "exact", "fast")]
    assert [model.model.exact for model in models] == [True, True, False]


def test_2511_without_its_mark_is_refused_until_it_is_chosen(split: tuple[SplitFiles, Path]) -> None:
    names, root = split
    folder = root / "models" / "diffusion_models"
    (folder / names.transformer).rename(folder / "Qwen-Image-Edit-2511-bf16.safetensors")
    files = ("Qwen-Image-Edit-2511-bf16.safetensors", names.text_encoder, names.vae)
    said = says(*files)
    assert "has lost that model's mark" in said
    assert "Choose the variant Qwen-Image-Edit-2511" in said
    settings = {"dtype": "fp32", "weight_format": "auto", "vram_limit_gb": 0.0, "timesteps": "fp32"}
    with pytest.raises(WrongModel, match="has lost that model's mark"):
        loader()().load(*files, **settings)
    assert says(*files, variant="Qwen-Image-Edit-2511") == ""
    loader().IS_CHANGED(*files, **settings, variant="Qwen-Image-Edit-2511")
    model, _, _ = loader()().load(*files, **settings, variant="Qwen-Image-Edit-2511")
    assert model.model.transformer.variant is Variant.EDIT_2511
    assert model.model.transformer.config.zero_cond_t


def test_a_vision_part_beside_a_gguf_encoder_counts_as_part_of_the_choice(
    split: tuple[SplitFiles, Path], full_pipeline: Path
) -> None:
    names, root = split
    source, folder = full_pipeline / "text_encoder", root / "models" / "text_encoders"
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    weights = load_file(next(source.glob("*.safetensors")))
    write_gguf_text_encoder(folder / "encoder-Q8_0.gguf", weights, config, "Q8_0")
    settings = {"dtype": "fp32", "weight_format": "auto", "vram_limit_gb": 0.0, "timesteps": "fp32"}
    seen = []
    for kind in (None, "F32", "F16"):
        if kind is not None:
            write_gguf_vision(folder / "encoder-mmproj.gguf", weights, config, kind)
        seen.append(loader().IS_CHANGED(names.transformer, "encoder-Q8_0.gguf", names.vae, **settings))
        assert loader().IS_CHANGED(names.transformer, "encoder-Q8_0.gguf", names.vae, **settings) == seen[-1]
    assert len(set(seen)) == 3


def test_an_unknown_variant_is_refused(split: tuple[SplitFiles, Path]) -> None:
    names, _ = split
    said = says(names.transformer, names.text_encoder, names.vae, variant="Qwen-Image-Layered")
    assert said.startswith("variant: There is no variant 'Qwen-Image-Layered'. Use one of: auto, Qwen-Image,")


@pytest.mark.parametrize("value", [[], {}, 5, float("nan")])
def test_a_weight_format_that_is_no_text_is_refused_when_the_node_runs(
    value: Any, split: tuple[SplitFiles, Path]
) -> None:
    names, _ = split
    chosen = {"transformer": names.transformer, "text_encoder": names.text_encoder, "vae": names.vae}
    assert loader().IS_CHANGED(**chosen, weight_format=value) == loader().IS_CHANGED(**chosen, weight_format="auto")
    with pytest.raises(QwenLowVRAMError, match="There is no weight_format"):
        loader()().load(**chosen, **(SETTINGS | {"weight_format": value}))
