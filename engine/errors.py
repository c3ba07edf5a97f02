"""Every error the engine raises. Each message says what is wrong, how much, and what to do."""


class QwenLowVRAMError(Exception):
    """Root of the pack's errors: catch this to catch them all."""


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
