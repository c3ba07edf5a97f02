"""Plans and headers are read without torch: importing what reads them brings none in, by no way round.

`tensors.py` of the networks is not among them: it asks the formats, whose codecs compute.
"""

import subprocess
import sys
from pathlib import Path

from devtools.cache import REPOSITORY

ENGINE = REPOSITORY / "engine"
OF_NETWORKS = ("component", "costs", "edit_sizes", "gguf_names", "prompt_template", "variants")
OF_MODELS = ("foreign", "prefixes", "recognition", "sorting", "table", *OF_NETWORKS)
MODULES = (
    *(path for room in ("planning", "files") for path in sorted((ENGINE / room).glob("*.py"))),
    *sorted(path for path in (ENGINE / "models").rglob("*.py") if path.stem in OF_MODELS),
    *(ENGINE / f"{name}.py" for name in ("environment", "errors", "log", "numerics", "texts")),
)
# None in sys.modules: an import of it is an error
CODE = """
import importlib, sys
sys.modules["torch"] = None
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def name_of(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(part for part in ("qwenimage_lowvram", *parts) if part != "__init__")


def test_what_plans_and_what_reads_headers_is_imported_where_there_is_no_torch() -> None:
    assert {path.stem for path in MODULES} >= set(OF_MODELS)
    done = subprocess.run(
        [sys.executable, "-c", CODE, *map(name_of, MODULES)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
