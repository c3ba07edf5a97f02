"""Every error the engine raises. Each message says what is wrong, how much, and what to do.

Beside its English text an error has a code and values, so that it can be said in another language. All codes, with
their texts, stand in locales/en/errors.json.
"""

import copy
from importlib import import_module
from typing import Any, ClassVar, TypeVar

from .texts import printable
from .told import Coded, filled, plain

_Same = TypeVar("_Same", bound="QwenLowVRAMError")
# of classes, in the details of an error that ComfyUI shows: theirs would hold the folder that the pack lies in
_SHOWN_MODULE = "qwen_lowvram"


class QwenLowVRAMError(Coded, Exception):
    """Root of the pack's errors: catch this to catch them all.

    text, code, values: as Coded has them.

    Messages hold names and keys of files: what cannot be printed in them is escaped, but for line breaks.
    """

    __module__ = _SHOWN_MODULE
    _defined_in: ClassVar[str] = __name__

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._defined_in, cls.__module__ = cls.__module__, _SHOWN_MODULE

    def __init__(self, text: str, /, *, code: str, **values: Any) -> None:
        self.code = code
        self.values = plain(values)
        super().__init__(filled(text, values))

    def saying(self: _Same, text: str, **values: Any) -> _Same:
        """The same error, with its code and values and more of them, in other words. To be raised from this one."""
        again = copy.copy(self)
        again.args = (printable(text, lines=True),)
        again.values = self.values | plain(values)
        return again

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self._defined_in, type(self).__name__, str(self)), self.__dict__


def _again(module: str, name: str, text: str) -> QwenLowVRAMError:
    """Of pickles and copies, which then set the code and the values."""
    kind: type[QwenLowVRAMError] = getattr(import_module(module), name)
    return kind("{text}", code="", text=text)


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


class DeviceFailed(QwenLowVRAMError, RuntimeError):
    """One of several devices failed, though not for lack of memory; the message names it."""


class DoesNotFit(QwenLowVRAMError):
    """The request needs more memory than the limit allows; the message says what would fit."""


class DownloadError(QwenLowVRAMError):
    """A file could not be fetched; the message says why, and what was fetched stays for the next try."""


class NoNetwork(DownloadError):
    """The hub cannot be reached: an ordinary state of many machines."""
