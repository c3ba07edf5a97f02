"""Prompts become the same token ids in every transformers, from either kind of tokenizer folder."""

import json
import shutil
from pathlib import Path

import pytest
from qwenimage_lowvram.engine.errors import DamagedFile, MissingFile, WrongModel
from qwenimage_lowvram.engine.families.members import EDIT_TEMPLATE, PROMPT_TEMPLATE
from qwenimage_lowvram.engine.text.prompts import PromptTokenizer
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
    "cut off": (b'{"version": "1.0", "added_tokens": [{', "is cut off or damaged"),
    "a pointer": (POINTER, "is a pointer to a file of git-lfs"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "begins with a byte order mark"),
    "null": (b"null", "it is no JSON object"),
    "a folder": (None, "is a folder, where a file is needed"),
}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_a_tokenizer_is_named(damage: str, name: str, small_pipeline: Path, tmp_path: Path) -> None:
    content, words = DAMAGES[damage]
    folder = damaged(small_pipeline / "tokenizer", tmp_path / "tokenizer", name, content)
    with pytest.raises(DamagedFile, match=words) as caught:
        PromptTokenizer(folder)
    assert str(folder / name) in str(caught.value)


def test_what_the_library_cannot_read_is_told_with_the_folder(small_pipeline: Path, tmp_path: Path) -> None:
    folder = damaged(
        small_pipeline / "tokenizer", tmp_path / "tokenizer", "tokenizer.json", b'{"model": {"type": "X"}}'
    )
    with pytest.raises(
        DamagedFile, match=r"(?s)its tokenizer cannot be read .*Download its files again: .*tokenizer\.json"
    ):
        PromptTokenizer(folder)


def test_another_models_tokenizer_is_refused(plain: Tokenizer, tmp_path: Path) -> None:
    content = json.loads(plain.to_str())
    content["model"]["merges"] = []  # which makes a token of every byte
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(WrongModel, match=r"another model's tokenizer: Qwen-Image's makes 34 tokens .* this one \d+"):
        PromptTokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_or_none_at_all_is_missing(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(MissingFile, match=str(folder)):
            PromptTokenizer(folder)
