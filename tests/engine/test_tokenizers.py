"""Prompts become the same token ids in every transformers, from either kind of tokenizer folder."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qwenimage_lowvram.engine.errors import DamagedFile, MissingFile, WrongModel
from qwenimage_lowvram.engine.models.qwen_image.prompt_template import (
    EDIT_TEMPLATE,
    PROMPT_TEMPLATE,
    PROMPT_TEMPLATE_TOKENS,
)
from qwenimage_lowvram.engine.models.qwen_image.prompts import PromptTokenizer
from qwenimage_lowvram.engine.models.qwen_vl.tokenizer_files import read_tokenizer
from small_checkpoint import TOKENIZER_IN_COMFYUI
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

# Qwen2's own pattern (tokenizer.json of Qwen/Qwen2.5-VL-7B-Instruct)
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = {
    "a cat": [64, 8251],
    'A sign: "Grüße, 2024!"': None,
    "  two  spaces\n\n\nand lines\t": None,
    "把圆形变成红色 🐈‍⬛": None,
    "it's WE'LL don't": None,
    "<|vision_start|><|image_pad|><|vision_end|>Picture 1: e\u0301": None,
    "": [],
}


@pytest.fixture(scope="module")
def words_and_merges(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of vocab.json, merges.txt and settings, as ComfyUI ships it."""
    return comfyui_path / TOKENIZER_IN_COMFYUI


@pytest.fixture(scope="module")
def plain(words_and_merges: Path) -> Tokenizer:
    """The same tokenizer without transformers."""
    made = Tokenizer(models.BPE.from_file(str(words_and_merges / "vocab.json"), str(words_and_merges / "merges.txt")))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    settings = json.loads((words_and_merges / "tokenizer_config.json").read_text(encoding="utf-8"))
    for _, entry in sorted(settings["added_tokens_decoder"].items(), key=lambda item: int(item[0])):
        made.add_tokens([AddedToken(entry["content"], special=entry["special"], normalized=False)])
    return made


@pytest.fixture(scope="module", params=["vocab.json and merges.txt", "tokenizer.json", "tokenizer.json and settings"])
def tokenizer(
    request: pytest.FixtureRequest, words_and_merges: Path, plain: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> PromptTokenizer:
    if request.param == "vocab.json and merges.txt":
        return PromptTokenizer(words_and_merges)
    folder = tmp_path_factory.mktemp("tokenizer")
    plain.save(str(folder / "tokenizer.json"))
    if request.param.endswith("settings"):
        shutil.copy(words_and_merges / "tokenizer_config.json", folder)
    return PromptTokenizer(folder)


@pytest.mark.parametrize("template", [PROMPT_TEMPLATE, EDIT_TEMPLATE], ids=["text", "edit"])
@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_the_tokenizers_own(text: str, template: str, tokenizer: PromptTokenizer, plain: Tokenizer) -> None:
    ids = tokenizer.encode(text, template=template)
    assert ids == plain.encode(template.format(text)).ids
    start = tokenizer.start(ids)
    assert start == (34 if template == PROMPT_TEMPLATE else 64)
    known = TEXTS[text]
    if known is not None and template == PROMPT_TEMPLATE:
        assert ids[start : start + len(known)] == known


@pytest.mark.parametrize("name", ["miniature", "miniature-edit"])
def test_a_folder_that_transformers_5_wrote_is_read(name: str) -> None:
    folder = Path(__file__).parents[2] / name / "tokenizer"
    tokenizer = PromptTokenizer(folder)
    text = "a red circle"
    template = EDIT_TEMPLATE if name.endswith("edit") else PROMPT_TEMPLATE
    assert (
        tokenizer.encode(text, template=template)
        == Tokenizer.from_file(str(folder / "tokenizer.json")).encode(template.format(text)).ids
    )


def damaged(folder: Path, to: Path, name: str, content: bytes | None) -> Path:
    """A copy of a tokenizer's folder with one file changed; None: a folder in its place."""
    shutil.copytree(folder, to)
    (to / name).unlink(missing_ok=True)
    if content is None:
        (to / name).mkdir()
    else:
        (to / name).write_bytes(content)
    return to


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 11421896\n"
DAMAGES = {
    "empty": (b"", r"has 0 bytes"),
    "blank": (b" \n", r"has 2 bytes"),
    "a pointer": (POINTER, "is only a git-lfs pointer"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "begins with a byte order mark"),
    "in UTF-16": ("{}".encode("utf-16"), "begins with a byte order mark"),
    "a folder": (None, "is a folder, but a file is needed"),
}
JSON_DAMAGES = DAMAGES | {
    "cut off": (b'{"version": "1.0", "added_tokens": [{', "is not valid JSON"),
    "null": (b"null", "is a JSON NoneType, not an object"),
    "a name twice": (b'{"a": 1, "a": 2}', "names 'a' twice"),
}
# what is behind them is well-formed, and no tokenizer
MEANINGS = {
    "tokenizer.json": [
        (b"{}", WrongModel, "is another model's tokenizer: Qwen-Image's is of type BPE"),
        (b'{"model": {"type": "WordPiece"}}', WrongModel, "is another model's tokenizer: Qwen-Image's is of type BPE"),
        (b'{"model": {"vocab": {"a": 0}}}', DamagedFile, "has no list of merges"),
        (b'{"model": {"vocab": {"a": 0, "b": 0}, "merges": []}}', DamagedFile, "gives two tokens the same number"),
        (b'{"model": {"vocab": {"a": null}, "merges": []}}', DamagedFile, "has no table from tokens to numbers"),
        (b'{"model": {"vocab": {"a": 0}, "merges": []}}', DamagedFile, "lacks 255 of the 256 bytes"),
    ],
    "vocab.json": [(b"{}", DamagedFile, "has no table from tokens to numbers")],
    "merges.txt": [
        (b"\xff\xfa", DamagedFile, "is not text"),
        (b"a b c\n", DamagedFile, "is not a pair of tokens"),
        (b"#version: 0.2\n", DamagedFile, "is cut off, or does not belong to its vocabulary"),
    ],
    "tokenizer_config.json": [
        (b'{"added_tokens_decoder": []}', DamagedFile, "its added tokens are damaged"),
        (b'{"added_tokens_decoder": {"x": {"content": "a"}}}', DamagedFile, "its added tokens are damaged"),
        (b'{"added_tokens_decoder": {"7": {"content": "<|im_start|>"}}}', DamagedFile, "is token 7, but it is"),
    ],
}


@pytest.fixture(scope="session")
def one_file(small_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small tokenizer as tokenizer.json, whichever files this release of transformers writes."""
    folder = tmp_path_factory.mktemp("tokenizer")
    text = read_tokenizer(small_pipeline / "tokenizer").to_str()
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def two_files(one_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small tokenizer as vocab.json, merges.txt and settings with the added tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    content = json.loads((one_file / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "vocab.json").write_text(json.dumps(content["model"]["vocab"]), encoding="utf-8")
    lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    added = {str(entry["id"]): {**entry, "id": None} for entry in content["added_tokens"]}
    settings = {number: {k: v for k, v in entry.items() if k != "id"} for number, entry in added.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": settings}), encoding="utf-8")
    return folder


def of_kind(name: str, one_file: Path, two_files: Path) -> Path:
    """A folder in which that file counts."""
    return one_file if name.startswith("tokenizer.") else two_files


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"])
@pytest.mark.parametrize("damage", JSON_DAMAGES)
def test_a_damaged_file_of_a_tokenizer_is_named(
    damage: str, name: str, one_file: Path, two_files: Path, tmp_path: Path
) -> None:
    if name == "merges.txt" and damage not in DAMAGES:
        pytest.skip("it is no JSON")
    content, words = JSON_DAMAGES[damage]
    folder = damaged(of_kind(name, one_file, two_files), tmp_path / "tokenizer", name, content)
    with pytest.raises(DamagedFile, match=words) as caught:
        PromptTokenizer(folder)
    assert str(folder / name) in str(caught.value)


@pytest.mark.parametrize(("name", "index"), [(name, i) for name, cases in MEANINGS.items() for i in range(len(cases))])
def test_a_file_that_is_well_formed_and_no_tokenizers_is_named(
    name: str, index: int, one_file: Path, two_files: Path, tmp_path: Path
) -> None:
    content, error, words = MEANINGS[name][index]
    folder = damaged(of_kind(name, one_file, two_files), tmp_path / "tokenizer", name, content)
    with pytest.raises(error, match=words) as caught:
        PromptTokenizer(folder)
    assert str(folder / name) in str(caught.value)


def shortened(lines: list[str], how: str) -> list[str]:
    half = len(lines) // 2
    if how == "one is missing":
        return lines[:half] + lines[half + 1 :]
    if how == "two in another order":
        return [*lines[:half], lines[half + 1], lines[half], *lines[half + 2 :]]
    return lines[:half] if how == "half" else lines[:-1]


@pytest.mark.parametrize("how", ["half", "all but one", "one is missing", "two in another order"])
@pytest.mark.parametrize("source", ["ComfyUI's", "small"])
def test_merges_that_are_cut_off_at_a_lines_end_are_refused(
    source: str, how: str, words_and_merges: Path, two_files: Path, tmp_path: Path
) -> None:
    """They are well-formed, make the template's 34 tokens, and other tokens of other texts."""
    whole = words_and_merges if source == "ComfyUI's" else two_files
    lines = (whole / "merges.txt").read_text(encoding="utf-8").splitlines()
    content = "\n".join([*shortened(lines, how), ""]).encode()
    folder = damaged(whole, tmp_path / "tokenizer", "merges.txt", content)
    with pytest.raises(DamagedFile, match=r"merges\.txt(: its merges are not in| is cut off, or does not belong)"):
        PromptTokenizer(folder)


def test_lines_that_windows_ends_are_read(two_files: Path, tmp_path: Path) -> None:
    content = (two_files / "merges.txt").read_bytes().replace(b"\n", b"\r\n")
    folder = damaged(two_files, tmp_path / "tokenizer", "merges.txt", content)
    assert PromptTokenizer(folder).encode("a red circle") == PromptTokenizer(two_files).encode("a red circle")


def without_normalizer(content: Any) -> None:
    content["normalizer"] = None


def with_a_space_before(content: Any) -> None:
    content["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True


def with_spaces_apart(content: Any) -> None:
    split = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    split["Regex"] = split["Regex"].replace(r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{L}+")


def with_other_numbers(content: Any) -> None:
    """The last two added tokens of the template's change places."""
    added = {entry["content"]: entry for entry in content["added_tokens"]}
    first, second = added["<|vision_start|>"], added["<|vision_end|>"]
    first["content"], second["content"] = second["content"], first["content"]


@pytest.mark.parametrize("change", [without_normalizer, with_a_space_before, with_spaces_apart, with_other_numbers])
def test_a_tokenizer_of_as_many_tokens_that_makes_others_is_another_models(
    change: Callable[[Any], None], plain: Tokenizer, tmp_path: Path
) -> None:
    content = json.loads(plain.to_str())
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(WrongModel, match=r"holds another model's tokenizer: (from the same text|Qwen-Image's makes)"):
        PromptTokenizer(tmp_path)


def test_another_models_tokenizer_is_refused(plain: Tokenizer, tmp_path: Path) -> None:
    content = json.loads(plain.to_str())
    content["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(WrongModel, match=r"another model's tokenizer: Qwen-Image's makes 34 tokens .* this one \d+"):
        PromptTokenizer(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dropout", 0.5),
        ("continuing_subword_prefix", "<|im_start|>"),
        ("end_of_word_suffix", "x"),
        ("byte_fallback", True),
        ("ignore_merges", True),
    ],
)
def test_a_tokenizer_that_merges_in_another_way_is_another_models(
    key: str, value: object, one_file: Path, two_files: Path, tmp_path: Path
) -> None:
    whole = of_kind("tokenizer.json", one_file, two_files)
    content = json.loads((whole / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"][key] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(WrongModel, match=rf"is another model's tokenizer: .* without .*{key}"):
        PromptTokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
def test_a_vocabulary_without_a_byte_is_refused(name: str, one_file: Path, two_files: Path, tmp_path: Path) -> None:
    """It would leave that byte out of every text."""
    whole = of_kind(name, one_file, two_files)
    content = json.loads((whole / name).read_text(encoding="utf-8"))
    del (content["model"]["vocab"] if name == "tokenizer.json" else content)["\u00a1"]
    folder = damaged(whole, tmp_path / "tokenizer", name, json.dumps(content).encode())
    with pytest.raises(DamagedFile, match="lacks 1 of the 256 bytes"):
        PromptTokenizer(folder)


def test_a_thousand_added_tokens_are_read_at_once(two_files: Path, tmp_path: Path) -> None:
    settings = json.loads((two_files / "tokenizer_config.json").read_text(encoding="utf-8"))
    added = settings["added_tokens_decoder"]
    first = 1 + max(int(number) for number in added)
    more = {str(first + i): {"content": f"<|{i}|>", "special": True} for i in range(1000)}
    settings["added_tokens_decoder"] = dict(reversed((added | more).items()))
    folder = damaged(two_files, tmp_path / "tokenizer", "tokenizer_config.json", json.dumps(settings).encode())
    assert PromptTokenizer(folder).encode("<|7|>")[PROMPT_TEMPLATE_TOKENS] == first + 7


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes among files")
def test_files_that_are_not_read_may_be_anything(two_files: Path, tmp_path: Path) -> None:
    folder = damaged(two_files, tmp_path / "tokenizer", "chat_template.jinja", b"")
    (folder / "chat_template.jinja").unlink()
    os.mkfifo(folder / "chat_template.jinja")
    assert PromptTokenizer(folder).encode("a") == PromptTokenizer(two_files).encode("a")


def test_tokens_are_those_of_transformers(words_and_merges: Path) -> None:
    from transformers import Qwen2TokenizerFast

    theirs = Qwen2TokenizerFast.from_pretrained(str(words_and_merges), local_files_only=True)
    ours = PromptTokenizer(words_and_merges)
    for text in TEXTS:
        assert ours.encode(text) == theirs(PROMPT_TEMPLATE.format(text))["input_ids"]


def test_a_folder_without_a_tokenizer_or_none_at_all_is_missing(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(MissingFile, match=str(folder)):
            PromptTokenizer(folder)
