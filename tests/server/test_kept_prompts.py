"""Prompts encoded before a restart of the real server need no weight of the text encoder after it."""

import io
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from devtools.cache import REPOSITORY
from devtools.client import ComfyClient
from devtools.server import PACK_NAME, ComfyServer
from PIL import Image
from small_checkpoint import write_split_files

from .graphs import WORKFLOWS, changed, with_inputs, workflow


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """A copy: another version of the code would encode again."""
    parts = shutil.ignore_patterns(".*", "tests", "miniature*", "benchmarks", "__pycache__")
    return Path(shutil.copytree(REPOSITORY, tmp_path / "pack" / PACK_NAME, ignore=parts))


def made_image(client: ComfyClient, prompt: dict[str, Any]) -> np.ndarray:
    (image,) = client.run(prompt).images()
    return np.asarray(Image.open(io.BytesIO(client.image(image))).convert("RGB")).astype(int)


def lose_weights(file: Path) -> None:
    """Overwrite every weight with zeros; name, size, time and header, which is what the loader looks at, stay."""
    stat = file.stat()
    with file.open("r+b") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        stream.seek(start)
        stream.write(bytes(stat.st_size - start))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_after_a_restart_a_known_prompt_reads_no_weight_of_the_encoder(
    comfyui_path: Path, full_pipeline: Path, pack: Path, tmp_path: Path
) -> None:
    server = ComfyServer(comfyui_path, tmp_path, cpu=True, pack=pack)
    names = write_split_files(full_pipeline, tmp_path / "models")
    prompts = tmp_path / "models" / "qwen_lowvram" / "prompts"
    with server:
        client = ComfyClient(server.url)
        prompt = workflow(
            WORKFLOWS[0],
            client.object_info(),
            {"transformer": names.transformer, "text_encoder": names.text_encoder, "vae": names.vae, "dtype": "fp32"},
            prompts={"positive": "a red circle", "negative": "blurry"},
            size={"width": 112, "height": 80, "batch_size": 1},
            sample={"seed": 5, "steps": 2},
        )
        expected = made_image(client, prompt)
        assert "prompts read from" not in server.log
        assert len(list(prompts.iterdir())) == 2
    lose_weights(tmp_path / "models" / "text_encoders" / names.text_encoder)
    with server:
        assert np.array_equal(made_image(client, prompt), expected)
        assert f"2 of 2 prompts read from {prompts}" in server.log
        # ComfyUI's own text nodes find the same entries
        texts = {"n7": "a red circle", "n8": "blurry"}
        nodes = {node: ("CLIPTextEncode", {"clip": ["1", 1], "text": text}) for node, text in texts.items()}
        own = with_inputs(changed(prompt, "2", **nodes), "4", positive=["7", 0], negative=["8", 0])
        assert np.array_equal(made_image(client, own), expected)
        # the weights are lost indeed: new prompts are all the same to the encoder
        red, blue = (
            made_image(client, with_inputs(prompt, "2", positive=f"a {word} square")) for word in ("red", "blue")
        )
        assert np.array_equal(red, blue)
        assert not np.array_equal(red, expected)
        assert "removed prompts: 4, " in client.post("/qwen_lowvram/clear", {"clear": "prompts"})["text"]
        assert list(prompts.iterdir()) == []
