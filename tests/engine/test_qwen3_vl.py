"""Qwen3-VL encodes prompts and sees images as transformers' own model does, layer by layer, and nothing of it stays."""

from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfy_files import quantized
from hypothesis import given, settings
from hypothesis import strategies as st
from live_bytes import LiveBytes
from qwenimage_lowvram.engine.caches.prompt_cache import PromptCache
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen3_vl.prompts import PromptTokenizer
from qwenimage_lowvram.engine.models.qwen3_vl.text_encoder import TextEncoder
from qwenimage_lowvram.engine.models.qwen3_vl.vision_patches import patch_image
from qwenimage_lowvram.engine.models.qwen3_vl.vision_tower import VisionTower
from qwenimage_lowvram.engine.models.qwen_vl.image_prompts import IMAGE, ImagePrompt, token_positions
from qwenimage_lowvram.engine.models.qwen_vl.images import PatchedImage
from qwenimage_lowvram.engine.models.qwen_vl.vision_pass import VisionPass
from qwenimage_lowvram.engine.planning.vision import plan_vision, vision_peak_bytes
from qwenimage_lowvram.engine.runs.encode import EncodeRun
from qwenimage_lowvram.engine.runs.limit import Limit
from qwenimage_lowvram.engine.runs.surroundings import Alone
from qwenimage_lowvram.engine.runs.timeline import Timeline
from safetensors.torch import load_file, save_file
from small_checkpoint import make_tokenizer
from small_qwen3_vl import (
    Size,
    make_qwen3_vl,
    write_comfyui_file,
    write_gguf_encoder,
    write_gguf_mmproj,
)
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLModel

SIZES = [(256, 512), (320, 256), (288, 320)]  # (height, width), multiples of 32
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
TEXTS = ["a cat on a chair", "", "白色背景上的红色圆形", "image " * 300]
# transformers 4 finds by itself which tokens are images; it places the learned positions by other arithmetic than
# transformers 5 (torch.linspace, and weights in the model's dtype), which differs in the last digit
FIVE = "mm_token_type_ids" in signature(Qwen3VLModel.get_rope_index).parameters


@pytest.fixture(scope="module")
def tokenizer(comfyui_path: Path) -> Any:
    return make_tokenizer(full=False, comfyui=comfyui_path)


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3_vl")
    make_qwen3_vl(tokenizer).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def prompts(folder: Path) -> PromptTokenizer:
    return PromptTokenizer(folder / "tokenizer")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Callable[[torch.dtype], Any]:
    made: dict[torch.dtype, Any] = {}

    def load(dtype: torch.dtype) -> Any:
        if dtype not in made:
            made[dtype] = Qwen3VLForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=dtype).eval()
        return made[dtype]

    return load


def make_encoder(file: Path, hardware: Hardware, dtype: torch.dtype = torch.float32) -> TextEncoder:
    return TextEncoder(open_checkpoint(file), dtype=dtype, hardware=hardware)


def make_tower(file: Path, hardware: Hardware, dtype: torch.dtype = torch.float32) -> VisionTower:
    return make_encoder(file, hardware, dtype).vision_tower()


def random_image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(seed))


def images(*sizes: tuple[int, int]) -> list[PatchedImage]:
    return [patch_image(random_image(*size, seed=i)) for i, size in enumerate(sizes)]


def grid_of(shown: Sequence[PatchedImage]) -> torch.Tensor:
    return torch.tensor([(1, image.height, image.width) for image in shown])


def states_of(model: Any, ids: list[int], shown: Sequence[PatchedImage], image_token: int) -> torch.Tensor:
    """What the last layer makes, before the final norm."""
    sized, sizes = [], iter(shown)
    for token in ids:
        sized += [image_token] * next(sizes).tokens if token == IMAGE else [token]
    kinds = [int(token == image_token) for token in sized]
    given: dict[str, Any] = {"input_ids": torch.tensor([sized])}
    if shown:
        given |= {"pixel_values": torch.cat([image.patches for image in shown]), "image_grid_thw": grid_of(shown)}
        given |= {"mm_token_type_ids": torch.tensor([kinds])} if FIVE else {}
    handle = model.model.language_model.norm.register_forward_hook(lambda module, args, output: args[0])
    try:
        with torch.no_grad():
            return model.model(**given).last_hidden_state.float()
    finally:
        handle.remove()


# the language model


@DTYPES
@pytest.mark.parametrize("slots", [1, 2])
def test_states_are_those_of_transformers_before_the_norm(
    slots: int,
    dtype: torch.dtype,
    folder: Path,
    prompts: PromptTokenizer,
    hardware: Hardware,
    reference: Callable[[torch.dtype], Any],
) -> None:
    ids = [prompts.encode(text) for text in TEXTS]
    encoded = make_encoder(folder / "text_encoder", hardware, dtype).encode(ids, slots=slots)
    for ours, one in zip(encoded, ids, strict=True):
        wanted = states_of(reference(dtype), one, [], 0)
        assert torch.equal(ours, wanted)
        assert wanted.std() > 0.1
        normed = reference(dtype).model.language_model.norm(wanted.to(dtype)).float()
        assert (normed - wanted).abs().max() > 0.1


@DTYPES
@pytest.mark.parametrize("count", [1, 3])
def test_prompts_that_show_images_are_those_of_transformers(
    count: int,
    dtype: torch.dtype,
    folder: Path,
    prompts: PromptTokenizer,
    cpu: Hardware,
    reference: Callable[[torch.dtype], Any],
    tokenizer: Any,
) -> None:
    shown = images(*SIZES[:count])
    ids = [prompts.encode(text, images=count) for text in ("make it red like <image1>", "")]
    encoder = make_encoder(folder / "text_encoder", cpu, dtype)
    seen = encoder.vision_tower().see(shown)
    encoded = encoder.encode(ids, images=[seen, seen])
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for ours, one in zip(encoded, ids, strict=True):
        wanted = states_of(reference(dtype), one, shown, pad)
        assert ours.shape == wanted.shape
        # several images are seen one after another here, all at once there: sums of matrices may be split otherwise
        assert (ours - wanted).abs().max() < (1e-5 if dtype is torch.float32 else 0.15)
        if count == 1 and FIVE:
            assert torch.equal(ours, wanted)


@settings(max_examples=60, deadline=None, derandomize=True)
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
    tokens, ids = [7] * texts[0], [7] * texts[0]
    for text, image in zip(texts[1:], shown, strict=True):
        tokens += [IMAGE] + [7] * text
        ids[-1] = start
        ids += [pad] * (image.height * image.width) + [7] * text
    grid = torch.tensor([(1, 2 * image.height, 2 * image.width) for image in shown])
    kinds = {"mm_token_type_ids": torch.tensor([[int(token == pad) for token in ids]])} if FIVE else {}
    wanted, _ = model.get_rope_index(torch.tensor([ids]), image_grid_thw=grid, **kinds)
    assert torch.equal(token_positions(tokens, shown), wanted[:, 0])


def test_all_prompts_read_each_layer_once_and_nothing_else_of_the_file(
    folder: Path, prompts: PromptTokenizer, hardware: Hardware
) -> None:
    checkpoint = open_checkpoint(folder / "text_encoder")
    encoder = TextEncoder(checkpoint, dtype=torch.bfloat16, hardware=hardware)
    layers = sum(entry.nbytes for name, entry in checkpoint.tensors.items() if ".layers." in name)
    visited: list[int] = []
    with LiveBytes("cpu") as live:
        states = encoder.encode([prompts.encode(text) for text in TEXTS], on_layer=visited.append)
        assert live.now == sum(state.nbytes for state in states)
    assert visited == list(range(Size().layers))
    assert encoder.fetched_bytes == layers


# the vision part


@DTYPES
@pytest.mark.parametrize("slots", [1, 2])
def test_an_image_is_seen_as_by_transformers(
    slots: int, dtype: torch.dtype, folder: Path, hardware: Hardware, reference: Callable[[torch.dtype], Any]
) -> None:
    shown = images(*SIZES)
    seen = make_tower(folder / "text_encoder", hardware, dtype).see(shown, slots=slots)
    for ours, image in zip(seen, shown, strict=True):
        with torch.no_grad():
            made = reference(dtype).model.visual(image.patches.to(dtype), grid_of([image]))
        wanted, deepstack = (made.pooler_output, made.deepstack_features) if FIVE else made
        assert (ours.height, ours.width) == (image.height // 2, image.width // 2)
        assert len(ours.deepstack) == len(deepstack) == len(Size().deepstack)
        for mine, theirs in zip((ours.embeds, *ours.deepstack), (wanted, *deepstack), strict=True):
            assert mine.dtype == theirs.dtype
            assert theirs.float().std() > 0.1
            if FIVE:
                assert torch.equal(mine, theirs)
            else:
                assert (mine - theirs).abs().max() < (1e-5 if dtype is torch.float32 else 0.1)


def test_what_an_image_is_seen_as_depends_on_it_alone(folder: Path, cpu: Hardware) -> None:
    shown = images(*SIZES)
    tower = make_tower(folder / "text_encoder", cpu, torch.bfloat16)
    visited: list[int] = []
    together = tower.see(shown, on_block=visited.append)
    assert visited == list(range(Size().vision_layers))
    for image, among in zip(shown, together, strict=True):
        (alone,) = tower.see([image])
        assert torch.equal(alone.embeds, among.embeds)
        assert all(torch.equal(a, b) for a, b in zip(alone.deepstack, among.deepstack, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ([(384, 384)], torch.float32),
        ([(384, 384), (384, 256), (256, 512)], torch.float32),
        ([(256, 256)], torch.bfloat16),
    ],
    ids=str,
)
def test_at_its_real_width_the_tower_takes_what_the_plan_says(
    sizes: list[tuple[int, int]], dtype: torch.dtype, tokenizer: Any, cpu: Hardware, tmp_path: Path
) -> None:
    wide = Size(
        vision_hidden=1152, vision_heads=16, vision_intermediate=4304, vision_layers=2, positions=48, deepstack=(0,)
    )
    make_qwen3_vl(tokenizer, wide).to(dtype).save_pretrained(tmp_path)
    tower, shown = make_tower(tmp_path, cpu, dtype), images(*sizes)
    patches = [image.height * image.width for image in shown]
    for slots in (1, 2):
        with torch.inference_mode(), LiveBytes("cpu") as live:
            seen = tower.see(shown, slots=slots)
            kept = live.now
        predicted = vision_peak_bytes(tower.footprint, patches, slots)
        assert len(seen) == len(sizes)
        assert 0.9 * predicted < live.peak - kept <= predicted
        assert plan_vision(tower.footprint, patches, predicted) >= slots


# files


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0"])
def test_a_gguf_encoder_with_its_mmproj_is_the_folders(
    kind: str, folder: Path, prompts: PromptTokenizer, cpu: Hardware, tmp_path: Path
) -> None:
    source = folder / "text_encoder"
    encoder = make_encoder(write_gguf_encoder(tmp_path / "Qwen3-VL-8B-Q8_0.gguf", source, kind), cpu)
    write_gguf_mmproj(tmp_path / "mmproj-Qwen3-VL-8B-F16.gguf", source, kind)
    shown, ids = images(*SIZES[:2]), [prompts.encode("a cat", images=2)]
    tower = encoder.vision_tower()
    assert tower.identity != encoder.identity
    ours, wanted = (
        made.encode(ids, images=[made.vision_tower().see(shown)])[0] for made in (encoder, make_encoder(source, cpu))
    )
    if kind == "F32":
        assert torch.equal(ours, wanted)
    else:
        assert 0 < (ours - wanted).norm() / wanted.norm() < 0.05


@pytest.mark.parametrize("prefix", ["model.language_model.", "model.", "text_encoders.qwen3vl_8b.transformer.model."])
@pytest.mark.parametrize("kind", ["bf16", "int8_convrot", "nvfp4"])
def test_a_single_file_is_read_in_every_format(
    kind: str, prefix: str, folder: Path, prompts: PromptTokenizer, cpu: Hardware, tmp_path: Path
) -> None:
    """ComfyUI's split files, which keep what is seen in bf16, and names as all-in-one files have them."""
    file = write_comfyui_file(tmp_path / "bf16.safetensors", folder / "text_encoder")
    config = (folder / "text_encoder" / "config.json").read_text(encoding="utf-8")
    root = prefix.removesuffix("language_model.")
    stored: dict[str, torch.Tensor] = {}
    for name, value in load_file(file).items():
        own = name.replace("model.language_model.", prefix).replace("model.visual.", f"{root}visual.")
        if kind != "bf16" and ".layers." in name and value.ndim == 2:
            layer = own.removesuffix(".weight")
            stored |= {f"{layer}.{part}": tensor for part, tensor in quantized(value.float(), kind=kind).items()}
        else:
            stored[own] = value
    save_file(stored, tmp_path / "m.safetensors", metadata={"config": config})
    shown, ids = images(SIZES[0]), [prompts.encode("a cat", images=1)]
    ours, wanted = (
        made.encode(ids, images=[made.vision_tower().see(shown)])[0]
        for made in (make_encoder(tmp_path / "m.safetensors", cpu), make_encoder(file, cpu))
    )
    error = (ours - wanted).norm() / wanted.norm()
    assert error == 0 if kind == "bf16" else 0 < error < 0.3


# EncodeRun


def test_a_run_encodes_kept_prompts_and_images_once(
    folder: Path, prompts: PromptTokenizer, cpu: Hardware, tmp_path: Path
) -> None:
    encoder = make_encoder(folder / "text_encoder", cpu)
    kept = PromptCache(tmp_path / "kept")
    run = EncodeRun(encoder, prompts, Timeline(lambda: 0), Alone(None, ()), Limit(None, "limit"), kept)
    shown = tuple(images(*SIZES[:2]))
    asked = [ImagePrompt(tuple(prompts.encode(text, images=2)), shown) for text in ("make it red", "")]
    first = run.encode(asked)
    read = encoder.fetched_bytes
    assert all(torch.equal(a, b) for a, b in zip(run.encode(asked), first, strict=True))
    assert encoder.fetched_bytes == read > 0
    other = [ImagePrompt(asked[0].tokens, (shown[0], *images(SIZES[2])))]
    assert not torch.equal(run.encode(other)[0][:, -1], first[0][:, -1])
    assert encoder.fetched_bytes > read


def test_a_run_gives_what_is_behind_the_system_turn(folder: Path, prompts: PromptTokenizer, cpu: Hardware) -> None:
    encoder = make_encoder(folder / "text_encoder", cpu)
    run = EncodeRun(encoder, prompts, Timeline(lambda: 0), Alone(None, ()), Limit(None, "limit"))
    shown = tuple(images(*SIZES[:2]))
    asked = ImagePrompt(tuple(prompts.encode("make it red", images=2)), shown)
    (states,) = run.encode([asked])
    start = prompts.start(asked.tokens)
    assert states.shape[1] == asked.length - start
    spans = [(begin - start, end - start) for begin, end in asked.image_spans]
    assert [end - begin for begin, end in spans] == [image.tokens for image in shown]
    whole = encoder.encode([list(asked.tokens)], images=[encoder.vision_tower().see(shown)])[0]
    assert torch.equal(states, whole[:, start:])
    for begin, _ in spans:  # in front of each stands <|vision_start|>
        before = asked.tokens[: asked.tokens.index(IMAGE)]
        assert begin >= len(before) - start


def test_looking_is_planned_for_the_set_of_images_that_takes_most(
    folder: Path, prompts: PromptTokenizer, cpu: Hardware
) -> None:
    """One large image takes more than small ones of more patches together, which pass one after another."""
    encoder = make_encoder(folder / "text_encoder", cpu)
    sets = [images((512, 512)), images(*[(256, 256)] * 5)]
    asked = [ImagePrompt(tuple(prompts.encode("", images=len(shown))), tuple(shown)) for shown in sets]
    footprint = encoder.vision_tower().footprint
    peaks = [vision_peak_bytes(footprint, [image.height * image.width for image in shown], 2) for shown in sets]
    assert peaks[0] > peaks[1]
    assert VisionPass(encoder, asked).wanted_bytes == peaks[0]
