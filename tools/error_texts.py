"""Write locales/en/errors.json: the English text of every error of the pack, and of what nodes tell (Told), by its
code, for the page and translators.

Read from the source, of which nothing is run. `{name}` stands where a value does; whole numbers whose name ends in
_bytes are sizes.

python tools/error_texts.py
"""

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

PACK = Path(__file__).resolve().parents[1]
LIST = PACK / "locales" / "en" / "errors.json"
ROOTS = {"QwenLowVRAMError", "Told"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Site:
    """A place that makes an error. code, text: None where they are no literals. given: the names of its values."""

    where: str
    code: str | None
    text: str | None
    given: frozenset[str]

    @property
    def named(self) -> set[str]:
        """The values that the text shows."""
        return {name for _, name, _, _ in Formatter().parse(self.text or "") if name is not None}


@dataclass(frozen=True)
class Helper:
    """A function that makes an error with the code that it is given. text: with its parameters as <name>."""

    parameters: tuple[str, ...]
    text: str
    given: frozenset[str]


def sites(folders: tuple[str, ...] = ("engine", "nodes")) -> list[Site]:
    """Of every call of an error's class, of Told, or of a helper, in the files of these folders; in their order."""
    files = sorted(file for folder in folders for file in (PACK / folder).rglob("*.py"))
    trees = {file.relative_to(PACK).as_posix(): ast.parse(file.read_text(encoding="utf-8")) for file in files}
    classes = _error_classes(list(trees.values()))
    helpers: dict[tuple[str, str], Helper] = {}
    made: list[Site] = []
    for file, tree in trees.items():
        for call, function in _calls(tree):
            if _called(call) not in classes:
                continue
            if function is not None and isinstance(_keywords(call).get("code"), ast.Name):
                helpers[file, function.name] = _helper(call, function)
            else:
                text = _literal(call.args[0]) if len(call.args) == 1 else None
                made.append(_site(file, call, text, frozenset()))
    for file, tree in trees.items():
        for call, _ in _calls(tree):
            if helper := _helper_of(helpers, file, _called(call)):
                made.append(_site(file, call, _filled(helper, call), helper.given))
    return sorted(made, key=lambda site: (site.where.split(":")[0], int(site.where.split(":")[1])))


def texts(made: list[Site]) -> dict[str, str]:
    """What the list holds: without the ways in which Python shows values."""
    found = {site.code: site.text for site in made if site.code and site.text}
    plain = {code: re.sub(r"\{(\w+)!r[^{}]*\}", r"'{\1}'", text) for code, text in found.items()}
    return {code: re.sub(r"\{(\w+)[!:][^{}]*\}", r"{\1}", text) for code, text in sorted(plain.items())}


def _error_classes(trees: list[ast.Module]) -> set[str]:
    found = set(ROOTS)
    definitions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    while more := {d.name for d in definitions if any(ast.unparse(base) in found for base in d.bases)} - found:
        found |= more
    return found


def _calls(tree: ast.AST, function: Function | None = None) -> Iterator[tuple[ast.Call, Function | None]]:
    """With the function in which each stands."""
    for node in ast.iter_child_nodes(tree):
        inside = node if isinstance(node, Function) else function
        if isinstance(node, ast.Call):
            yield node, inside
        yield from _calls(node, inside)


def _called(call: ast.Call) -> str:
    return ast.unparse(call.func).removeprefix("self.")


def _keywords(call: ast.Call) -> dict[str, ast.expr]:
    return {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg is not None}


def _literal(node: ast.expr | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _site(file: str, call: ast.Call, text: str | None, given: frozenset[str]) -> Site:
    keywords = _keywords(call)
    return Site(f"{file}:{call.lineno}", _literal(keywords.get("code")), text, given | (keywords.keys() - {"code"}))


def _helper(call: ast.Call, function: Function) -> Helper:
    text = call.args[0]
    parts = text.values if isinstance(text, ast.JoinedStr) else [text]
    template = "".join(
        f"<{ast.unparse(part.value)}>" if isinstance(part, ast.FormattedValue) else _literal(part) or f"<{text}>"
        for part in parts
    )
    names = tuple(argument.arg for argument in function.args.args if argument.arg != "self")
    return Helper(names, template, frozenset(_keywords(call).keys() - {"code"}))


def _helper_of(helpers: dict[tuple[str, str], Helper], file: str, name: str) -> Helper | None:
    """That of the same file, or else one of another file that is not private to it."""
    if (file, name) in helpers:
        return helpers[file, name]
    others = [helper for (_, other), helper in helpers.items() if other == name and not name.startswith("_")]
    return others[0] if others else None


def _filled(helper: Helper, call: ast.Call) -> str | None:
    """The helper's text with what the call gives for its parameters; None where that is no literal."""
    given = {**dict(zip(helper.parameters, call.args, strict=False)), **_keywords(call)}
    parameters = re.findall(r"<(\w+)>", helper.text)
    filled = {name: _literal(given.get(name)) for name in parameters}
    if None in filled.values():
        return None
    return re.sub(r"<(\w+)>", lambda match: filled[match[1]] or "", helper.text)


def written() -> str:
    return json.dumps(texts(sites()), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    LIST.write_text(written(), encoding="utf-8")
    print(f"{LIST.relative_to(PACK)}: {len(texts(sites()))} texts")
