"""Images in prompts: ComfyUI's own editing nodes give the same with our CLIP and VAE as with ComfyUI's."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import write_gguf_text_encoder, write_gguf_vision
from qwenimage_lowvram.engine.caches.prompt_cache import PromptCache
from qwenimage_lowvram.engine.errors import DamagedFile, DoesNotFit, InvalidRequest, MissingFile, Unsupported
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen25_vl.text_encoder import TextEncoder
from qwenimage_lowvram.engine.models.qwen_image.prompt_template import EDIT_TEMPLATE
from qwenimage_lowvram.engine.models.qwen_image.prompts import PromptTokenizer, with_places
from qwenimage_lowvram.engine.models.qwen_vl.vision_files import mmproj_identity
from safetensors.torch import load_file

from .native_encoder import as_clip, native_encoder

SIZES = [(100, 70), (64, 64), (48, 120)]  # (width, height)


@pytest.fixture(scope="module")
def native(full_pipeline: Path, comfy: Any) -> Iterator[Any]:
    with native_encoder(full_pipeline) as encoder:
        yield as_clip(*encoder)


@pytest.fixture
def make_clip(full_pipeline: Path, comfy: Any) -> Callable[..., Any]:
    from qwenimage_lowvram.nodes.adapters.clip import LowVRAMCLIP

    def make(folder: Path = full_pipeline, **options: Any) -> Any:
        hardware = Hardware.detect(torch.device("cpu"))
        encoder = TextEncoder(open_checkpoint(folder / "text_encoder"), dtype=torch.float32, hardware=hardware)
        return LowVRAMCLIP(encoder, PromptTokenizer(full_pipeline / "tokenizer"), None, **options)

    return make


@pytest.fixture
def ours(make_clip: Callable[..., Any]) -> Any:
    return make_clip()


@pytest.fixture
def vae(full_pipeline: Path) -> Any:
    from qwenimage_lowvram.nodes.adapters.vae import make_vae

    return make_vae(open_checkpoint(full_pipeline / "vae"), dtype=torch.float32, limit_bytes=None)


def made_image(width: int, height: int, seed: int = 0, channels: int = 3) -> torch.Tensor:
    return torch.rand(1, height, width, channels, generator=torch.Generator().manual_seed(seed))


def plus(clip: Any, prompt: str, vae: Any, *given: torch.Tensor) -> Any:
    """What ComfyUI's TextEncodeQwenImageEditPlus makes."""
    from comfy_extras.nodes_qwen import TextEncodeQwenImageEditPlus

    images = {f"image{i + 1}": image for i, image in enumerate(given)}
    return TextEncodeQwenImageEditPlus.execute(clip, prompt, vae, **images).result[0]


def edit(clip: Any, prompt: str, vae: Any, image: torch.Tensor | None) -> Any:
    """What ComfyUI's TextEncodeQwenImageEdit makes."""
    from comfy_extras.nodes_qwen import TextEncodeQwenImageEdit

    return TextEncodeQwenImageEdit.execute(clip, prompt, vae, image).result[0]


def assert_same(ours: Any, theirs: Any) -> None:
    assert ours[0][0].shape == theirs[0][0].shape
    assert (ours[0][0] - theirs[0][0]).abs().max() < 1e-5
    assert "attention_mask" not in theirs[0][1]


@pytest.mark.parametrize("count", [0, 1, 2, 3])
@pytest.mark.parametrize("prompt", ["make it red", "", "把背景换成蓝色"])
def test_the_plus_node_gives_the_same_with_our_clip(prompt: str, count: int, ours: Any, native: Any) -> None:
    images = [made_image(*size, seed=i) for i, size in enumerate(SIZES[:count])]
    assert_same(plus(ours, prompt, None, *images), plus(native, prompt, None, *images))


@pytest.mark.parametrize("shown", [True, False])
def test_the_first_editing_node_gives_the_same_with_our_clip(shown: bool, ours: Any, native: Any) -> None:
    image = made_image(100, 70) if shown else None
    assert_same(edit(ours, "make it red", None, image), edit(native, "make it red", None, image))


@pytest.mark.parametrize("node", [plus, edit], ids=["plus", "first"])
def test_the_nodes_reference_latents_are_those_of_our_vae(node: Callable[..., Any], ours: Any, vae: Any) -> None:
    (_, options), *_ = node(ours, "make it red", vae, made_image(16, 24))
    # the nodes scale to a million pixels: 840x1256, or 836x1254, whose borders the VAE crops
    size = (157, 105) if node is plus else (156, 104)
    assert [latent.shape for latent in options["reference_latents"]] == [(1, 16, 1, *size)]


def test_a_template_of_ones_own_shows_its_images(ours: Any, native: Any) -> None:
    place = "<|vision_start|><|image_pad|><|vision_end|>"
    text = f"<|im_start|>system\nShort.<|im_end|>\n<|im_start|>user\n{place} beside {place} a sign<|im_end|>\n"
    images = [made_image(112, 84, 1), made_image(56, 56, 2)]
    results = [clip.encode_from_tokens_scheduled(clip.tokenize(text, images=images)) for clip in (ours, native)]
    assert_same(*results)


def test_the_system_part_is_dropped_with_its_images(ours: Any) -> None:
    place = "<|vision_start|><|image_pad|><|vision_end|>"
    text = f"<|im_start|>system\n{place}<|im_end|>\n<|im_start|>user\na sign<|im_end|>\n"
    tokens = ours.tokenize(text, images=[made_image(112, 84)])
    kept = ours.tokenize("<|im_start|>user\na sign<|im_end|>\n")["qwen25_7b"][0]
    assert ours.encode_from_tokens(tokens).shape[1] == len(kept) - 3


def test_both_prompts_and_all_images_are_one_visit(ours: Any) -> None:
    encoder = ours.encoder
    images = [made_image(*size, seed=i) for i, size in enumerate(SIZES)]
    prompts = [with_places(text, 3, labelled=True) for text in ("make it red", "blurry")]
    before, towers = encoder.fetched_bytes, []
    make = encoder.vision_tower
    encoder.vision_tower = lambda: towers.append(make()) or towers[-1]
    conds = ours.encode_prompts(prompts, template=EDIT_TEMPLATE, images=images)
    files = open_checkpoint(encoder._checkpoint.path).tensors
    assert encoder.fetched_bytes - before == sum(e.nbytes for n, e in files.items() if n.startswith("model.layers."))
    blocks = sum(entry.nbytes for name, entry in files.items() if name.startswith("visual.blocks."))
    assert [tower.fetched_bytes for tower in towers] == [blocks]
    for cond, prompt in zip(conds, prompts, strict=True):
        alone = ours.encode_prompts([prompt], template=EDIT_TEMPLATE, images=images)[0]
        assert torch.equal(cond[0][0], alone[0][0])


def test_the_stage_counts_what_the_vision_tower_reads(ours: Any) -> None:
    ours.encode_prompts([with_places("a", 1, labelled=True)], template=EDIT_TEMPLATE, images=[made_image(112, 84)])
    (report,) = ours.timeline.reports
    files = ours.encoder._checkpoint.tensors
    read = [e.nbytes for n, e in files.items() if n.startswith(("model.layers.", "visual.blocks."))]
    assert report.moved.file_bytes == sum(read)
    assert report.plan.weights_bytes + report.plan.passing_bytes > 0


def test_a_limit_that_images_do_not_fit_in_is_refused_before_reading(ours: Any) -> None:
    clip = ours.clone()
    large = made_image(1400, 1400)
    fits = ours.encode_prompts(
        [with_places("a", 1, labelled=True)], template=EDIT_TEMPLATE, images=[made_image(28, 112)]
    )
    assert fits
    before = clip.encoder.fetched_bytes
    clip.limit_bytes = 30_000_000
    with pytest.raises(DoesNotFit, match=r"Looking at 1 image \(2500 tokens\) needs"):
        clip.encode_prompts([with_places("a", 1, labelled=True)], template=EDIT_TEMPLATE, images=[large])
    assert clip.encoder.fetched_bytes == before


# kept prompts


def test_a_kept_prompt_with_images_needs_neither_encoder_nor_tower(
    make_clip: Callable[..., Any], tmp_path: Path, full_pipeline: Path
) -> None:
    cache = PromptCache(tmp_path / "prompts")
    images = [made_image(112, 84, 1), made_image(56, 56, 2)]
    prompts = [with_places(text, 2, labelled=True) for text in ("make it red", "")]
    made = make_clip(kept=cache).encode_prompts(prompts, template=EDIT_TEMPLATE, images=images)
    again = make_clip(kept=cache)
    kept = again.encode_prompts(prompts, template=EDIT_TEMPLATE, images=images)
    assert again.encoder.fetched_bytes == 0
    for one, other in zip(made, kept, strict=True):
        assert torch.equal(one[0][0], other[0][0])
    # other images, another order, and no images are other prompts
    for others in ([images[1], images[0]], [images[0], made_image(56, 56, 3)]):
        fresh = make_clip().encode_prompts(prompts, template=EDIT_TEMPLATE, images=others)
        mixed = make_clip(kept=cache).encode_prompts(prompts, template=EDIT_TEMPLATE, images=others)
        assert torch.equal(fresh[0][0][0], mixed[0][0][0])
        assert not torch.equal(made[0][0][0], mixed[0][0][0])
    assert len(cache.entries()) == 6


def test_a_prompt_half_kept_is_encoded_with_its_images(make_clip: Callable[..., Any], tmp_path: Path) -> None:
    cache = PromptCache(tmp_path / "prompts")
    images = [made_image(112, 84)]
    texts = [with_places(text, 1, labelled=True) for text in ("one", "two")]
    first = make_clip(kept=cache).encode_prompts(texts[:1], template=EDIT_TEMPLATE, images=images)
    both = make_clip(kept=cache).encode_prompts(texts, template=EDIT_TEMPLATE, images=images)
    fresh = make_clip().encode_prompts(texts, template=EDIT_TEMPLATE, images=images)
    assert torch.equal(first[0][0][0], both[0][0][0])
    assert all(torch.equal(one[0][0], other[0][0]) for one, other in zip(both, fresh, strict=True))


# bad input


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (made_image(64, 48, channels=4), r"has 4 channels, with transparency \(RGBA\)"),
        (made_image(64, 48, channels=1), "has 1 channel, greyscale"),
        (made_image(64, 48).repeat(3, 1, 1, 1), "is a batch of 3 images"),
    ],
)
def test_what_is_no_rgb_image_is_named_by_our_clip(image: torch.Tensor, words: str, ours: Any) -> None:
    with pytest.raises(InvalidRequest, match=words):
        ours.encode_from_tokens(ours.tokenize("make it red", images=[image]))


def test_more_images_than_the_template_shows_are_refused(ours: Any) -> None:
    with pytest.raises(InvalidRequest, match="2 images, but has 1 place"):
        ours.tokenize("make it red", images=[made_image(64, 48)] * 2)


def test_embeddings_in_a_prompt_are_named(ours: Any) -> None:
    with pytest.raises(Unsupported, match="An embedding in a prompt"):
        ours.encode_from_tokens({"qwen25_7b": [[(5, 1.0), (torch.zeros(1, 64), 1.0)]]})


def test_an_encoder_without_a_tower_still_encodes_text_and_says_what_it_lacks(
    full_pipeline: Path, tmp_path: Path
) -> None:
    from qwenimage_lowvram.nodes.adapters.clip import LowVRAMCLIP

    source = full_pipeline / "text_encoder"
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    weights = load_file(next(source.glob("*.safetensors")))
    write_gguf_text_encoder(tmp_path / "encoder-Q8_0.gguf", weights, config, "Q8_0")
    checkpoint = open_checkpoint(tmp_path / "encoder-Q8_0.gguf")
    encoder = TextEncoder(checkpoint, dtype=torch.float32, hardware=Hardware.detect(torch.device("cpu")))
    clip = LowVRAMCLIP(encoder, PromptTokenizer(full_pipeline / "tokenizer"), None)
    assert mmproj_identity(checkpoint) == ""
    assert clip.encode_prompts(["a cat"])
    show = {"template": EDIT_TEMPLATE, "images": [made_image(64, 48)]}
    with pytest.raises(MissingFile, match="Put the mmproj file of the same model"):
        clip.encode_prompts([with_places("a", 1, labelled=True)], **show)
    write_gguf_vision(tmp_path / "encoder-mmproj-F32.gguf", weights, config, "F32")
    assert clip.encode_prompts([with_places("a", 1, labelled=True)], **show)
    assert mmproj_identity(checkpoint) != ""


def test_a_vision_part_that_is_replaced_while_prompts_are_encoded_keeps_nothing(
    full_pipeline: Path, comfy: Any, tmp_path: Path
) -> None:
    """Between looking for what is kept and seeing the image: its embeddings would stand under the old file's name."""
    from qwenimage_lowvram.nodes.adapters.clip import LowVRAMCLIP

    source = full_pipeline / "text_encoder"
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    weights = load_file(next(source.glob("*.safetensors")))
    write_gguf_text_encoder(tmp_path / "encoder-Q8_0.gguf", weights, config, "Q8_0")
    mmproj = tmp_path / "encoder-mmproj.gguf"

    def write_vision(times: float) -> None:
        changed = {name: w * times if name.startswith("visual.blocks.0") else w for name, w in weights.items()}
        write_gguf_vision(mmproj, changed, config, "F32")

    class Replacing(PromptCache):
        def get(self, key: Any) -> Any:
            write_vision(2.0)
            return super().get(key)

    write_vision(1.0)
    kept = Replacing(tmp_path / "kept")
    encoder = TextEncoder(
        open_checkpoint(tmp_path / "encoder-Q8_0.gguf"),
        dtype=torch.float32,
        hardware=Hardware.detect(torch.device("cpu")),
    )
    clip = LowVRAMCLIP(encoder, PromptTokenizer(full_pipeline / "tokenizer"), None, kept=kept)
    show = {"template": EDIT_TEMPLATE, "images": [made_image(64, 48)]}
    with pytest.raises(DamagedFile, match="vision part beside the text encoder was changed"):
        clip.encode_prompts([with_places("a", 1, labelled=True)], **show)
    assert kept.entries() == []
    assert clip.encode_prompts(["a"]), "text alone needs no vision part"
    assert len(kept.entries()) == 1
