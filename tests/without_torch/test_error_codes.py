"""Every error has a code and values beside its English text, from which a page says it in another language."""

import copy
import json
import pickle
from pathlib import Path

import error_texts
import pytest
from error_texts import Site
from qwenimage_lowvram.engine.errors import DamagedFile, DoesNotFit, MissingFile, QwenLowVRAMError
from qwenimage_lowvram.engine.files.model_files import model_files

SITES = error_texts.sites()


def test_every_error_has_a_literal_code_and_text() -> None:
    assert len(SITES) > 300
    assert [site.where for site in SITES if not site.code or not site.text] == []


def test_every_value_that_a_text_names_is_given() -> None:
    assert [(site.where, site.named - site.given) for site in SITES if not site.named <= site.given] == []


def test_a_code_stands_for_one_text_and_a_text_for_one_code() -> None:
    assert clashes([(site.code, site.text) for site in SITES]) == []
    assert clashes([(site.text, site.code) for site in SITES]) == []


def clashes(pairs: list[tuple[str | None, str | None]]) -> list[str | None]:
    first: dict[str | None, str | None] = {}
    return [name for name, other in pairs if first.setdefault(name, other) != other]


def test_the_list_for_translators_is_that_of_the_source() -> None:
    assert error_texts.LIST.read_text(encoding="utf-8") == error_texts.written(), "Run python tools/error_texts.py."


def test_what_breaks_a_rule_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rooms").mkdir()
    (tmp_path / "rooms" / "room.py").write_text(
        "class Bad(QwenLowVRAMError): ...\n"
        "Bad('a {b} {c:.9}', code='room.bad', b=1)\n"
        "Bad(f'a {b}', code='room.worse', b=1)\n"
        "Bad('a')\n"
        "def fail(what, *, code, **values):\n"
        "    raise Bad(f'{what} in {{room}}.', code=code, room=1, **values)\n"
        "fail('{thing} fails', code='room.fails', thing=2)\n"
        "fail(word, code='room.fails_unsaid')\n"
    )
    monkeypatch.setattr(error_texts, "PACK", tmp_path)
    assert error_texts.sites(("rooms",)) == [
        Site("rooms/room.py:2", "room.bad", "a {b} {c:.9}", frozenset({"b"})),
        Site("rooms/room.py:3", "room.worse", None, frozenset({"b"})),
        Site("rooms/room.py:4", None, "a", frozenset()),
        Site("rooms/room.py:7", "room.fails", "{thing} fails in {room}.", frozenset({"room", "thing"})),
        Site("rooms/room.py:8", "room.fails_unsaid", None, frozenset({"room"})),
    ]


def test_a_text_is_made_of_the_values() -> None:
    error = DoesNotFit(
        "{what} needs {need_bytes}, {kinds} of {shape}: {name!r:.4}",
        code="test.needs",
        what=Path("a") / "b",
        need_bytes=3 * 2**30,
        kinds=["int8", "nf4"],
        shape=(1, 2),
        name="{x}\ud800",
    )
    assert str(error) == f"{Path('a') / 'b'} needs 3.00 GiB, int8, nf4 of (1, 2): '{{x}}"
    assert error.as_dict() == {
        "code": "test.needs",
        "values": {
            "what": str(Path("a") / "b"),
            "need_bytes": 3 * 2**30,
            "kinds": ["int8", "nf4"],
            "shape": [1, 2],
            "name": "{x}\\ud800",
        },
        "text": str(error),
    }


@pytest.mark.parametrize(
    "value",
    [float("nan"), ValueError("no"), {"a": 1}, "x" * 10_000, b"\xff", [[1] * 999] * 999],
    ids=lambda value: repr(value)[:20],
)
def test_values_are_json_of_a_bounded_length(value: object) -> None:
    error = DamagedFile("It holds {value!s:.99}.", code="test.holds", value=value)
    written = json.dumps(error.as_dict(), allow_nan=False)
    assert len(written) < 500_000
    assert json.loads(written) == error.as_dict()


def test_an_error_among_the_values_keeps_its_code() -> None:
    inner = MissingFile("There is no {file}.", code="test.none", file="a")
    error = DoesNotFit("Not done. {reason}", code="test.not_done", reason=inner)
    assert str(error) == "Not done. There is no a."
    assert error.values == {"reason": {"code": "test.none", "values": {"file": "a"}, "text": "There is no a."}}
    assert copy.deepcopy(error).as_dict() == error.as_dict()


def test_copies_keep_code_and_values() -> None:
    error = MissingFile("There is no {file}.", code="test.none", file="{a}")
    for again in (copy.copy(error), copy.deepcopy(error), pickle.loads(pickle.dumps(error))):
        assert type(again) is type(error)
        assert again.as_dict() == error.as_dict()


def test_the_name_of_a_class_holds_no_folder_of_the_machine() -> None:
    for kind in (QwenLowVRAMError, MissingFile, DamagedFile):
        assert kind.__module__ == "qwen_lowvram"


def test_other_words_keep_code_and_values() -> None:
    error = MissingFile("There is no {file}.", code="test.none", file="{a}")
    again = error.saying(f"vae: {error}", input="vae")
    assert isinstance(again, MissingFile)
    assert str(again) == "vae: There is no {a}."
    assert (again.code, again.values) == ("test.none", {"file": "{a}", "input": "vae"})
    assert (str(error), error.values) == ("There is no {a}.", {"file": "{a}"})


def test_a_missing_file_says_so_by_its_code(tmp_path: Path) -> None:
    with pytest.raises(MissingFile) as caught:
        model_files(tmp_path / "gone.safetensors")
    assert caught.value.code == "file.missing"
    assert caught.value.values == {"file": str(tmp_path / "gone.safetensors")}
