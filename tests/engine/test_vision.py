"""Images are seen as transformers' own tower sees them, block by block, and stand in prompts where its model puts
them."""

import json
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gguf_files import write_gguf_text_encoder, write_gguf_vision
from hypothesis import given, settings
from hypothesis import strategies as st
from live_bytes import LiveBytes
from PIL import Image
from qwenimage_lowvram.engine.errors import DoesNotFit, InvalidRequest, WrongModel
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen25_vl.costs import Qwen25VisionFootprint
from qwenimage_lowvram.engine.models.qwen25_vl.text_encoder import TextEncoder
from qwenimage_lowvram.engine.models.qwen25_vl.vision_patches import patch_image
from qwenimage_lowvram.engine.models.qwen25_vl.vision_tower import VisionTower
from qwenimage_lowvram.engine.models.qwen_image.prompt_template import EDIT_TEMPLATE
from qwenimage_lowvram.engine.models.qwen_image.prompts import PromptTokenizer, with_places
from qwenimage_lowvram.engine.models.qwen_vl.image_prompts import IMAGE, token_positions
from qwenimage_lowvram.engine.models.qwen_vl.images import PatchedImage
from qwenimage_lowvram.engine.planning.forecast import TYPICAL
from qwenimage_lowvram.engine.planning.request import GIB
from qwenimage_lowvram.engine.planning.stages import encode_stage
from qwenimage_lowvram.engine.planning.text_encoder import text_encoder_peak_bytes
from qwenimage_lowvram.engine.planning.vision import plan_vision, vision_peak_bytes, with_vision
from safetensors.torch import load_file, save_file
from small_checkpoint import TextSize, make_text_encoder, make_tokenizer
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel

BLOCKS = 4
SIZES = [(224, 672), (112, 112), (280, 168)]  # (height, width), multiples of 28
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(scope="module")
def tokenizer(comfyui_path: Path) -> Any:
    return make_tokenizer(full=False, comfyui=comfyui_path)


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text encoder whose tower attends in windows and everywhere in turn."""
    folder = tmp_path_factory.mktemp("vision")
    model = make_text_encoder(tokenizer, TextSize(vision_layers=BLOCKS), seed=2)
    model.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> Callable[[torch.dtype], Any]:
    made: dict[torch.dtype, Any] = {}

    def load(dtype: torch.dtype) -> Any:
        if dtype not in made:
            made[dtype] = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=dtype)
        return made[dtype]

    return load


# transformers 4 finds by itself which tokens are images
TOLD_KINDS = "mm_token_type_ids" in signature(Qwen2_5_VLModel.get_rope_index).parameters


def kinds_of(kinds: list[int]) -> dict[str, torch.Tensor]:
    """Which tokens are images (1), where transformers is to be told."""
    return {"mm_token_type_ids": torch.tensor([kinds])} if TOLD_KINDS else {}


def make_tower(folder: Path, hardware: Hardware, dtype: torch.dtype = torch.float32) -> VisionTower:
    return VisionTower(open_checkpoint(folder / "text_encoder"), dtype=dtype, hardware=hardware)


def random_image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(seed))


def images(*sizes: tuple[int, int]) -> list[PatchedImage]:
    return [patch_image(random_image(*size, seed=i)) for i, size in enumerate(sizes)]


def grid_of(shown: list[PatchedImage]) -> torch.Tensor:
    return torch.tensor([(1, image.height, image.width) for image in shown])


# the tower


@DTYPES
@pytest.mark.parametrize("slots", [1, 2])
def test_images_are_seen_as_by_transformers_bit_for_bit(
    slots: int, dtype: torch.dtype, folder: Path, hardware: Hardware, reference: Callable[[torch.dtype], Any]
) -> None:
    shown = images(*SIZES)
    seen = make_tower(folder, hardware, dtype).see(shown, slots=slots)
    patches = torch.cat([image.patches for image in shown])
    with torch.no_grad():
        wanted = reference(dtype).model.get_image_features(patches, grid_of(shown))
    wanted = getattr(wanted, "pooler_output", wanted)  # transformers 4 returns them bare
    for ours, theirs, image in zip(seen, wanted, shown, strict=True):
        assert torch.equal(ours.embeds, theirs)
        assert (ours.height, ours.width) == (image.height // 2, image.width // 2)
        assert image.tokens == len(ours.embeds)
        assert theirs.float().std() > 0.1


def test_a_gguf_encoders_mmproj_sees_the_same(folder: Path, cpu: Hardware, tmp_path: Path) -> None:
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    config = json.loads((folder / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    write_gguf_text_encoder(tmp_path / "encoder-Q8_0.gguf", weights, config, "Q8_0")
    write_gguf_vision(tmp_path / "mmproj-F32.gguf", weights, config, "F32")
    encoder = open_checkpoint(tmp_path / "encoder-Q8_0.gguf")
    tower = VisionTower(encoder, dtype=torch.float32, hardware=cpu)
    assert tower.identity != encoder.identity
    shown = images(*SIZES)
    for ours, wanted in zip(tower.see(shown), make_tower(folder, cpu).see(shown), strict=True):
        assert torch.equal(ours.embeds, wanted.embeds)


def test_all_images_read_each_block_once(folder: Path, hardware: Hardware) -> None:
    tower = make_tower(folder, hardware)
    blocks = sum(
        entry.nbytes
        for name, entry in open_checkpoint(folder / "text_encoder").tensors.items()
        if name.startswith("visual.blocks.")
    )
    visited: list[int] = []
    tower.see(images(*SIZES), on_block=visited.append)
    assert visited == list(range(BLOCKS))
    assert tower.fetched_bytes == blocks


@pytest.mark.parametrize("stopped", [False, True])
def test_nothing_of_the_tower_stays(
    stopped: bool, folder: Path, hardware: Hardware, open_handles: Callable[[Path], int]
) -> None:
    tower, shown = make_tower(folder, hardware, torch.bfloat16), images(*SIZES)

    def on_block(index: int) -> None:
        if stopped and index == 1:
            raise KeyboardInterrupt

    def see() -> None:
        try:
            tower.see(shown, on_block=on_block)
        except KeyboardInterrupt:
            assert stopped

    before = torch.get_rng_state()
    with LiveBytes("cpu") as live:
        see()
        assert live.peak > 0
        assert live.now == 0
    assert not open_handles(folder / "text_encoder" / "model.safetensors")
    assert torch.equal(torch.get_rng_state(), before)
    assert len(tower.see(shown)) == len(shown)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[(364, 420)], [(364, 420), (392, 364), (280, 504)]], ids=["one", "three"])
@pytest.mark.parametrize(("slots", "dtype"), [(1, torch.float32), (2, torch.float32), (2, torch.bfloat16)], ids=str)
def test_at_its_real_width_the_tower_takes_what_the_plan_says(
    sizes: list[tuple[int, int]], slots: int, dtype: torch.dtype, folder: Path, cpu: Hardware, tmp_path: Path
) -> None:
    tower = VisionTower(open_checkpoint(_real_width(folder, tmp_path, dtype)), dtype=dtype, hardware=cpu)
    shown = images(*sizes)
    kept = sum(image.patches.nbytes for image in shown)  # the images themselves, which the first look counts
    with torch.inference_mode(), LiveBytes("cpu") as live:
        tower.see(shown, slots=slots)
        assert live.now in (0, kept)
    predicted = vision_peak_bytes(tower.footprint, [p.height * p.width for p in shown], slots)
    assert 0.95 * predicted < live.peak - live.now <= predicted


def _real_width(folder: Path, target: Path, dtype: torch.dtype) -> Path:
    """The small language model with two blocks of the real tower, full of zeros."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    config = json.loads((folder / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    settings = {"depth": 2, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 64}
    config["vision_config"] = {**settings, "window_size": 112, "fullatt_block_indexes": [1]}
    with torch.device("meta"):
        model = Qwen2_5_VisionTransformerPretrainedModel(Qwen2_5_VLVisionConfig(**settings))
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    text = {name: value.to(dtype) for name, value in weights.items() if not name.startswith("visual.")}
    vision = {f"visual.{name}": torch.zeros(p.shape, dtype=dtype) for name, p in model.named_parameters()}
    save_file(text | vision, target / "wide.safetensors", metadata={"config": json.dumps(config)})
    return target / "wide.safetensors"


REAL = Qwen25VisionFootprint(
    blocks=32, slot_bytes=39_400_000, staging_bytes=0, scratch_bytes=0, stored_bytes=39_400_000, ring_bytes=0,
    host=False, outside_bytes=92_000_000, patch_values=1176, hidden_size=1280, intermediate_size=3420, head_dim=80,
    merge=2, out_hidden_size=3584, element_bytes=2,
)  # fmt: skip


@pytest.mark.parametrize("patches", [[744], [744, 760, 800], [5476]], ids=str)
def test_the_real_tower_takes_less_than_the_encoders_layers_do(patches: list[int]) -> None:
    assert vision_peak_bytes(REAL, patches, 2) < 0.6 * GIB


PATCHES = [744, 760]


@pytest.mark.parametrize("share", [0.97, 0.99, 1.0, 1.5])
def test_a_limit_is_kept(share: float) -> None:
    limit = int(vision_peak_bytes(REAL, PATCHES, 2) * share)
    slots = plan_vision(REAL, PATCHES, limit)
    assert vision_peak_bytes(REAL, PATCHES, slots) <= limit
    assert slots == (1 if share < 1 else 2)


def test_a_limit_that_is_too_low_is_refused_with_one_that_would_do() -> None:
    limit = vision_peak_bytes(REAL, PATCHES, 1) - 1
    with pytest.raises(DoesNotFit, match=r"Looking at 2 images \(186 \+ 190 tokens\) needs") as caught:
        plan_vision(REAL, PATCHES, limit)
    needed = str(caught.value).split("VRAM limit of ")[1].split(" GB")[0]
    assert plan_vision(REAL, PATCHES, round(float(needed) * GIB)) == 1


def test_the_stage_is_planned_for_its_worse_half(folder: Path, cpu: Hardware) -> None:
    encoder = TextEncoder(open_checkpoint(folder / "text_encoder"), dtype=torch.float32, hardware=cpu)
    lengths = [300, 280]
    encoding = encode_stage(encoder.footprint, lengths, 2, TYPICAL)
    small = with_vision(encoding, make_tower(folder, cpu).footprint, [4], 1, TYPICAL)
    large = with_vision(encoding, REAL, [744], 2, TYPICAL)
    assert small.peak_bytes == encoding.peak_bytes == text_encoder_peak_bytes(encoder.footprint, lengths, 2)
    assert large.peak_bytes == vision_peak_bytes(REAL, [744], 2)
    for plan in (small, large):
        assert plan.seconds is not None
        assert encoding.seconds is not None
        assert plan.seconds > encoding.seconds
        assert plan.ram_bytes >= encoding.ram_bytes


def test_patches_of_another_size_are_refused(folder: Path, cpu: Hardware, tmp_path: Path) -> None:
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    weights["visual.patch_embed.proj.weight"] = torch.zeros(32, 3, 2, 16, 16)
    config = json.loads((folder / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    save_file(weights, tmp_path / "m.safetensors", metadata={"config": json.dumps(config)})
    with pytest.raises(WrongModel, match=r"patch_size, spatial_merge_size of \(3, 2, 16, 2\), but Qwen2.5-VL has"):
        VisionTower(open_checkpoint(tmp_path / "m.safetensors"), dtype=torch.float32, hardware=cpu)


# patches


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rows=st.integers(2, 12), columns=st.integers(2, 12), seed=st.integers(0, 99))
def test_an_image_of_multiples_of_28_is_patched_as_by_the_processor(rows: int, columns: int, seed: int) -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    pixels = (random_image(28 * rows, 28 * columns, seed) * 255).round()
    wanted = Qwen2VLImageProcessor()(images=[Image.fromarray(pixels[0].byte().numpy())], return_tensors="pt")
    ours = patch_image(pixels / 255)
    assert wanted["image_grid_thw"].tolist() == [[1, ours.height, ours.width]]
    assert (ours.patches - wanted["pixel_values"]).abs().max() < 1e-6


@pytest.mark.usefixtures("comfy")
@settings(max_examples=40, deadline=None, derandomize=True)
@given(height=st.integers(1, 600), width=st.integers(3, 600), seed=st.integers(0, 99))
def test_an_image_of_any_size_is_patched_as_by_comfyui(height: int, width: int, seed: int) -> None:
    from comfy.text_encoders.qwen_vl import process_qwen2vl_images

    pixels = random_image(height, width, seed)
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(InvalidRequest, match=f"{width}x{height} px is too long and narrow"):
            patch_image(pixels)
        return
    wanted, grid = process_qwen2vl_images(pixels)
    ours = patch_image(pixels)
    assert grid.tolist() == [[1, ours.height, ours.width]]
    assert (ours.patches - wanted).abs().max() < 1e-5


def test_equal_images_have_equal_digests_and_others_do_not() -> None:
    pixels = random_image(56, 84)
    changed = pixels.clone()
    changed[0, 55, 83, 2] += 1 / 255
    assert patch_image(pixels).digest == patch_image(pixels.clone()).digest
    assert len({patch_image(p).digest for p in (pixels, changed, pixels.transpose(1, 2))}) == 3


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 32, 48, 4), r"\(48x32 px\) has 4 channels, with transparency \(RGBA\); red, green and blue are needed"),
        ((1, 32, 48, 1), r"has 1 channel, greyscale"),
        ((3, 32, 48, 3), r"is a batch of 3 images; one is needed"),
        ((32, 48, 3), r"has the shape \[32, 48, 3\]"),
    ],
)
def test_what_is_no_rgb_image_is_named(shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        patch_image(torch.zeros(shape))


# prompts that show images


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    texts=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    grids=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=4, max_size=4),
)
def test_positions_are_the_models_own(
    texts: list[int], grids: list[tuple[int, int]], reference: Callable[[torch.dtype], Any]
) -> None:
    shown = [SimpleNamespace(height=height, width=width) for height, width in grids[: len(texts) - 1]]
    model = reference(torch.float32).model
    start, pad = model.config.vision_start_token_id, model.config.image_token_id
    tokens, ids, kinds = [7] * texts[0], [7] * texts[0], [0] * texts[0]
    for text, image in zip(texts[1:], shown, strict=True):
        size = image.height * image.width
        tokens += [IMAGE] + [7] * text
        ids[-1] = start
        ids += [pad] * size + [7] * text
        kinds += [1] * size + [0] * text
    grid = torch.tensor([(1, 2 * image.height, 2 * image.width) for image in shown])
    wanted, _ = model.get_rope_index(torch.tensor([ids]), image_grid_thw=grid, **kinds_of(kinds))
    assert torch.equal(token_positions(tokens, shown), wanted[:, 0])


def hf_states(model: Any, tokenizer: Any, tokens: list[int], shown: list[PatchedImage], *, kinds: bool) -> torch.Tensor:
    """What transformers' whole model makes of a prompt; `kinds`: it is told which tokens are images."""
    pad, ids, left = tokenizer.convert_tokens_to_ids("<|image_pad|>"), [], list(shown)
    for token in tokens:
        ids += [pad] * left.pop(0).tokens if token == IMAGE else [token]
    kind = kinds_of([int(token == pad) for token in ids]) if kinds else {}
    patches = torch.cat([image.patches for image in shown])
    with torch.no_grad():
        states = model.model(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            pixel_values=patches,
            image_grid_thw=grid_of(shown),
            **kind,
        )
    return states.last_hidden_state


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("labelled", [True, False], ids=["Edit-2509", "Edit"])
def test_prompts_with_images_are_encoded_as_by_the_whole_model(
    count: int, labelled: bool, folder: Path, hardware: Hardware, tokenizer: Any, reference: Callable[..., Any]
) -> None:
    prompts = PromptTokenizer(folder / "tokenizer")
    encoder = TextEncoder(open_checkpoint(folder / "text_encoder"), dtype=torch.float32, hardware=hardware)
    shown = images(*SIZES[:count])
    seen = encoder.vision_tower().see(shown)
    texts = [with_places(text, count, labelled=labelled) for text in ("make it red", " ")]
    ids = [prompts.encode(text, template=EDIT_TEMPLATE, images=count) for text in texts]
    encoded = encoder.encode([*ids, prompts.encode("a cat")], images=[seen, seen, []])
    for tokens, states in zip(ids, encoded, strict=False):
        assert prompts.start(tokens) == 64
        wanted = hf_states(reference(torch.float32), tokenizer, tokens, shown, kinds=True)
        assert states.shape == wanted.shape
        assert (states - wanted).abs().max() < 1e-5
        if TOLD_KINDS:
            wrong = hf_states(reference(torch.float32), tokenizer, tokens, shown, kinds=False)
            assert (wrong - wanted).norm() / wanted.norm() > 0.05  # positions as of text are another result
    assert torch.equal(encoded[2], encoder.encode([prompts.encode("a cat")])[0])


def test_bf16_prompts_with_images_are_the_whole_models_but_for_rounding(
    folder: Path, cpu: Hardware, tokenizer: Any, reference: Callable[..., Any]
) -> None:
    prompts = PromptTokenizer(folder / "tokenizer")
    encoder = TextEncoder(open_checkpoint(folder / "text_encoder"), dtype=torch.bfloat16, hardware=cpu)
    shown = images(*SIZES)
    ids = prompts.encode(with_places("make it red", 3, labelled=True), template=EDIT_TEMPLATE, images=3)
    (states,) = encoder.encode([ids], images=[encoder.vision_tower().see(shown)])
    wanted = hf_states(reference(torch.bfloat16), tokenizer, ids, shown, kinds=True).float()
    exact = hf_states(reference(torch.float32), tokenizer, ids, shown, kinds=True)
    assert (states - exact).norm() < 1.1 * (wanted - exact).norm()


@pytest.mark.parametrize(("places", "given"), [(1, 2), (2, 1), (0, 1), (1, 0)])
def test_other_images_than_a_prompt_shows_are_refused(places: int, given: int, folder: Path, cpu: Hardware) -> None:
    encoder = TextEncoder(open_checkpoint(folder / "text_encoder"), dtype=torch.float32, hardware=cpu)
    seen = encoder.vision_tower().see(images(*SIZES[:given])) if given else []
    with pytest.raises(InvalidRequest, match=rf"comes with {given} images?, but has {places} places?"):
        encoder.encode([[7, *[IMAGE] * places, 8]], images=[seen])


def test_a_prompt_without_room_for_its_images_is_refused(folder: Path) -> None:
    prompts = PromptTokenizer(folder / "tokenizer")
    with pytest.raises(InvalidRequest, match="comes with 2 images, but has 1 place for them"):
        prompts.encode(with_places("a", 1, labelled=True), images=2)


def test_a_place_that_is_given_no_image_is_a_token_like_others(folder: Path, tokenizer: Any) -> None:
    prompts = PromptTokenizer(folder / "tokenizer")
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    ids = prompts.encode(with_places("a", 3, labelled=True), template=EDIT_TEMPLATE, images=2)
    marked = [token for token in ids if token in (IMAGE, pad)]
    assert marked == [IMAGE, IMAGE, pad]


@pytest.mark.parametrize("text", ["", "\nmake it red", "user", "\n\n"])
def test_the_editing_template_is_cut_where_the_reference_cuts_it(text: str, folder: Path) -> None:
    prompts = PromptTokenizer(folder / "tokenizer")
    assert prompts.start(prompts.encode(text, template=EDIT_TEMPLATE)) == 64
