"""Texts that nobody expects, in prompts, names and keys: refused in words or shown escaped, never raw anywhere."""

import asyncio
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.caches.prompt_cache import PromptCache
from qwenimage_lowvram.engine.errors import InvalidRequest, QwenLowVRAMError
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen25_vl.text_encoder import TextEncoder
from qwenimage_lowvram.engine.models.qwen_image.prompts import MAX_PROMPT_CHARACTERS, PromptTokenizer
from qwenimage_lowvram.engine.texts import printable, shown
from safetensors.torch import save_file
from small_checkpoint import write_split_files

HALF = "\ud83d"  # of an emoji, as a node leaves it that cuts a prompt
ESCAPE, BIDI = "\x1b[31m", "\u202e"
HOSTILE = f"a{HALF}b\r\nc\0d{ESCAPE}e{BIDI}f\u2028g<img src=x onerror=alert(1)>&amp;"


@pytest.fixture
def clip(small_pipeline: Path, tmp_path: Path, comfy: Any) -> Any:
    from qwenimage_lowvram.nodes.adapters.clip import LowVRAMCLIP

    hardware = Hardware.detect(torch.device("cpu"))
    encoder = TextEncoder(open_checkpoint(small_pipeline / "text_encoder"), dtype=torch.float32, hardware=hardware)
    tokenizer = PromptTokenizer(small_pipeline / "tokenizer")
    return LowVRAMCLIP(encoder, tokenizer, None, kept=PromptCache(tmp_path / "prompts"))


def is_harmless(text: str) -> bool:
    """Whether a log, a terminal and JSON take it as it is."""
    return all(c.isprintable() or c == "\n" for c in text) and bool(text.encode() and json.dumps(text))


def test_what_cannot_be_printed_is_shown_as_escapes() -> None:
    assert printable("白 <é>") == "白 <é>"
    assert printable(f"{HALF}\n\0\x1b") == r"\ud83d\n\x00\x1b"
    assert is_harmless(printable(HOSTILE))
    assert "\n" not in printable(HOSTILE)


ODD = [None, HOSTILE, "x" * 10**6, 10**5000, -(10**5000), 1e308, [HOSTILE], object(), b"\0"]


@pytest.mark.parametrize("value", ODD, ids=range(len(ODD)))
def test_a_value_is_shown_in_few_characters(value: Any) -> None:
    assert len(shown(value)) < 300
    assert is_harmless(shown(value))


@pytest.mark.parametrize("error", QwenLowVRAMError.__subclasses__(), ids=lambda error: error.__name__)
def test_an_errors_message_is_harmless(error: type[QwenLowVRAMError]) -> None:
    assert is_harmless(str(error("{text}", code="test.hostile", text=HOSTILE)))
    assert str(error("one\n\nWhat to do: two", code="test.lines")) == "one\n\nWhat to do: two"


@pytest.mark.parametrize("prompt", [f"a {HALF}", "\udfff", None, 5, b"a", ["a"]])
def test_a_prompt_that_is_no_whole_text_is_refused(clip: Any, prompt: Any) -> None:
    import nodes

    for encode in (lambda: clip.encode_prompts([prompt]), lambda: nodes.CLIPTextEncode().encode(clip, prompt)):
        with pytest.raises(InvalidRequest, match="prompt") as caught:
            encode()
        assert is_harmless(str(caught.value))
    assert clip.encoder.fetched_bytes == 0


@pytest.mark.parametrize(
    "prompt", ["\0", "a\r\nb", ESCAPE, BIDI, "<img src=x>", "{}", "{0} {x} %s", "\ufeff", "\U0010ffff"]
)
def test_any_whole_text_is_encoded_and_kept(clip: Any, prompt: str) -> None:
    first = clip.encode_prompts([prompt])[0][0][0]
    read = clip.encoder.fetched_bytes
    assert torch.equal(clip.encode_prompts([prompt])[0][0][0], first)
    assert clip.encoder.fetched_bytes == read


@pytest.mark.parametrize("template", ["{x}", "{} {}", "{", "{0.x}", "{:d}"])
def test_a_template_that_cannot_be_filled_is_refused(clip: Any, template: str) -> None:
    with pytest.raises(InvalidRequest, match="template"):
        clip.tokenize("a cat", llama_template=template)


@pytest.mark.parametrize("tokens", [None, {}, {"l": [[(1, 1.0)]]}, {"qwen25_7b": []}, [[(1, 1.0)]]])
def test_tokens_of_another_encoder_are_refused(clip: Any, tokens: Any) -> None:
    with pytest.raises(InvalidRequest, match="tokens"):
        clip.encode_from_tokens_scheduled(tokens)


@pytest.mark.parametrize(
    "prompt",
    ["a" * 10**6, " " * 10**6, "word " * 200_000, "白" * 10**6, "word " * 5000, "x " * MAX_PROMPT_CHARACTERS],
    ids=["a million letters", "a million blanks", "200,000 words", "a million signs", "5,000 words", "more"],
)
def test_a_prompt_of_more_tokens_than_positions_is_refused_before_anything_is_read(clip: Any, prompt: str) -> None:
    with pytest.raises(InvalidRequest, match="shorten it") as caught:
        clip.encode_prompts([prompt])
    assert len(str(caught.value)) < 300
    assert clip.encoder.fetched_bytes == 0


# the page and the log


KEY = "<img src=x onerror=alert(1)>\n\x1b[31m.lora_A.weight"


def test_keys_are_shown_as_they_are_and_change_no_log_and_no_page(
    model: Any, models: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwenimage_lowvram.nodes.adapters import progress
    from qwenimage_lowvram.nodes.lora import QwenLowVRAMLoadLora

    layer = "transformer_blocks.0.attn.to_q"
    tensors = {f"{layer}.lora_A.weight": torch.ones(2, 64), f"{layer}.lora_B.weight": torch.ones(64, 2)}
    save_file(tensors | {KEY: torch.ones(2, 2)}, tmp_path / "odd.safetensors")
    models("loras", str(tmp_path))
    sent: list[str] = []
    server = type(
        "Server", (), {"client_id": "x", "sockets": {}, "send_progress_text": lambda self, text, *_: sent.append(text)}
    )()
    monkeypatch.setattr(progress.PromptServer, "instance", server, raising=False)
    monkeypatch.setattr(progress, "executing_node_id", lambda: "7")
    with caplog.at_level(logging.INFO):
        text = QwenLowVRAMLoadLora().load(model, "odd.safetensors", 1.0)["result"][1]
    shown = "<img src=x onerror=alert(1)>\\n\\x1b[31m.lora_A.weight"
    assert f"Not used: {shown}" in text
    assert "\x1b" not in caplog.text
    assert "&lt;img src=x onerror=alert(1)&gt;\\n\\x1b[31m.lora_A.weight" in sent[0]
    assert "<" not in sent[0]


@pytest.fixture
def lora(transformer: Any, models: Callable[[str, Path], None], tmp_path: Path) -> Callable[[str, str], Any]:
    """`lora(file name, further key)` loads such a LoRA with our node."""
    from qwenimage_lowvram.nodes.adapters.model import make_model
    from qwenimage_lowvram.nodes.lora import QwenLowVRAMLoadLora

    models("loras", tmp_path)
    name = next(name for name, shape in transformer.weights.items() if len(shape) == 2)
    rows, columns = transformer.weights[name]
    layer = name.removesuffix(".weight")
    tensors = {f"{layer}.lora_up.weight": torch.ones(rows, 1), f"{layer}.lora_down.weight": torch.ones(1, columns)}

    def load(file: str, key: str = "other") -> Any:
        save_file(tensors | {key: torch.zeros(1)}, tmp_path / "made.safetensors")
        os.rename(tmp_path / "made.safetensors", tmp_path / file)
        return QwenLowVRAMLoadLora().load(make_model(transformer, None), file, 1.0)

    return load


@pytest.mark.parametrize("key", [f"<b>{ESCAPE}x", "a\r\nWARNING forged line", "\0\u2028", "k" * 250])
def test_a_loras_keys_are_harmless_in_log_and_report(
    lora: Callable[..., Any], key: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        text = lora("a.safetensors", key)["result"][1]
    assert is_harmless(text)
    assert is_harmless(caplog.text)
    assert "\nWARNING" not in text + caplog.text
    assert len(text) < 1000


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
@pytest.mark.parametrize(
    "name",
    [b"caf\xe9".decode(errors="surrogateescape"), "x" * 243, f"{ESCAPE}{BIDI}<b>", "a\nWARNING forged", "a\rb"],
    ids=["undecodable", "255 bytes", "escapes", "a line break", "a return"],
)
def test_a_lora_of_any_name_is_loaded_and_harmless(
    lora: Callable[..., Any], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        text = lora(f"{name}.safetensors")["result"][1]
    assert is_harmless(text)
    assert is_harmless(caplog.text)
    assert "\nWARNING" not in text + caplog.text


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
@pytest.mark.parametrize(
    "stem",
    [
        b"caf\xe9".decode(errors="surrogateescape"),
        "白" * 81,
        "<b>&",
        "x" * 243,
        "\U0001d538" * 60,
        f"a\nb{ESCAPE}",
    ],
    ids=["undecodable", "255 bytes in signs", "tags", "255 bytes", "letters of four bytes", "line break and escape"],
)
@pytest.mark.parametrize("weight_format", ["as stored", "int8"])
def test_models_of_any_name_are_loaded(
    stem: str,
    weight_format: str,
    full_pipeline: Path,
    models: Callable[[str, Path], None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import folder_paths
    from qwenimage_lowvram.nodes.loader import QwenLowVRAMLoader

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))  # what is quantized and kept goes with the test
    files = write_split_files(full_pipeline, tmp_path, dtype="bf16")
    name = f"{stem}.safetensors"
    made = {"diffusion_models": files.transformer, "text_encoders": files.text_encoder, "vae": files.vae}
    for folder, file in made.items():
        os.rename(tmp_path / folder / file, tmp_path / folder / name)
        models(folder, tmp_path / folder)
    with caplog.at_level(logging.INFO):
        assert asyncio.run(QwenLowVRAMLoader.VALIDATE_INPUTS(name)) is True
        assert is_harmless(QwenLowVRAMLoader.IS_CHANGED(name, name, name))
        _, clip, _ = QwenLowVRAMLoader().load(name, name, name, "fp32", weight_format, 0.0, "fp32")
        clip.encode_prompts(["a"])
    assert is_harmless(caplog.text)


@pytest.mark.parametrize("name", ["\0", "a\0 (folder)", HALF, "x" * 10**6, "../x", HOSTILE, "", 5, ["a"], {}, True])
def test_a_file_that_is_not_there_is_refused_in_few_words(comfy: Any, name: Any) -> None:
    from qwenimage_lowvram.nodes.loader import QwenLowVRAMLoader
    from qwenimage_lowvram.nodes.lora import QwenLowVRAMLoadLora
    from qwenimage_lowvram.nodes.memory_plan import QwenLowVRAMMemoryPlan

    for node in (QwenLowVRAMLoader, QwenLowVRAMMemoryPlan, QwenLowVRAMLoadLora):
        said = asyncio.run(node.VALIDATE_INPUTS(name))
        assert isinstance(said, str)
        assert len(said) < 2000
        assert is_harmless(said)
