"""Every error the engine raises. Each message says what is wrong, how much, and what to do."""

from .texts import printable


class QwenLowVRAMError(Exception):
    """Root of the pack's errors: catch this to catch them all.

    Messages hold names and keys of files: what cannot be printed in them is escaped, but for line breaks.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message, lines=True))


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
