"""What a graph is about to make is read from it before it runs: our nodes, ComfyUI's own, nonsense."""

import json
import random
from typing import Any

import pytest
from qwenimage_lowvram.nodes.graph_runs import GraphRun, runs_of

LOADER = {"transformer": "a.safetensors", "vram_limit_gb": 3.0}


def of(prompt: dict[str, tuple[str, dict[str, Any]]], size: tuple[int, int] | None = None) -> list[GraphRun]:
    return runs_of(
        {node: {"class_type": kind, "inputs": inputs} for node, (kind, inputs) in prompt.items()}, lambda _: size
    )


def graph(**changed: Any) -> dict[str, tuple[str, dict[str, Any]]]:
    sample = {"model": ["1", 0], "positive": ["2", 0], "negative": ["2", 1], "latent_image": ["3", 0]}
    nodes = {
        "1": ("QwenLowVRAMLoader", LOADER),
        "2": ("QwenLowVRAMEncodePrompts", {"clip": ["1", 1], "positive": "a cat", "negative": " "}),
        "3": ("EmptySD3LatentImage", {"width": 1328, "height": 800, "batch_size": 2}),
        "4": ("QwenLowVRAMSample", {**sample, "steps": 20, "cfg": 4.0, "preset": "as set"}),
    }
    return nodes | {name.removeprefix("n"): node for name, node in changed.items()}


def test_size_batch_steps_and_guidance_are_those_of_the_widgets() -> None:
    (run,) = of(graph())
    assert (run.loader, run.sampler, run.settings) == ("1", "4", LOADER)
    assert (run.size, run.batch, run.steps, run.guided) == ((1328, 800), 2, 20, True)
    assert (run.images, run.layers, run.loras, run.uncounted) == (0, 0, (), ())


@pytest.mark.parametrize(("preset", "steps"), [("Lightning, 4 steps", 4), ("2.1-Turbo, 8 steps", 8)])
def test_a_preset_comes_before_the_widgets(preset: str, steps: int) -> None:
    kind, inputs = graph()["4"]
    (run,) = of(graph(n4=(kind, {**inputs, "preset": preset})))
    assert (run.steps, run.guided) == (steps, False)


def test_loras_patches_and_controlnets_on_the_way_are_named() -> None:
    kind, inputs = graph()["4"]
    nodes = graph(
        n5=("QwenLowVRAMLoadLora", {"model": ["1", 0], "lora_name": "a.safetensors", "strength": 1.0}),
        n6=("LoraLoaderModelOnly", {"model": ["5", 0], "lora_name": "b.safetensors", "strength_model": 1.0}),
        n7=("QwenImageDiffsynthControlnet", {"model": ["6", 0], "model_patch": ["9", 0]}),
        n8=("ControlNetApplyAdvanced", {"positive": ["2", 0], "negative": ["2", 1], "control_net": ["9", 0]}),
        n9=("ControlNetLoader", {}),
        n4=(kind, {**inputs, "model": ["7", 0], "positive": ["8", 0]}),
    )
    (run,) = of(nodes)
    assert set(run.loras) == {"a.safetensors", "b.safetensors"}
    assert (run.controlnets, run.patches, run.uncounted) == ((), (), ("ControlNet", "model patch"))
    nodes["9"][1].update(control_net_name="union.safetensors", name="canny.safetensors")
    nodes["10"] = ("SetUnionControlNetType", {"control_net": ["9", 0], "type": "auto"})
    nodes["8"][1]["control_net"] = ["10", 0]
    (run,) = of(nodes)
    assert (run.controlnets, run.patches, run.uncounted) == (("union.safetensors",), ("canny.safetensors",), ())
    nodes["8"][1]["strength"] = 0.0
    (run,) = of(nodes)
    assert run.controlnets == ()
    nodes["6"][1]["strength_model"] = 0.0
    (run,) = of(nodes)
    assert run.loras == ("a.safetensors",)


def test_a_sampler_with_a_guider_is_read_as_one_with_widgets() -> None:
    nodes = graph(
        n4=("SamplerCustomAdvanced", {"guider": ["5", 0], "sigmas": ["6", 0], "latent_image": ["3", 0]}),
        n5=("CFGGuider", {"model": ["1", 0], "positive": ["2", 0], "negative": ["2", 1], "cfg": 1.0}),
        n6=("ManualSigmas", {"sigmas": "1.0, 0.75, 0.5, 0.25, 0"}),
    )
    (run,) = of(nodes)
    assert (run.steps, run.guided, run.size) == (4, False, (1328, 800))


def test_a_lora_loader_that_names_its_files_otherwise_is_said_not_to_be_counted() -> None:
    loader = {"model": ["1", 0], "lora_1": {"on": True, "lora": "a.safetensors", "strength": 1.0}}
    sample = {"model": ["9", 0], "positive": ["2", 0], "negative": ["2", 1], "latent_image": ["3", 0]}
    (run,) = of(graph(n9=("Power Lora Loader (rgthree)", loader), n4=("QwenLowVRAMSample", sample)))
    assert (run.loras, run.uncounted) == ((), ("LoRA",))


@pytest.mark.parametrize(
    ("guider", "guided", "certain"),
    [
        (("BasicGuider", {}), False, True),
        (("CFGGuider", {"cfg": 1}), False, True),
        (("CFGGuider", {"cfg": ["7", 0]}), True, False),
        (("DualCFGGuider", {"cfg_conds": 1.0, "cfg_cond2_negative": 4.0}), True, True),
    ],
    ids=str,
)
def test_guidance_that_is_not_known_is_planned_for_and_refuses_nothing(
    guider: tuple[str, dict[str, Any]], guided: bool, certain: bool
) -> None:
    kind, inputs = guider
    nodes = graph(
        n4=("SamplerCustomAdvanced", {"guider": ["5", 0], "sigmas": ["6", 0], "latent_image": ["3", 0]}),
        n5=(kind, {"model": ["1", 0], "conditioning": ["2", 0], **inputs}),
        n6=("ManualSigmas", {"sigmas": "1.0, 0"}),
        n7=("SomebodysNumber", {}),
    )
    (run,) = of(nodes)
    assert (run.guided, run.exact) == (guided, certain)


@pytest.mark.parametrize("megapixels", [float("inf"), 10**400])
def test_a_size_that_no_image_has_is_no_error(megapixels: float) -> None:
    edit = {"image1": ["5", 0], "megapixels": megapixels}
    nodes = graph(n3=("QwenLowVRAMEncodeEditPrompt", edit), n5=("LoadImage", {"image": "a.png"}))
    (run,) = of(nodes, (640, 480))
    assert run.size == (640, 480)


def test_an_edit_has_the_size_and_the_number_of_its_images() -> None:
    edit = {"clip": ["1", 1], "vae": ["1", 2], "megapixels": 1.0, "width": 0, "height": 0, "batch_size": 1}
    edit |= {"image1": ["8", 0], "image2": ["8", 0], "positive": "x" * 600, "negative": ""}
    kind, inputs = graph()["4"]
    nodes = graph(
        n2=("QwenLowVRAMEncodeEditPrompt", edit),
        n8=("LoadImage", {"image": "cat.png"}),
        n4=(kind, {**inputs, "latent_image": ["2", 2]}),
    )
    (run,) = of(nodes, (4000, 1000))
    assert (run.images, run.size, run.batch) == (2, (2048, 512), 1)
    assert run.prompt_tokens > 200
    (unknown,) = of(nodes)
    assert unknown.size is None


def test_the_latent_of_an_image_that_is_scaled_and_repeated() -> None:
    kind, inputs = graph()["4"]
    nodes = graph(
        n8=("LoadImage", {"image": "cat.png"}),
        n9=("ImageScaleToTotalPixels", {"image": ["8", 0], "megapixels": 0.25}),
        n10=("VAEEncode", {"pixels": ["9", 0], "vae": ["1", 2]}),
        n11=("RepeatLatentBatch", {"samples": ["10", 0], "amount": 3}),
        n3=("SetLatentNoiseMask", {"samples": ["11", 0], "mask": ["8", 1]}),
        n4=(kind, inputs),
    )
    (run,) = of(nodes, (2000, 2000))
    assert (run.size, run.batch) == ((512, 512), 3)


def test_the_latent_of_an_images_size() -> None:
    nodes = graph(
        n8=("LoadImage", {"image": "cat.png"}),
        n9=("GetImageSize", {"image": ["8", 0]}),
        n3=("EmptyQwenImageLayeredLatentImage", {"width": ["9", 0], "height": ["9", 1], "layers": 3, "batch_size": 1}),
    )
    (run,) = of(nodes, (640, 480))
    assert (run.size, run.layers) == ((640, 480), 3)


def test_a_batch_that_another_node_may_change_is_not_known_for_sure() -> None:
    cut = ("LatentFromBatch", {"samples": ["3", 0], "batch_index": 0, "length": 1})
    kind, inputs = graph()["4"]
    (run,) = of(graph(n9=cut, n4=(kind, {**inputs, "latent_image": ["9", 0]})))
    assert (run.size, run.exact) == ((1328, 800), False)
    assert of(graph())[0].exact


def test_another_loaders_sampler_is_none_of_ours() -> None:
    assert of(graph(n1=("UNETLoader", {"unet_name": "a.safetensors"}))) == []


@pytest.mark.parametrize("seed", range(40))
def test_nonsense_is_no_error(seed: int) -> None:
    rng = random.Random(seed)
    nodes = json.loads(json.dumps({n: {"class_type": k, "inputs": i} for n, (k, i) in graph().items()}))
    for node in nodes.values():
        for name in list(node["inputs"]):
            if rng.random() < 0.4:
                node["inputs"][name] = rng.choice(
                    [None, [], ["99", 0], ["4", 0], [["1"], 0], {}, "", -1, 1e400, 10**400, "ä" * 9, True]
                )
    if rng.random() < 0.3:
        nodes["2"] = {"class_type": None, "inputs": None}
    for run in runs_of(nodes, lambda _: None):
        assert run.batch >= 1
        assert run.steps >= 1
