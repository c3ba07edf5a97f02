"""On a Chinese page the titles in the bundled workflows are Chinese, and on another page they are English again."""

import copy
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import page_words
import pytest

WORKFLOWS = sorted((page_words.SHARED.parents[1] / "workflows").glob("*.json"))
SCRIPT = """
import { readFileSync } from "node:fs";
const { retitle } = await import(process.argv[1]);
const told = JSON.parse(readFileSync(0, "utf8")).map((graph) => {
  retitle(graph, true);
  const chinese = structuredClone(graph);
  retitle(graph, false);
  return [chinese, graph];
});
process.stdout.write(JSON.stringify(told));
"""


def titles(graph: dict[str, Any]) -> set[str]:
    inside = (graph.get("definitions") or {}).get("subgraphs", [])
    found = {subgraph["name"] for subgraph in inside}
    for each in (graph, *inside):
        found |= {group["title"] for group in each.get("groups") or ()}
        found |= {node["title"] for node in each["nodes"] if "title" in node}
    return found


@pytest.mark.skipif(not page_words.HAS_NODE, reason="the page's scripts are run by node")
def test_titles_of_every_workflow_are_told_in_chinese_and_back() -> None:
    graphs = [json.loads(Path(file).read_text(encoding="utf-8")) for file in WORKFLOWS]
    command = ["node", "--input-type=module", "-e", SCRIPT, (page_words.SHARED / "title_words.js").as_uri()]
    done = subprocess.run(command, input=json.dumps(graphs), capture_output=True, check=True, encoding="utf-8")
    assert len(graphs) > 20
    for graph, (chinese, english) in zip(graphs, json.loads(done.stdout), strict=True):
        assert english == graph
        assert titles(graph)
        assert [title for title in titles(chinese) if re.search("[a-zA-Z]", title)] == []
        assert without_titles(chinese) == without_titles(graph)


def without_titles(graph: dict[str, Any]) -> dict[str, Any]:
    rest = copy.deepcopy(graph)
    inside = (rest.get("definitions") or {}).get("subgraphs", [])
    for subgraph in inside:
        del subgraph["name"]
    for each in (rest, *inside):
        for titled in (*(each.get("groups") or ()), *each["nodes"]):
            titled.pop("title", None)
    return rest
