"""Sizes and foreign texts as a log, a page or an error may show them. Holds no text of its own."""

LONGEST = 200  # characters of a foreign value that a message repeats
_GIB = 1024**3


def size_text(nbytes: int) -> str:
    """Bytes as a person reads them: 1.58 GiB, 81.0 MiB."""
    return f"{nbytes / _GIB:.2f} GiB" if nbytes >= _GIB / 10 else f"{nbytes / 1024**2:.1f} MiB"


def printable(text: str, *, lines: bool = False) -> str:
    """What cannot be printed as an escape, as `repr` writes it: control characters (which could forge a line of a log
    or steer a terminal), and halves of characters (lone surrogates, which no UTF-8 has). `lines`: line breaks stay."""
    return "".join(c if c.isprintable() or (lines and c == "\n") else _escaped(c) for c in text)


def half_character(text: str) -> int | None:
    """Where the first half of a character (a lone surrogate) stands; None where there is none."""
    return next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)


def shown(value: object) -> str:
    """A value that somebody sent: texts and numbers as in Python, cut to LONGEST; of anything else its type."""
    if value is not None and not isinstance(value, str | int | float):
        return f"a {type(value).__name__}"
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4300 digits
        return "a whole number of thousands of digits"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
