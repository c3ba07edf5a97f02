"""`python dev.py demo`: the bundled 4 GB workflow on a real server, to the image."""

import argparse
import json
import logging
import os
import sys
import time
import webbrowser
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from .cache import REPOSITORY, SetupError, cache_folder
from .client import ComfyClient, ExecutionFailed, PromptRefused, Run
from .comfyui import require_comfyui
from .demo_model import DemoModel, choose_model
from .server import ComfyServer, ServerFailed, prepare_base
from .workflow import choices, set_widgets, to_prompt

LOADER, ENCODE, SAMPLE = "QwenLowVRAMLoader", "QwenLowVRAMEncodePrompts", "QwenLowVRAMSample"
REPORT_KEY = "qwen_lowvram_report"
PROGRESS_EVENT = "qwen_lowvram.progress"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="dev.py demo")
    parser.add_argument(
        "--model", type=Path, help="a pipeline folder, or a transformer file in ComfyUI's models folder"
    )
    parser.add_argument("--ui", action="store_true", help="open the page instead, until Ctrl-C")
    options = parser.parse_args(arguments)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns while diffusers imports it
    try:
        show(options.model, ui=options.ui)
    except (SetupError, ServerFailed, PromptRefused, ExecutionFailed) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


def show(model_path: Path | None, *, ui: bool) -> None:
    """Serve the workflow with one model; run it, or leave it to the person."""
    base = cache_folder() / "demo"
    prepare_base(base)
    for old_log in base.glob("comfyui-*.log"):
        old_log.unlink()
    model = choose_model(model_path, base)
    print(f"Model: {model.title}", flush=True)
    device = _device()
    cpu = device == "cpu"
    print(f"Starting ComfyUI on the {'CPU' if cpu else 'GPU'} ...", flush=True)
    with ComfyServer(require_comfyui(), base, cpu=cpu, arguments=model.server_arguments) as server:
        client = ComfyClient(server.url)
        object_info = client.object_info()
        if LOADER not in object_info:
            raise ServerFailed(
                f"ComfyUI could not import the pack. Its log, {server.log_file}, ends:\n{server.log[-4000:]}"
            )
        graph = adapt(bundled_workflow(), object_info, model)
        if ui:
            _wait_in_page(server, graph)
            return
        prompt = to_prompt(graph, object_info)
        run = client.run(prompt, on_event=ProgressPrinter(), timeout_seconds=24 * 3600)
        image = _image_path(base, run)
    print(f"\nThe image, after {run.seconds:.1f} s: {image}")
    for report in run.ui(REPORT_KEY):
        print(f"\nMemory report\n{format_report(report)}")
    if model.folder is not None and model.compare:
        _compare(model, model.folder, prompt, image, device)


def bundled_workflow() -> dict[str, Any]:
    files = sorted((REPOSITORY / "workflows").glob("*4 GB*.json"))
    if not files:
        raise SetupError(f"{REPOSITORY / 'workflows'} has no workflow with '4 GB' in its name.")
    graph: dict[str, Any] = json.loads(files[0].read_text(encoding="utf-8"))
    return graph


def adapt(graph: dict[str, Any], object_info: dict[str, Any], model: DemoModel) -> dict[str, Any]:
    """The graph with its model names exchanged, and for small models also size, steps and prompt."""
    names = {"transformer": model.transformer}
    for name, part in (("text_encoder", "qwen_2.5_vl"), ("vae", "qwen_image_vae")):
        names[name] = _pick(choices(object_info, LOADER, name), "from the" if model.folder else part, name)
    graph = set_widgets(graph, object_info, LOADER, **names, **model.loader_inputs)
    for class_type, values in model.other_inputs.items():
        graph = set_widgets(graph, object_info, class_type, **values)
    return graph


class ProgressPrinter:
    """Prints one line for a step, rewritten block by block where the output is a terminal."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._last: tuple[Any, Any] | None = None

    def __call__(self, kind: str, data: dict[str, Any]) -> None:
        if kind != PROGRESS_EVENT:
            return
        stage = (data.get("stage"), data.get("step"))
        text = f"  {data.get('stage')}: step {data.get('step')}/{data.get('steps')}, "
        text += f"block {data.get('block')}/{data.get('blocks')}, {data.get('seconds_per_step') or 0:.2f} s/step"
        for name, key in (("VRAM", "vram_bytes"), ("RAM", "ram_bytes")):
            if data.get(key) is not None:
                text += f", {name} {data[key] / 1e9:.2f} GB"
        if self._live:
            print(f"\r{text:<100}", end="", flush=True)
        elif stage != self._last:
            print(text, flush=True)
        self._last = stage


def format_report(report: Any) -> str:
    """The report's own text, else its entries one below the other, bytes as GB."""
    if not isinstance(report, dict):
        return str(report)
    if "text" in report:
        return str(report["text"])
    width = max((len(key) for key in report), default=0)
    lines = []
    for key, value in report.items():
        if key.endswith("_bytes") and isinstance(value, int):
            key, value = key.removesuffix("_bytes"), f"{value / 1e9:.3f} GB"
        elif isinstance(value, float):
            value = f"{value:.3f}"
        lines.append(f"  {key.replace('_', ' '):<{width}}  {value}".replace("\n", f"\n{' ' * (width + 4)}"))
    return "\n".join(lines)


def _pick(offered: list[str], part: str, name: str) -> str:
    for choice in offered:
        if part in choice.lower():
            return choice
    raise SetupError(f"The loader offers no {name} with {part!r} in its name. There are: {', '.join(offered)}.")


def _image_path(base: Path, run: Run) -> Path:
    images = [image for image in run.images() if image["type"] == "output"]
    if not images:
        raise ServerFailed("The workflow ran but saved no image.")
    return base / "output" / images[0]["subfolder"] / images[0]["filename"]


def _wait_in_page(server: ComfyServer, graph: dict[str, Any]) -> None:
    user = server.base / "user" / "default"
    (user / "workflows").mkdir(parents=True, exist_ok=True)
    (user / "workflows" / "Qwen-Image demo.json").write_text(json.dumps(graph), encoding="utf-8")
    print(
        f"{server.url}\nOpen 'Qwen-Image demo' from Workflows (press W) and press Run. Ctrl-C ends the server.",
        flush=True,
    )
    webbrowser.open(server.url)
    try:
        while server.running:
            time.sleep(0.5)
    except KeyboardInterrupt:
        print()


def _compare(model: DemoModel, folder: Path, prompt: dict[str, Any], image: Path, device: str) -> None:
    """Make the image without the server, by diffusers' own pipeline and by our engine alone, on the same folder and
    inputs, and print how far each is from the server's."""
    from .reference import Inputs, difference, diffusers_image, engine_image

    if not model.trained:
        print("\nThe weights are random: noise is what the image should show.")
    widgets = {node["class_type"]: node["inputs"] for node in prompt.values()}
    inputs = Inputs(
        prompt=widgets[ENCODE]["positive"],
        negative_prompt=widgets[ENCODE]["negative"],
        size=(widgets["EmptySD3LatentImage"]["width"], widgets["EmptySD3LatentImage"]["height"]),
        seed=widgets[SAMPLE]["seed"],
        steps=widgets[SAMPLE]["steps"],
        cfg=widgets[SAMPLE]["cfg"],
    )
    print("Running diffusers' QwenImagePipeline on the same weights and inputs ...", flush=True)
    print(f"Largest difference from it: {difference(image, diffusers_image(folder, inputs, device))}/255")
    print("Running the engine on them without ComfyUI ...", flush=True)
    print(f"Largest difference from it: {difference(image, engine_image(folder, inputs, device))}/255")


def _device() -> str:
    """torch's name of the device that ComfyUI will use."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "xpu" if torch.xpu.is_available() else "cpu"
