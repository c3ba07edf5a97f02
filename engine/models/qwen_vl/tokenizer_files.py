"""Read a tokenizer's folder: each file looked at, whatever it is, and made into a tokenizer. Knows no template."""

import codecs
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import DamagedFile, MissingFile, WrongModel
from ...files.json_texts import MAX_JSON_BYTES, parse_json, read_text, unreadable
from ...files.regular_file import Stamp, require_all_unchanged, stamp_of_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer

WHOLE, VOCABULARY, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
SETTINGS, ADDED = "tokenizer_config.json", "added_tokens.json"
NAMES = (WHOLE, VOCABULARY, MERGES, SETTINGS, ADDED)
MAX_VALUES = 2_000_000  # Qwen2.5's tokenizer.json has 600,000

# how Qwen2 splits a text before its pairs are merged (tokenizer.json of Qwen/Qwen2.5-VL-7B-Instruct)
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# of BPE: what makes other tokens of a text, the first at random, and some crash the package
_UNUSED = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def tokenizer_stamps(folder: Path) -> dict[Path, Stamp]:
    """What the files of a tokenizer's folder are now. Raises MissingFile where there is no tokenizer, DamagedFile where
    one of them is no regular file."""
    found: dict[Path, Stamp] = {}
    for name in NAMES:
        try:
            found[folder / name] = stamp_of_file(folder / name)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise unreadable(folder / name, error) from error
    if folder / WHOLE not in found and not {folder / VOCABULARY, folder / MERGES} <= found.keys():
        raise MissingFile(
            "{folder} holds no tokenizer ({whole}, or {vocabulary} and {merges}). Download the tokenizer's folder.",
            code="tokenizer.missing",
            folder=folder,
            whole=WHOLE,
            vocabulary=VOCABULARY,
            merges=MERGES,
        )
    return found


def read_tokenizer(folder: Path) -> "Tokenizer":
    """From tokenizer.json where it is there, else from the vocabulary and its merges; with the added tokens.

    Made from bytes that were checked, by the tokenizers package alone: transformers would open files again, others too,
    and take three times as long. Raises MissingFile, or DamagedFile with the file's name; WrongModel for a tokenizer
    of another kind.
    """
    stamps = tokenizer_stamps(folder)
    tokenizer = _whole(folder / WHOLE) if folder / WHOLE in stamps else _assembled(folder)
    settings = {name: _json(folder / name) for name in (SETTINGS, ADDED) if folder / name in stamps}
    _add_tokens(tokenizer, folder, settings)
    require_all_unchanged(stamps)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _whole(file: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    raw = _raw(file)
    model = _parsed(raw, file).get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or any(map(model.get, _UNUSED)):
        raise WrongModel(
            "{file} is another model's tokenizer: Qwen-Image's is of type BPE, without {unused}. Use Qwen-Image's "
            "tokenizer folder.",
            code="tokenizer.other_model",
            file=file,
            unused=_UNUSED,
        )
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in _listed(file, model.get("merges"))]
    _require_whole_merges(file, _vocabulary(file, model.get("vocab")), merges)
    try:
        return Tokenizer.from_str(raw.decode("utf-8"))
    except Exception as error:  # the package has no class for it
        raise DamagedFile(
            "{file} is not a tokenizer ({error!s:.199}). Download it again.",
            code="tokenizer.is_none",
            file=file,
            error=error,
        ) from error


def _assembled(folder: Path) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    file = folder / MERGES
    vocabulary, merges = _vocabulary(folder / VOCABULARY, _json(folder / VOCABULARY)), _merges(file)
    _require_whole_merges(file, vocabulary, merges)
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(first, second) for first, second in merges]))
    except Exception as error:  # the package has no class for it
        raise DamagedFile(
            "{file} and {vocabulary} do not fit together ({error!s:.199}). Download them again.",
            code="tokenizer.files_do_not_fit",
            file=file,
            vocabulary=VOCABULARY,
            error=error,
        ) from error
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def _require_whole_merges(file: Path, vocabulary: Mapping[str, int], merges: Sequence[Sequence[str]]) -> None:
    """Raise DamagedFile unless every token of several characters is merged from two others, once, in the order of the
    tokens' numbers, as where both were made from one list of ranks: a list that is cut off at a line's end is
    well-formed, and would make other tokens."""
    try:
        made = ["".join((first, second)) for first, second in merges]
    except (TypeError, ValueError) as error:
        raise DamagedFile(
            "{file}: one of its merges is not a pair of tokens. Download it again.",
            code="tokenizer.merge_no_pair",
            file=file,
        ) from error
    unmade = {token for token in vocabulary if len(token) > 1}.difference(made)
    if unmade:
        raise DamagedFile(
            "{file} is cut off, or does not belong to its vocabulary: {unmade_count} of {token_count} tokens can "
            "never be made. Download it again.",
            code="tokenizer.cut_off",
            file=file,
            unmade_count=len(unmade),
            token_count=len(vocabulary),
        )
    numbers = [vocabulary.get(token, -1) for token in made]
    if any(later <= earlier for earlier, later in pairwise(numbers)):
        raise DamagedFile(
            "{file}: its merges are not in the order of their token numbers. Download it again.",
            code="tokenizer.merges_out_of_order",
            file=file,
        )


def _add_tokens(tokenizer: "Tokenizer", folder: Path, given: Mapping[str, Any]) -> None:
    """Those that stand for no text, such as <|im_start|>, each with the number that the folder gives it."""
    from tokenizers import AddedToken

    file, stated = folder / SETTINGS, given.get(SETTINGS, {}).get("added_tokens_decoder")
    if stated is None:
        file = folder / ADDED
        stated = {number: {"content": name, "special": True} for name, number in given.get(ADDED, {}).items()}
    try:
        if not isinstance(stated, dict):
            raise TypeError("no table of numbers to tokens")
        tokens = {number: stated[key] for number, key in sorted((int(key), key) for key in stated)}
        missing = [token for token in tokens.values() if tokenizer.token_to_id(token["content"]) is None]
        flags = [{flag: token[flag] for flag in _FLAGS if flag in token} | {"normalized": False} for token in missing]
        tokenizer.add_tokens([AddedToken(token["content"], **kw) for token, kw in zip(missing, flags, strict=True)])
        for number, token in tokens.items():
            if (found := tokenizer.token_to_id(token["content"])) != number:
                raise DamagedFile(
                    "{file} says that {token!r:.99} is token {number}, but it is {found}: the folder's files do not "
                    "belong together. Download them again.",
                    code="tokenizer.token_has_two_numbers",
                    file=file,
                    token=token["content"],
                    number=number,
                    found=found,
                )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedFile(
            "{file}: its added tokens are damaged ({error!s:.99}). Download it again.",
            code="tokenizer.added_tokens_damaged",
            file=file,
            error=error,
        ) from error


def _vocabulary(file: Path, given: Any) -> dict[str, int]:
    from tokenizers import pre_tokenizers

    if not isinstance(given, dict) or not given or not all(type(number) is int for number in given.values()):
        raise DamagedFile(
            "{file} has no table from tokens to numbers. Download it again.", code="tokenizer.no_table", file=file
        )
    if len(set(given.values())) < len(given) or not all(0 <= number < 2**31 for number in given.values()):
        raise DamagedFile(
            "{file} gives two tokens the same number, or a number that is not possible. Download it again.",
            code="tokenizer.number_twice",
            file=file,
        )
    if missing := set(pre_tokenizers.ByteLevel.alphabet()).difference(given):
        raise DamagedFile(
            "{file} lacks {missing_count} of the 256 bytes that all text is made of. Download it again.",
            code="tokenizer.bytes_missing",
            file=file,
            missing_count=len(missing),
        )
    return given


def _listed(file: Path, given: Any) -> list[Any]:
    if not isinstance(given, list):
        raise DamagedFile("{file} has no list of merges. Download it again.", code="tokenizer.no_merges", file=file)
    return given


def _merges(file: Path) -> list[list[str]]:
    try:
        lines = _raw(file).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DamagedFile(
            "{file} is not text ({error}). Download it again.", code="tokenizer.no_text", file=file, error=error
        ) from error
    return [line.split(" ") for line in lines if line and not line.startswith("#version")]


def _json(file: Path) -> dict[str, Any]:
    return _parsed(_raw(file), file)


def _parsed(raw: bytes, file: Path) -> dict[str, Any]:
    return parse_json(raw, str(file), max_values=MAX_VALUES)


def _raw(file: Path) -> bytes:
    raw, _ = read_text(file)
    if not raw.strip() or len(raw) > MAX_JSON_BYTES:
        raise DamagedFile(
            "{file} has {size} bytes or more, which is too many for a tokenizer. Download it again.",
            code="tokenizer.too_long",
            file=file,
            size=len(raw),
        )
    if raw.startswith(b"version https://git-lfs"):
        raise DamagedFile(
            "{file} is only a git-lfs pointer. Download the file itself.",
            code="tokenizer.git_lfs_pointer",
            file=file,
        )
    if raw.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DamagedFile(
            "{file} begins with a byte order mark, which some editors add. Download it again.",
            code="tokenizer.byte_order_mark",
            file=file,
        )
    return raw
