"""Our CLIP beside ComfyUI's own Qwen-Image text encoder on the same weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.errors import DoesNotFit, Unsupported
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen25_vl.text_encoder import TextEncoder
from qwenimage_lowvram.engine.models.qwen_image.prompts import PromptTokenizer

from .native_encoder import native_encoder

PROMPTS = {
    "English": "a sign that says hello",
    "Chinese": "白色背景上的红色圆形",
    "brackets": "(a cat:1.2) [dog] {not|random} <lora:x:1>",
    "escaped brackets": r"a cat \(sitting\) \\(and\\) (a dog:1.2)",
    "700 words": "word " * 700,
    "empty": "",
    "a template of its own": "<|im_start|>system\nShort.<|im_end|>\n<|im_start|>user\na sign<|im_end|>\n",
    "a long system part": f"<|im_start|>system\n{'Long. ' * 30}<|im_end|>\n<|im_start|>user\na sign<|im_end|>\n",
    "one turn only": "<|im_start|>user\nhi<|im_end|>\n",
}


@pytest.fixture(scope="module")
def ours(full_pipeline: Path, comfy: Any) -> Any:
    from qwenimage_lowvram.nodes.adapters.clip import LowVRAMCLIP

    hardware = Hardware.detect(torch.device("cpu"))
    encoder = TextEncoder(open_checkpoint(full_pipeline / "text_encoder"), dtype=torch.float32, hardware=hardware)
    return LowVRAMCLIP(encoder, PromptTokenizer(full_pipeline / "tokenizer"), None)


@pytest.fixture(scope="module")
def native(full_pipeline: Path, comfy: Any) -> Iterator[Any]:
    """ComfyUI's own text encoder class at the small size, and its tokenizer."""
    with native_encoder(full_pipeline) as encoder:
        yield encoder


@pytest.mark.parametrize("name", PROMPTS)
def test_embeddings_equal_those_of_comfyui(name: str, ours: Any, native: Any) -> None:
    model, tokenizer = native
    theirs = tokenizer.tokenize_with_weights(PROMPTS[name])
    tokens = ours.tokenize(PROMPTS[name])
    assert [pair[0] for pair in tokens["qwen25_7b"][0]] == [pair[0] for pair in theirs["qwen25_7b"][0]]
    expected = model.encode_token_weights(theirs)[0]
    cond = ours.encode_from_tokens_scheduled(tokens)[0][0]
    assert cond.shape == expected.shape
    assert (cond - expected).abs().max() < 1e-5


def test_both_prompts_are_encoded_in_one_visit(ours: Any) -> None:
    before = ours.encoder.fetched_bytes
    ours.encode_prompts(["one"])
    single = ours.encoder.fetched_bytes - before
    both = ours.encode_prompts(["one", "another one"])
    assert ours.encoder.fetched_bytes - before == 2 * single
    alone = ours.encode_from_tokens_scheduled(ours.tokenize("another one"))
    assert torch.equal(both[1][0][0], alone[0][0])


def test_hooks_set_on_the_encoder_reach_the_conditioning(ours: Any) -> None:
    import comfy.hooks

    hooked = ours.clone()
    hooked.apply_hooks_to_conds = comfy.hooks.create_hook_lora({}, 1.0, 1.0)
    assert hooked.clone().encode_prompts(["a"])[0][0][1]["hooks"] is hooked.apply_hooks_to_conds
    hooked.use_clip_schedule = True
    hooked.patcher.forced_hooks = hooked.apply_hooks_to_conds
    with pytest.raises(Unsupported, match="schedule_clip"):
        hooked.encode_from_tokens_scheduled(hooked.tokenize("a"))


def test_a_limit_that_the_encoder_does_not_fit_in_is_refused_before_reading(ours: Any) -> None:
    clone = ours.clone()
    clone.limit_bytes = 1000
    before = clone.encoder.fetched_bytes
    with pytest.raises(DoesNotFit, match=r"Encoding prompts of .* tokens needs"):
        clone.encode_prompts(["a"])
    assert clone.encoder.fetched_bytes == before


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda clip: clip.clip_layer(-2), "CLIPSetLastLayer"),
        (lambda clip: clip.get_sd(), "CLIPSave"),
        (lambda clip: clip.get_key_patches(), "CLIPMerge"),
        (lambda clip: clip.generate({}), "Generating text"),
        (lambda clip: clip.tokenize("a cat, embedding:style.pt"), "An embedding in a prompt"),
        (lambda clip: clip.encode_prompts(["a cat", "embedding:bad_hands"]), "An embedding in a prompt"),
    ],
)
def test_what_is_not_supported_is_named(ours: Any, ask: Any, words: str) -> None:
    with pytest.raises(Unsupported, match=words):
        ask(ours)
