"""The real server boots with the pack in its custom_nodes, and runs a prompt."""

from typing import Any

import pytest
from devtools.client import ComfyClient, ExecutionFailed, PromptRefused
from devtools.server import PACK_NAME, ComfyServer

NODES = (
    "QwenLowVRAMLoader",
    "QwenLowVRAMLoadLora",
    "QwenLowVRAMEncodePrompts",
    "QwenLowVRAMEncodeEditPrompt",
    "QwenLowVRAMSample",
    "QwenLowVRAMDecode",
    "QwenLowVRAMMemoryPlan",
    "QwenLowVRAMMemoryReport",
    "QwenLowVRAMWeightCache",
    "QwenLowVRAMBenchmark",
)


def white_image(width: int = 32) -> dict[str, Any]:
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": width, "height": 16, "batch_size": 1, "color": 0xFFFFFF}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "smoke"}},
    }


def test_the_pack_is_imported_without_error(comfy_server: ComfyServer, client: ComfyClient) -> None:
    lines = [line for line in comfy_server.boot_log.splitlines() if PACK_NAME in line]
    assert any("seconds" in line for line in lines)
    assert not [line for line in lines if "IMPORT FAILED" in line], comfy_server.boot_log[-4000:]
    assert "Traceback" not in comfy_server.boot_log


@pytest.mark.parametrize("node", NODES)
def test_every_node_is_registered(node: str, object_info: dict[str, Any]) -> None:
    assert object_info[node]["python_module"] == f"custom_nodes.{PACK_NAME}"


def test_a_prompt_runs_to_its_image(client: ComfyClient) -> None:
    seen: list[str] = []
    run = client.run(white_image(), on_event=lambda kind, data: seen.append(kind))
    assert client.image(run.images()[0]).startswith(b"\x89PNG")
    assert run.executed() == {"1", "2"}
    assert "execution_success" in seen


def test_a_refused_prompt_names_the_node_and_the_input(client: ComfyClient) -> None:
    with pytest.raises(PromptRefused, match=r"EmptyImage \(node 1\).*width"):
        client.run(white_image(width=-1))


def test_a_failing_node_reaches_the_client_with_its_message(client: ComfyClient, comfy_server: ComfyServer) -> None:
    (comfy_server.base / "input" / "broken.png").write_text("not an image")
    prompt = white_image() | {"1": {"class_type": "LoadImage", "inputs": {"image": "broken.png"}}}
    with pytest.raises(ExecutionFailed, match="LoadImage") as failure:
        client.run(prompt)
    assert failure.value.node_id == "1"
    assert failure.value.message
