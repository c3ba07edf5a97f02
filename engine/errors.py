"""Every error the engine raises. Each message says what is wrong, how much, and what to do.

Beside its English text an error has a code and values, so that it can be said in another language. All codes, with
their texts, stand in locales/en/errors.json.
"""

import copy
from importlib import import_module
from math import isfinite
from typing import Any, ClassVar, TypeVar

from .texts import printable, size_text

_Same = TypeVar("_Same", bound="QwenLowVRAMError")
# of classes, in the details of an error that ComfyUI shows: theirs would hold the folder that the pack lies in
_SHOWN_MODULE = "qwen_lowvram"
_LONGEST_VALUE = 4096  # characters: as many as a path may have
_MOST_ITEMS = 100  # of a list


class QwenLowVRAMError(Exception):
    """Root of the pack's errors: catch this to catch them all.

    text: with {name} where a value stands, and format specifications as in str.format. Whole numbers whose name ends
    in _bytes are shown as sizes (1.58 GiB), lists of texts with commas between.
    code: one for each text. It stays when the text is improved.
    values: what the text names. Numbers, texts and lists of them stay what they are, up to a length; of another error
    its code, values and text are kept, of all else its text.

    Messages hold names and keys of files: what cannot be printed in them is escaped, but for line breaks.
    """

    __module__ = _SHOWN_MODULE
    code: str
    values: dict[str, Any]
    _defined_in: ClassVar[str] = __name__

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._defined_in, cls.__module__ = cls.__module__, _SHOWN_MODULE

    def __init__(self, text: str, /, *, code: str, **values: Any) -> None:
        self.code = code
        self.values = {name: _plain(value) for name, value in values.items()}
        said = text.format_map({name: _shown(name, value) for name, value in values.items()})
        super().__init__(printable(said, lines=True))

    def saying(self: _Same, text: str, **values: Any) -> _Same:
        """The same error, with its code and values and more of them, in other words. To be raised from this one."""
        again = copy.copy(self)
        again.args = (printable(text, lines=True),)
        again.values = self.values | {name: _plain(value) for name, value in values.items()}
        return again

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"code": self.code, "values": self.values, "text": str(self)}

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self._defined_in, type(self).__name__, str(self)), self.__dict__


def _again(module: str, name: str, text: str) -> QwenLowVRAMError:
    """Of pickles and copies, which then set the code and the values."""
    kind: type[QwenLowVRAMError] = getattr(import_module(module), name)
    return kind("{text}", code="", text=text)


class _Texts(list[str]):
    def __format__(self, specification: str) -> str:
        return format(", ".join(self), specification)


def _shown(name: str, value: Any) -> Any:
    if name.endswith("_bytes") and isinstance(value, int):
        return size_text(value)
    texts = isinstance(value, list | tuple) and value and all(isinstance(item, str) for item in value)
    return _Texts(value) if texts else value


def _plain(value: Any) -> Any:
    """What JSON has: numbers, texts, and lists of them; an error with its own code and values."""
    if isinstance(value, QwenLowVRAMError):
        return value.as_dict()
    if isinstance(value, list | tuple):
        return [_plain_item(item) for item in value[:_MOST_ITEMS]]
    return _plain_item(value)


def _plain_item(value: Any) -> Any:
    if value is None or isinstance(value, int) or (isinstance(value, float) and isfinite(value)):
        return value
    return printable(str(value)[:_LONGEST_VALUE], lines=True)


class CheckpointError(QwenLowVRAMError):
    """A model file or folder cannot be used; the message names the file."""


class MissingFile(CheckpointError):
    """A file or folder is not there, or may not be read."""


class DamagedFile(CheckpointError):
    """A file's header and its contents disagree (truncated, not safetensors, ...)."""


class WrongModel(CheckpointError):
    """The file holds another model than the place it was given to needs."""


class CacheError(QwenLowVRAMError):
    """Quantized weights cannot be written, or they or kept prompts removed; the message says where and why."""


class MissingPackage(CheckpointError):
    """A file's weights are read with a Python package that is missing or too old; the message names it."""


class InvalidRequest(QwenLowVRAMError, ValueError):
    """A size, step count or other input that the model cannot work with."""


class Unsupported(QwenLowVRAMError):
    """Something the pack does not do yet; the message names the node that asked for it."""


class DoesNotFit(QwenLowVRAMError):
    """The request needs more memory than the limit allows; the message says what would fit."""


class DownloadError(QwenLowVRAMError):
    """A file could not be fetched; the message says why, and what was fetched stays for the next try."""


class NoNetwork(DownloadError):
    """The hub cannot be reached: an ordinary state of many machines."""
