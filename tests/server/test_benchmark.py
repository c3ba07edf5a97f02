"""The Benchmark node through the real server: the loader's model is measured, and no file is named."""

import json
from typing import Any

from devtools.client import ComfyClient
from small_checkpoint import SplitFiles


def test_a_model_is_measured(client: ComfyClient, object_info: Any, split_files: dict[str, SplitFiles]) -> None:
    names = split_files["bf16"]
    files = {"transformer": names.transformer, "text_encoder": names.text_encoder, "vae": names.vae}
    specs = {name: spec for group in object_info["QwenLowVRAMLoader"]["input"].values() for name, spec in group.items()}
    loader = {name: spec[1]["default"] for name, spec in specs.items() if "default" in (spec[1:] or [{}])[0]}
    prompt = {
        "1": {"class_type": "QwenLowVRAMLoader", "inputs": {**loader, **files}},
        "2": {"class_type": "QwenLowVRAMBenchmark", "inputs": {"model": ["1", 0], "width": 64, "height": 32}},
    }
    events: list[dict[str, Any]] = []
    run = client.run(prompt, on_event=lambda kind, data: events.append({"kind": kind, **data}))
    text = "\n".join(run.outputs["2"]["text"])
    line, _, numbers = text.split("\n", 2)
    values = json.loads(numbers)
    assert values["line"] == line
    assert values["run"]["done_steps"] == 2
    assert values["rates"]["disk_bytes"] > 0
    assert not [file for file in files.values() if file in text]
    stages = {event["stage"] for event in events if event["kind"] == "qwen_lowvram.progress"}
    assert {"measuring", "sampling"} <= stages
