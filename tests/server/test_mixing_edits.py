"""Images shown to our models by ComfyUI's own nodes: the latents of the same graph with ComfyUI's own loaders."""

from typing import Any

import pytest
from devtools.client import ExecutionFailed

from .conftest import SHARED, Mixing
from .graphs import Prompt, changed, with_inputs, with_our_loader
from .test_mixing import HEIGHT, NEGATIVE, PROMPT, WIDTH, graph

EDIT, EDIT_2509, EDIT_2511 = "Qwen-Image-Edit", "Qwen-Image-Edit-2509", "Qwen-Image-Edit-2511"
# whose patches are even in number, none longer than the first: ComfyUI places other ones otherwise than the reference
SHOWN = [(WIDTH, HEIGHT), (96, 64), (64, 96)]


def edit_graph(mixing: Mixing, variant: str, **sampler: Any) -> Prompt:
    """The graph on a file of that variant, with images 50 to 52."""
    images = [mixing.photo(f"shown{i}.png", *size, seed=i) for i, size in enumerate(SHOWN)]
    prompt = changed(
        graph(mixing, **sampler), **{f"n{50 + i}": ("LoadImage", {"image": name}) for i, name in enumerate(images)}
    )
    marked = mixing.files["2511" if variant == EDIT_2511 else "plain"]
    return with_inputs(prompt, "1", unet_name=marked.transformer)


def with_references(prompt: Prompt, count: int, method: str | None = None) -> Prompt:
    """Both conditions shown images 50 and on by ReferenceLatent."""
    nodes: dict[str, Any] = {}
    ends = ["4", "5"]
    for i in range(count):
        nodes[f"n{60 + i}"] = ("VAEEncode", {"pixels": [str(50 + i), 0], "vae": ["3", 0]})
        for which, end in enumerate(ends):
            name = f"{70 + 10 * which + i}"
            nodes[f"n{name}"] = ("ReferenceLatent", {"conditioning": [end, 0], "latent": [str(60 + i), 0]})
            ends[which] = name
    if method is not None:
        kind = "FluxKontextMultiReferenceLatentMethod"
        for which, end in enumerate(ends):
            inputs = {"conditioning": [end, 0], "reference_latents_method": method}
            nodes[f"n{90 + which}"] = (kind, inputs)
            ends[which] = f"{90 + which}"
    return with_inputs(changed(prompt, **nodes), "7", positive=[ends[0], 0], negative=[ends[1], 0])


METHODS = [
    *((EDIT_2509, method) for method in (None, "index", "offset", "uxo/uno")),
    *((EDIT_2511, method) for method in (None, "index", "offset", "uxo/uno", "index_timestep_zero")),
]


@pytest.mark.parametrize(("variant", "method"), METHODS, ids=str)
def test_references_count_as_they_do_for_comfyuis_model(mixing: Mixing, variant: str, method: str | None) -> None:
    prompt = with_references(edit_graph(mixing, variant), 3, method)
    mixing.assert_same(prompt, variant=variant)


def test_each_method_makes_something_else(mixing: Mixing) -> None:
    methods = ["index", "offset", "index_timestep_zero"]
    prompts = [with_references(edit_graph(mixing, EDIT_2511), 3, method) for method in methods]
    ours = [with_our_loader(prompt, replaced=SHARED, variant=EDIT_2511) for prompt in prompts]
    made = [mixing.latents(mixing.client.run(prompt)) for prompt in ours]
    for i, one in enumerate(made):
        for other in made[:i]:
            assert (one - other).abs().mean() > 1e-3


def test_a_method_that_a_model_has_not_learned_is_refused_with_the_way_out(mixing: Mixing) -> None:
    prompt = with_references(edit_graph(mixing, EDIT_2509), 1, "index_timestep_zero")
    with pytest.raises(ExecutionFailed, match=r"2511's reference method 'index_timestep_zero'(.|\n)*as variant"):
        mixing.client.run(with_our_loader(prompt, replaced=SHARED, variant=EDIT_2509))


@pytest.mark.parametrize(
    ("variant", "node", "name"),
    [(EDIT, "TextEncodeQwenImageEdit", "image"), (EDIT_2509, "TextEncodeQwenImageEditPlus", "image2")],
    ids=["first", "plus"],
)
def test_comfyuis_text_nodes_edit_as_they_do_with_its_own_models(
    mixing: Mixing, variant: str, node: str, name: str
) -> None:
    square = mixing.photo("square.png", 512, 512)
    prompt = changed(
        edit_graph(mixing, variant, steps=1, cfg=1.0, positive=["20", 0]),
        n20=(node, {"clip": ["2", 0], "vae": ["3", 0], "prompt": PROMPT, name: ["50", 0]}),
        n50=("LoadImage", {"image": square}),
        # the nodes encode images at that size
        n6=("EmptySD3LatentImage", {"width": 1024, "height": 1024, "batch_size": 1}),
    )
    mixing.assert_same(prompt, variant=variant)


@pytest.mark.parametrize("replaced", [SHARED, ("model",), ("clip",), ("vae",)], ids="+".join)
def test_our_prompts_condition_comfyuis_models_too(mixing: Mixing, replaced: tuple[str, ...]) -> None:
    prompts = {"clip": ["2", 0], "positive": PROMPT, "negative": NEGATIVE}
    prompt = graph(mixing, positive=["20", 0], negative=["20", 1])
    mixing.assert_same(changed(prompt, n20=("QwenLowVRAMEncodePrompts", prompts)), replaced=replaced)


@pytest.mark.parametrize(
    ("variant", "images", "replaced"),
    [
        *((variant, images, SHARED) for variant, images in ((EDIT, 1), (EDIT_2509, 1), (EDIT_2511, 3))),
        *((EDIT_2509, 3, (part,)) for part in SHARED),
    ],
    ids=str,
)
def test_our_edit_prompts_condition_comfyuis_models_too(
    mixing: Mixing, variant: str, images: int, replaced: tuple[str, ...]
) -> None:
    edit = {
        "clip": ["2", 0], "vae": ["3", 0], "positive": PROMPT, "negative": NEGATIVE, "megapixels": 0.0117,
        "width": 0, "height": 0, "batch_size": 1, "variant": variant,
        **{f"image{i + 1}": [str(50 + i), 0] for i in range(images)},
    }  # fmt: skip
    prompt = edit_graph(mixing, variant, positive=["20", 0], negative=["20", 1], latent_image=["20", 2])
    prompt = changed(prompt, n20=("QwenLowVRAMEncodeEditPrompt", edit))
    mixing.assert_same(prompt, replaced=replaced, variant=variant)
