"""What the page makes of a node's parts (engine/told.py) in Chinese: its own scripts, run by node without a page."""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwenimage_lowvram.engine.told import json_of

SHARED = Path(__file__).resolve().parents[1] / "js" / "shared"
HAS_NODE = shutil.which("node") is not None
_SCRIPT = """
import { readFileSync } from "node:fs";
const [folder, file] = process.argv.slice(1);
const { chineseParts } = await import(folder + "/error_words.js");
const zh = JSON.parse(readFileSync(file, "utf8"));
process.stdout.write(chineseParts(zh, JSON.parse(readFileSync(0, "utf8"))));
"""


def in_chinese(parts: Sequence[Any]) -> str:
    """parts: as a node sends them, or as `json_of` takes them."""
    given = [part if isinstance(part, dict) else json_of([part])[0] for part in parts]
    command = ["node", "--input-type=module", "-e", _SCRIPT, SHARED.as_uri(), str(SHARED / "error_words_zh.json")]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, check=True, encoding="utf-8")
    return done.stdout


def english_words(text: str) -> set[str]:
    """Words of small letters that a Chinese text has left."""
    return set(re.findall(r"(?<![\w.])[a-z]{2,}(?![\w.])", text))
