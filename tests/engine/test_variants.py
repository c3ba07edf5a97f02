"""Which member of the family a transformer is, is known from its mark, its pipeline, its metadata or its name."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf_files import write_gguf_transformer
from qwenimage_lowvram.engine.errors import DamagedFile, WrongModel
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen_image.tensors import sort_transformer
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.models.qwen_image.variants import MARK_2511, Variant, could_be
from small_checkpoint import make_transformer

Shapes = dict[str, tuple[int, ...]]

# names of published files and of folders, and what they hold
NAMES = {
    "qwen_image_fp8_e4m3fn.safetensors": Variant.QWEN_IMAGE,
    "qwen_image_2512_bf16.safetensors": Variant.QWEN_IMAGE,
    "qwen_image_2512_fp8_e4m3fn.safetensors": Variant.QWEN_IMAGE,
    "qwen_image_2512_fp8_e4m3fn_scaled_comfyui_4steps_v1.0.safetensors": Variant.QWEN_IMAGE,
    "qwen-image-Q4_K_M.safetensors": Variant.QWEN_IMAGE,
    "credits_edited_by_me.safetensors": Variant.QWEN_IMAGE,
    "qwen_image_edit_fp8_e4m3fn.safetensors": Variant.EDIT,
    "Qwen_Image_Edit-Q8_0.safetensors": Variant.EDIT,
    "qwenimageedit.safetensors": Variant.EDIT,
    "qwen_image_edit_2509_fp8_e4m3fn.safetensors": Variant.EDIT_2509,
    "Qwen-Image-Edit-2509-Q4_K_M.safetensors": Variant.EDIT_2509,
    "QwenImageEdit2509.safetensors": Variant.EDIT_2509,
    "qwen-image-edit-plus-Q8_0.safetensors": Variant.EDIT_2509,
    "QwenEdit_25-09.safetensors": Variant.EDIT_2509,
    "QIE-2509-v2.safetensors": Variant.EDIT_2509,
    "QIE_merge.safetensors": Variant.EDIT,
    "qwen_image_20251109.safetensors": Variant.QWEN_IMAGE,
    "svdq-edit_12509x.safetensors": Variant.EDIT,
}


@pytest.mark.parametrize(("name", "variant"), NAMES.items())
def test_a_files_name_tells_the_variant(
    name: str, variant: Variant, transformer_shapes: Shapes, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    found = sort_transformer(open_checkpoint(write_model(tmp_path / name, transformer_shapes)))
    assert found.variant is variant
    assert not found.config.zero_cond_t


OPEN = {  # what else a name may mean
    "QIE_merge.safetensors": (Variant.EDIT_2509, Variant.EDIT_2511),
    "Qwen-Image-Edit-Rapid-AIO-v3.safetensors": (Variant.EDIT_2509, Variant.EDIT_2511),
    "svdq-edit_12509x.safetensors": (Variant.EDIT_2509, Variant.EDIT_2511),
    "QwenImageEdit-fp8mixed.safetensors": (),
    "Qwen-Image-Edit-UD-Q4_K_XL.safetensors": (),
    "Qwen-Image-Edit-Lightning-4steps.safetensors": (),
    "my-edits.safetensors": (),
    **{name: () for name, variant in NAMES.items() if variant is not Variant.EDIT},
    **dict.fromkeys(("qwen_image_edit_fp8_e4m3fn.safetensors", "Qwen_Image_Edit-Q8_0.safetensors"), ()),
}


@pytest.mark.parametrize(("name", "others"), OPEN.items())
def test_a_name_that_does_not_tell_which_edit_model_it_is_leaves_a_doubt(
    name: str,
    others: tuple[Variant, ...],
    transformer_shapes: Shapes,
    tmp_path: Path,
    write_model: Callable[..., Path],
) -> None:
    assert could_be(open_checkpoint(write_model(tmp_path / name, transformer_shapes))) == others
    marked = write_model(tmp_path / f"marked_{name}", {**transformer_shapes, MARK_2511: (0,)})
    assert could_be(open_checkpoint(marked)) == ()


def test_names_that_contradict_each_other_leave_a_doubt(
    transformer_shapes: Shapes, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    file = tmp_path / "Qwen-Image-Edit-2509-Q4_K_M.safetensors"
    metadata = {"modelspec.title": "Qwen-Image-Edit"}
    assert could_be(open_checkpoint(write_model(file, transformer_shapes, metadata=metadata))) == (Variant.EDIT_2509,)


def test_a_pipelines_class_leaves_no_doubt(
    transformer_shapes: Shapes, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    folder = _pipeline(tmp_path / "QIE_merge", "QwenImageEditPipeline", transformer_shapes, write_model)
    assert could_be(open_checkpoint(folder)) == ()


def test_only_editing_models_edit() -> None:
    assert [variant.value for variant in Variant if variant.edits] == [
        "Qwen-Image-Edit",
        "Qwen-Image-Edit-2509",
        "Qwen-Image-Edit-2511",
    ]


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("marked", ["tensor", "configuration", "tensor against configuration"])
def test_edit_2511_is_known_by_its_mark_under_any_name(
    marked: str, prefix: str, transformer_shapes: Shapes, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    shapes = {prefix + name: shape for name, shape in transformer_shapes.items()}
    stated = {"zero_cond_t": marked == "configuration"}
    metadata = None if marked == "tensor" else {"config": json.dumps(stated)}
    if marked != "configuration":
        shapes[prefix + MARK_2511] = (0,)
    file = write_model(tmp_path / "my_model.safetensors", shapes, metadata=metadata)
    found = sort_transformer(open_checkpoint(file))
    assert found.variant is Variant.EDIT_2511
    assert found.config.zero_cond_t


@pytest.mark.parametrize(
    "name",
    [
        "qwen_image_edit_2511_fp8mixed",
        "Qwen-Image-Edit-2511-Q4_K_M",
        "qwenImageEdit2511",
        "QIE-2511-merge",
        "QwenEdit_25-11",
        "qwen_2511_rapid",
    ],
)
def test_2511_by_name_without_its_mark_is_refused_with_the_way_out(
    name: str, transformer_shapes: Shapes, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path / f"{name}.safetensors", transformer_shapes))
    with pytest.raises(
        WrongModel, match=r"is Qwen-Image-Edit-2511 by its name, but has lost that model's mark.*Choose"
    ):
        sort_transformer(checkpoint)
    chosen = sort_transformer(checkpoint, Variant.EDIT_2511)
    assert chosen.config.zero_cond_t
    older = sort_transformer(checkpoint, Variant.EDIT_2509)
    assert (older.variant, older.config.zero_cond_t) == (Variant.EDIT_2509, False)


def test_a_gguf_file_of_2511_that_lost_its_mark_is_one_when_that_is_chosen(tmp_path: Path) -> None:
    model = make_transformer(layers=2, text_dim=32)
    file = tmp_path / "Qwen-Image-Edit-2511-Q8_0.gguf"
    config = {key: value for key, value in model.config.items() if key != "zero_cond_t"}
    write_gguf_transformer(file, model.state_dict(), config, "Q8_0")
    checkpoint, cpu = open_checkpoint(file), Hardware.detect(torch.device("cpu"))
    with pytest.raises(WrongModel, match="as many GGUF files have"):
        QwenImageTransformer(checkpoint, dtype=torch.float32, hardware=cpu)
    transformer = QwenImageTransformer(checkpoint, dtype=torch.float32, hardware=cpu, variant=Variant.EDIT_2511)
    assert transformer.variant is Variant.EDIT_2511
    assert transformer.config.zero_cond_t


@pytest.mark.parametrize("chosen", [Variant.EDIT, Variant.EDIT_2509])
def test_a_marked_file_is_not_taken_for_an_older_edit_model(
    chosen: Variant, transformer_shapes: Shapes, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path / "m", {**transformer_shapes, MARK_2511: (0,)}))
    with pytest.raises(
        WrongModel, match=rf"is marked as Qwen-Image-Edit-2511, but the variant {chosen.value} was chosen"
    ):
        sort_transformer(checkpoint, chosen)


def test_a_marked_file_without_images_still_computes_as_2511(
    transformer_shapes: Shapes, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path / "m", {**transformer_shapes, MARK_2511: (0,)}))
    found = sort_transformer(checkpoint, Variant.QWEN_IMAGE)
    assert (found.variant, found.config.zero_cond_t) == (Variant.QWEN_IMAGE, True)


@pytest.mark.parametrize("chosen", [variant for variant in Variant if variant is not Variant.LAYERED])
def test_a_choice_counts_more_than_a_name(
    chosen: Variant, transformer_shapes: Shapes, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path / "qwen_image_edit_2509.safetensors", transformer_shapes))
    found = sort_transformer(checkpoint, chosen)
    assert found.variant is chosen
    assert found.config.zero_cond_t == (chosen is Variant.EDIT_2511)


@pytest.mark.parametrize(
    ("metadata", "variant"),
    [
        ({"modelspec.title": "Qwen-Image-Edit-2509 fp8"}, Variant.EDIT_2509),
        ({"general.name": "Qwen Image Edit"}, Variant.EDIT),
        ({"modelspec.title": "Qwen-Image"}, Variant.QWEN_IMAGE),
        ({"modelspec.author": "the edit 2509 team"}, Variant.QWEN_IMAGE),
    ],
)
def test_a_title_in_the_metadata_tells_the_variant(
    metadata: dict[str, str],
    variant: Variant,
    transformer_shapes: Shapes,
    tmp_path: Path,
    write_model: Callable[..., Path],
) -> None:
    file = write_model(tmp_path / "m.safetensors", transformer_shapes, metadata=metadata)
    assert sort_transformer(open_checkpoint(file)).variant is variant


def _pipeline(folder: Path, class_name: object, shapes: Shapes, write_model: Callable[..., Path]) -> Path:
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": class_name}))
    write_model(folder / "transformer" / "model.safetensors", shapes)
    return folder / "transformer"


@pytest.mark.parametrize(
    ("class_name", "folder", "variant"),
    [
        ("QwenImagePipeline", "m", Variant.QWEN_IMAGE),
        ("QwenImageInpaintPipeline", "m", Variant.QWEN_IMAGE),
        ("QwenImageEditPipeline", "m", Variant.EDIT),
        ("QwenImageEditInpaintPipeline", "m", Variant.EDIT),
        ("QwenImageEditPlusPipeline", "m", Variant.EDIT_2509),
        ("QwenImagePipeline", "edit", Variant.QWEN_IMAGE),
        ("SomethingElse", "Qwen-Image-Edit-2509", Variant.EDIT_2509),
        (["a", "list"], "Qwen-Image-Edit", Variant.EDIT),
    ],
)
def test_a_pipelines_class_tells_the_variant_and_its_folders_name_where_it_does_not(
    class_name: object,
    folder: str,
    variant: Variant,
    transformer_shapes: Shapes,
    tmp_path: Path,
    write_model: Callable[..., Path],
) -> None:
    path = _pipeline(tmp_path / folder, class_name, transformer_shapes, write_model)
    assert sort_transformer(open_checkpoint(path)).variant is variant


def test_a_pipeline_folder_of_2511_without_its_mark_is_refused(
    transformer_shapes: Shapes, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    name = "Qwen-Image-Edit-2511"
    path = _pipeline(tmp_path / name, "QwenImageEditPlusPipeline", transformer_shapes, write_model)
    with pytest.raises(WrongModel, match="has lost that model's mark"):
        sort_transformer(open_checkpoint(path))


def test_a_damaged_model_index_is_named(
    transformer_shapes: Shapes, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    path = _pipeline(tmp_path / "m", "QwenImagePipeline", transformer_shapes, write_model)
    (tmp_path / "m" / "model_index.json").write_text("{")
    with pytest.raises(DamagedFile, match=r"model_index\.json is not valid JSON"):
        sort_transformer(open_checkpoint(path))
