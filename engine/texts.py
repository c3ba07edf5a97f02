"""Texts of others (keys, file names, prompts' ends) as they may be shown in a log, on a node, or in a message."""


def printable(text: str, *, lines: bool = False) -> str:
    """One line that shows what is in it, without line breaks, NULs, escapes and halves of characters; `lines`: line
    breaks stay."""
    return "".join(c if c.isprintable() or (lines and c == "\n") else c.encode("unicode_escape").decode() for c in text)
