"""All that nodes tell has a Chinese text too, errors as well, with the same values and numbers, for such pages."""

import ast
import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import error_texts
import pytest

PAGE = error_texts.PACK / "js" / "shared"
ENGLISH: dict[str, str] = json.loads(error_texts.LIST.read_text(encoding="utf-8"))
GIVEN: dict[str, Any] = json.loads((PAGE / "error_words_zh.json").read_text(encoding="utf-8"))
CHINESE: dict[str, str] = GIVEN["texts"]
FIELD = re.compile(r"(?<!\{)\{(\w+)(?::\d)?\}(?!\})")
GRAMMAR = {"plural", "places_plural", "change"}  # of English


def test_every_code_has_a_chinese_text_and_no_other_has() -> None:
    assert CHINESE.keys() == ENGLISH.keys()
    assert list(CHINESE) == sorted(CHINESE)


@pytest.mark.parametrize("code", ENGLISH)
def test_a_chinese_text_shows_the_same_values_and_numbers(code: str) -> None:
    english, chinese = ENGLISH[code], CHINESE[code]
    assert set(FIELD.findall(chinese)) == set(FIELD.findall(english)) - GRAMMAR
    assert not _numbers(english) - _numbers(chinese)
    assert re.search("[\u4e00-\u9fff：，]", chinese)
    assert ("What to do:" in english) <= ("\n\n可行的办法：" in chinese)
    assert "What to do" not in chinese


def _numbers(text: str) -> Counter[str]:
    return Counter(re.findall(r"\d+(?:\.\d+)?", FIELD.sub("", text)))


def test_sentences_among_the_values_are_those_of_the_source() -> None:
    files = [file for folder in ("engine", "nodes") for file in (error_texts.PACK / folder).rglob("*.py")]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    said = {
        node.value
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert sorted(GIVEN["words"].keys() - said) == []


def test_inputs_are_called_as_on_the_nodes() -> None:
    nodes = json.loads((error_texts.PACK / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    names: dict[str, set[str]] = {}
    for node in nodes.values():
        for name, texts in node["inputs"].items():
            names.setdefault(name, set()).add(texts["name"].removesuffix("（GB）"))
    unlike = {name: said for name, said in GIVEN["inputs"].items() if said not in names.get(name, set())}
    assert unlike == {}


def test_patterns_use_the_groups_that_they_have() -> None:
    for pattern, chinese in (pair for pairs in GIVEN["patterns"].values() for pair in pairs):
        used = {int(number) for number in re.findall(r"\$(\d)", chinese)}
        assert used <= set(range(1, re.compile(pattern).groups + 1)), pattern


@pytest.mark.parametrize(
    ("code", "values", "said"),
    [
        (
            "plan.sampling_does_not_fit",
            {
                "need_bytes": 2523293286,
                "beside": "",
                "limit_bytes": 1932735283,
                "request": "2048x2048, 8 branches",
                "ways": "a smaller batch or no guidance (2 instead of 8 branches), or a VRAM limit of 2.36 GB or more",
            },
            "采样至少需要 2.35 GiB 显存，上限为 1.80 GiB（2048x2048，8 个分支）。\n\n"
            "可行的办法：减小批次或不用引导（2 个分支，而不是 8 个），或把显存上限提高到 2.36 GB 以上。",
        ),
        (
            "graph.will_not_fit",
            {
                "reason": {
                    "code": "plan.wrong_layers",
                    "text": "",
                    "values": {"file": "a", "makes": "layers", "layers": 0, "needed": "1 or more"},
                }
            },
            "此工作流的图像放不下，因此不编码它的提示词。a 生成图层，现在要求 0 个图层。"
            "\n\n可行的办法：把图层数设为 1 或更多。",
        ),
        (
            "lora.two_ways_at_once",
            {"file": "a", "name": "b", "kinds": ["by itself", "joined with another layer"], "input": "lora_name"},
            "LoRA：a 同时以两种方式修改 b（单独、与另一层合并）。",
        ),
        (
            "weight_cache.folder_unusable",
            {"folder": "{error}", "error": None},
            "{error} 不能使用（None）。请检查您的用户是否有写入权限。",
        ),
        (
            "gguf.tensors_overlap",
            {"file": "a", "name": "b", "before": [1, 2]},
            "a 已损坏：“b”与“[1, 2]”重叠。请重新下载。",
        ),
        ("prompt.template_not_filled", {"error": 0.5}, None),
    ],
)
@pytest.mark.skipif(shutil.which("node") is None, reason="the page's scripts are run by node")
def test_the_page_fills_values_in(code: str, values: dict[str, Any], said: str | None, tmp_path: Path) -> None:
    script = tmp_path / "say.mjs"
    script.write_text(
        "import { readFileSync } from 'node:fs';\n"
        f"const {{ chineseOf }} = await import({json.dumps((PAGE / 'error_words.js').as_uri())});\n"
        f"const zh = JSON.parse(readFileSync({json.dumps(str(PAGE / 'error_words_zh.json'))}, 'utf8'));\n"
        f"process.stdout.write(chineseOf(zh, {json.dumps({'code': code, 'values': values, 'text': ''})}));\n",
        encoding="utf-8",
    )
    done = subprocess.run(["node", str(script)], capture_output=True, check=True, encoding="utf-8")
    assert done.stdout == said if said is not None else "{}" in done.stdout
