"""Other packages, imported when they are first needed: they take seconds, and most files need few of them.

A package that cannot be imported is an error only here, in words: MissingPackage says which, what for, and what to do.
"""

import importlib
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from .environment import pip_name
from .errors import MissingPackage

# bitsandbytes says there, whenever it is imported, that it would like another package for products on the CPU
_CHATTY = "bitsandbytes.backends.cpu.ops"
# read by diffusers while it is imported, which fails there for a kernel that it does not know
ATTENTION_VARIABLE = "DIFFUSERS_ATTN_BACKEND"
# diffusers' name for torch's scaled_dot_product_attention, which the memory plan counts with
ATTENTION = "native"


def diffusers_transformer() -> ModuleType:
    """diffusers' module that holds the transformer's classes."""
    purpose = "the transformer is made of its modules"
    return _imported("diffusers.models.transformers.transformer_qwenimage", "diffusers", purpose)


def diffusers_parallel() -> ModuleType:
    """diffusers' module that holds the settings of several processes."""
    purpose = "several processes make one image by its attention"
    return _imported("diffusers.models._modeling_parallel", "diffusers", purpose)


def bitsandbytes() -> ModuleType:
    """Its functions; importing them registers its operators with torch."""
    return _imported("bitsandbytes.functional", "bitsandbytes", "weights in nf4 and fp4 are read and written with it")


def ggml_types() -> ModuleType:
    """The gguf package's tables of types and their sizes."""
    return _imported("gguf.constants", "gguf", "GGUF files are read with it")


def ggml_quants() -> ModuleType:
    """The gguf package's types of fewer than four bits, with their tables."""
    return _imported("gguf.quants", "gguf", "GGUF files are read with it")


def _imported(module: str, package: str, purpose: str) -> ModuleType:
    try:
        with _without_wishes():
            return importlib.import_module(module)
    except ImportError as error:
        if error.name in (package, module):
            raise MissingPackage(
                "The package {package} is missing; {purpose}.\n\nWhat to do: install it into ComfyUI's Python with "
                "`pip install {pip_name}`, then start ComfyUI again.",
                code="package.missing",
                package=package,
                purpose=purpose,
                pip_name=pip_name(package),
            ) from error
        raise _broken(package, purpose, error) from error
    except Exception as error:  # code of others: it may fail in any way
        raise _broken(package, purpose, error) from error


def _broken(package: str, purpose: str, error: Exception) -> MissingPackage:
    while isinstance(error.__cause__, Exception):  # diffusers wraps what happens below it
        error = error.__cause__
    if "AttentionBackendName" in str(error):
        return _bad_attention(str(error))
    culprit = _importing(error) or package
    through = "" if culprit == package else f", which {package} imports,"
    return MissingPackage(
        "The package {package}{through} fails to import ({kind}: {error!s:.500}); {purpose}.\n\nWhat to do: install "
        "it again into ComfyUI's Python with `pip install --force-reinstall --no-deps {pip_name}`, in a version that "
        "fits, then start ComfyUI again.",
        code="package.fails",
        package=culprit,
        through=through,
        kind=type(error).__name__,
        error=error,
        purpose=purpose,
        pip_name=pip_name(culprit),
    )


def _importing(error: Exception) -> str | None:
    """The package whose own module was being imported, innermost: not who asked for it, nor what it called."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "<module>"]
    return str(frames[-1].f_globals.get("__name__", "")).partition(".")[0] or None if frames else None


def _bad_attention(why: str) -> MissingPackage:
    return MissingPackage(
        "The environment variable {variable} asks diffusers for an attention kernel that it does not know "
        "({why:.300}).\n\nWhat to do: remove {variable} from the environment that ComfyUI is started in, or set it to "
        "{known}, then start ComfyUI again.",
        code="package.unknown_attention",
        variable=ATTENTION_VARIABLE,
        why=why,
        known=ATTENTION,
    )


@contextmanager
def _without_wishes() -> Iterator[None]:
    """Also where it is another package that imports bitsandbytes, as diffusers does where it is installed."""
    logger = logging.getLogger(_CHATTY)
    logger.addFilter(_is_no_wish)
    try:
        yield
    finally:
        logger.removeFilter(_is_no_wish)


def _is_no_wish(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward" not in str(record.msg)
