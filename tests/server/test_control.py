"""ControlNet graphs through a real server: with ComfyUI's own loaders, and with ours in their place."""

from collections.abc import Callable

import pytest
from devtools.client import ExecutionFailed

from .conftest import SHARED, TOLERANCE, Mixing
from .graphs import Prompt, changed, with_inputs, with_our_loader
from .test_mixing import graph

POSITIVE, NEGATIVE = ["9", 0], ["9", 1]


def uncontrolled(controls: Mixing) -> Prompt:
    """The image to control with is 11."""
    prompt = with_inputs(graph(controls), "6", batch_size=2)
    return changed(prompt, n11=("LoadImage", {"image": "control.png"}))


def with_net(prompt: Prompt, file: str, apply: str = "ControlNetApplyAdvanced", **inputs: object) -> Prompt:
    """Conditions 9 and ControlNet 10 before the sampler."""
    control = {
        "positive": ["4", 0], "negative": ["5", 0], "control_net": ["10", 0], "image": ["11", 0], "strength": 0.8,
        "start_percent": 0.0, "end_percent": 0.9, "vae": ["3", 0],
    }  # fmt: skip
    nodes = {"n9": (apply, control | inputs), "n10": ("ControlNetLoader", {"control_net_name": file})}
    return with_inputs(changed(prompt, **nodes), "7", positive=POSITIVE, negative=NEGATIVE)


def with_diffsynth(prompt: Prompt) -> Prompt:
    patch = {"model": ["1", 0], "model_patch": ["10", 0], "vae": ["3", 0], "image": ["11", 0], "strength": 0.7}
    nodes = {
        "n9": ("QwenImageDiffsynthControlnet", patch),
        "n10": ("ModelPatchLoader", {"name": "canny.safetensors"}),
    }
    return with_inputs(changed(prompt, **nodes), "7", model=["9", 0])


INPAINTING = "ControlNetInpaintingAliMamaApply"
CHANGES: dict[str, Callable[[Prompt], Prompt]] = {
    "union": lambda prompt: with_net(prompt, "union.safetensors"),
    "inpainting": lambda prompt: with_net(prompt, "inpaint.safetensors", INPAINTING, mask=["11", 1]),
    "fun": lambda prompt: with_net(prompt, "fun.safetensors"),
    "diffsynth": with_diffsynth,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_controlled_graph_has_the_latents_of_comfyuis_own_loaders(change: str, controls: Mixing) -> None:
    plain = uncontrolled(controls)
    made, wanted = controls.both(CHANGES[change](plain))
    report = controls.server.log.split("MemoryReport: ")[-1]
    assert wanted.std() > 0.5
    assert (made - wanted).abs().max() < TOLERANCE
    assert (made - controls.latents(controls.client.run(with_our_loader(plain, replaced=SHARED)))).abs().max() > 0.01
    assert "ControlNets and model patches" in report
    assert "one after another" not in report


def test_a_controlnet_that_does_not_fit_is_refused_in_the_graph(controls: Mixing) -> None:
    prompt = with_our_loader(CHANGES["union"](uncontrolled(controls)), replaced=SHARED)
    with pytest.raises(ExecutionFailed, match="no ControlNet and no model patch"):
        controls.client.run(with_inputs(prompt, "ours", vram_limit_gb=0.01))
