"""Every place in the engine that orders streams, found in its source; and one of them taken away at a time."""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from . import seams

ENGINE = Path(__file__).parents[2] / "engine"
ORDERING = (
    "after_compute",
    "compute_waits",
    "copy_waits",
    "copying",
    "finish",
    "host_waits",
    "record_compute",
    "record_copy",
)


@dataclass(frozen=True)
class OrderingCall:
    """A call of a StreamOrder's method; `name` tells it from the others: file, function, method, which of several."""

    name: str
    file: str
    function: str
    method: str
    lines: range

    @contextmanager
    def removed(self) -> Iterator[None]:
        """Within it, that call does nothing. Others of the same method do what they did."""
        method = getattr(seams.STREAM_ORDER, self.method)

        def call(order: Any, *args: Any) -> Any:
            frame = sys._getframe(1)
            code = frame.f_code
            here = Path(code.co_filename).name == self.file and code.co_name == self.function
            if here and frame.f_lineno in self.lines:
                return nullcontext()
            return method(order, *args)

        with patch.object(seams.STREAM_ORDER, self.method, call):
            yield


def ordering_calls() -> list[OrderingCall]:
    """All of the engine, in the order of files and lines."""
    found: list[OrderingCall] = []
    counts: Counter[str] = Counter()
    for file in sorted(ENGINE.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            for node in ast.walk(function):
                if not _orders(node):
                    continue
                name = f"{file.stem}.{function.name}: {node.func.attr}"
                counts[name] += 1
                name += f" ({counts[name]})" if counts[name] > 1 else ""
                lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                found.append(OrderingCall(name, file.name, function.name, node.func.attr, lines))
    return found


def _orders(node: Any) -> bool:
    """Whether it is a call such as `self._order.finish()` or `order.finish()`."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ORDERING):
        return False
    owner = node.func.value
    name = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
    return name in seams.NAMES_OF_ORDER
