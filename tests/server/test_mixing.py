"""Our models among ComfyUI's own nodes: the latents of the same graph with ComfyUI's own loaders."""

from typing import Any

import pytest

from .conftest import SHARED, Mixing
from .graphs import Prompt, changed, with_inputs

PROMPT, NEGATIVE, OTHER = "make the dog red", "blurry", "a cat in the rain"
WIDTH, HEIGHT = 128, 96
Node = tuple[str, dict[str, Any]]


def text(words: str) -> Node:
    return "CLIPTextEncode", {"clip": ["2", 0], "text": words}


def graph(mixing: Mixing, **sampler: Any) -> Prompt:
    """Loaders 1 to 3, prompts 4 and 5, empty latent 6, KSampler 7, its latents saved by 8."""
    files = mixing.files["plain"]
    sample = {
        "model": ["1", 0], "positive": ["4", 0], "negative": ["5", 0], "latent_image": ["6", 0], "seed": 5,
        "steps": 3, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
    }  # fmt: skip
    return changed(
        {},
        n1=("UNETLoader", {"unet_name": files.transformer, "weight_dtype": "default"}),
        n2=("CLIPLoader", {"clip_name": files.text_encoder, "type": "qwen_image"}),
        n3=("VAELoader", {"vae_name": files.vae}),
        n4=text(PROMPT),
        n5=text(NEGATIVE),
        n6=("EmptySD3LatentImage", {"width": WIDTH, "height": HEIGHT, "batch_size": 1}),
        n7=("KSampler", sample | sampler),
        n8=("SaveLatent", {"samples": ["7", 0], "filename_prefix": "mixing"}),
    )


def differs(mixing: Mixing, one: Prompt, other: Prompt) -> bool:
    """Whether ComfyUI's own models make something else of the second graph."""
    first, second = (mixing.latents(mixing.client.run(prompt)) for prompt in (one, other))
    return bool((first - second).abs().mean() > 1e-3)


@pytest.mark.parametrize("replaced", [SHARED, ("model",), ("clip",), ("vae", "model")], ids="+".join)
def test_loaders_may_be_mixed(mixing: Mixing, replaced: tuple[str, ...]) -> None:
    mixing.assert_same(graph(mixing), replaced=replaced)


def test_sides_of_odd_counts_of_patches_are_comfyuis_own(mixing: Mixing) -> None:
    odd = {"width": 112, "height": 176, "batch_size": 1}  # 7 x 11 patches
    mixing.assert_same(changed(graph(mixing), n6=("EmptySD3LatentImage", odd)))


def test_a_token_that_ends_texts_is_a_token_to_us_and_the_end_to_comfyui(mixing: Mixing) -> None:
    ours, theirs = mixing.both(changed(graph(mixing), n4=text(f"{PROMPT}<|endoftext|>{OTHER}")))
    assert (ours - theirs).abs().mean() > 1e-3  # said in the README; ours is diffusers' (tests of the text encoder)


CACHE = {"reuse_threshold": 2.0, "start_percent": 0.1, "end_percent": 0.95, "verbose": False}
WINDOWS = {
    "context_length": 8, "context_overlap": 4, "context_schedule": "standard_static", "context_stride": 1,
    "closed_loop": False, "fuse_method": "pyramid", "freenoise": False, "cond_retain_index_list": "",
    "split_conds_to_windows": False, "latent_retain_index_list": "", "causal_window_fix": False,
}  # fmt: skip
PATCHES: dict[str, Node] = {
    "ModelSamplingAuraFlow": ("ModelSamplingAuraFlow", {"shift": 3.1}),
    "ModelSamplingSD3": ("ModelSamplingSD3", {"shift": 5.0}),
    "CFGNorm": ("CFGNorm", {"strength": 1.0, "pre_cfg": False}),
    "CFGZeroStar": ("CFGZeroStar", {}),
    "RescaleCFG": ("RescaleCFG", {"multiplier": 0.7}),
    "RenormCFG": ("RenormCFG", {"cfg_trunc": 100.0, "renorm_cfg": 0.5}),
    "TCFG": ("TCFG", {}),
    "APG": ("APG", {"eta": 1.0, "norm_threshold": 5.0, "momentum": 0.5}),
    "Mahiro": ("Mahiro", {}),
    "FreSca": ("FreSca", {"scale_low": 1.0, "scale_high": 1.5, "freq_cutoff": 4}),
    "EpsilonScaling": ("Epsilon Scaling", {"scaling_factor": 1.1}),
    "TemporalScoreRescaling": ("TemporalScoreRescaling", {"tsr_k": 0.8, "tsr_sigma": 1.0}),
    "PerpNeg": ("PerpNeg", {"empty_conditioning": ["30", 0], "neg_scale": 1.0}),
    "EasyCache": ("EasyCache", CACHE),
    "LazyCache": ("LazyCache", CACHE),
    "windows of height": ("ContextWindowsManual", WINDOWS | {"dim": 3}),
    "windows of width": ("ContextWindowsManual", WINDOWS | {"dim": 4, "fuse_method": "flat"}),
}


@pytest.mark.parametrize("name", PATCHES)
def test_a_patched_model_is_that_of_comfyui(mixing: Mixing, name: str) -> None:
    kind, inputs = PATCHES[name]
    plain = graph(mixing, steps=6)
    patched = changed(plain, n20=(kind, {"model": ["1", 0], **inputs}), n30=text(OTHER))
    patched = with_inputs(patched, "7", model=["20", 0])
    mixing.assert_same(patched, replaced=("model",))
    assert differs(mixing, plain, patched)


def advanced(prompt: Prompt, guider: Node, sampler: str = "euler", scheduler: str = "simple") -> Prompt:
    """With SamplerCustomAdvanced in the place of KSampler."""
    kind, inputs = guider
    parts = {name: [node, 0] for name, node in (("noise", "40"), ("guider", "41"), ("sampler", "42"), ("sigmas", "43"))}
    return changed(
        prompt,
        n7=("SamplerCustomAdvanced", {**parts, "latent_image": ["6", 0]}),
        n30=text(OTHER),
        n40=("RandomNoise", {"noise_seed": 5}),
        n41=(kind, {"model": ["1", 0], **inputs}),
        n42=("KSamplerSelect", {"sampler_name": sampler}),
        n43=("BasicScheduler", {"model": ["1", 0], "scheduler": scheduler, "steps": 4, "denoise": 1.0}),
    )


POSITIVE, UNWANTED, THIRD = {"positive": ["4", 0]}, {"negative": ["5", 0]}, {"empty_conditioning": ["30", 0]}
DUAL = {"cond1": ["4", 0], "cond2": ["30", 0], "cfg_conds": 3.0, "cfg_cond2_negative": 2.0} | UNWANTED
GUIDERS: dict[str, Node] = {
    "BasicGuider": ("BasicGuider", {"conditioning": ["4", 0]}),
    "CFGGuider": ("CFGGuider", POSITIVE | UNWANTED | {"cfg": 4.0}),
    "CFGGuider without guidance": ("CFGGuider", POSITIVE | UNWANTED | {"cfg": 1.0}),
    "DualCFGGuider": ("DualCFGGuider", DUAL | {"style": "regular"}),
    "DualCFGGuider, nested": ("DualCFGGuider", DUAL | {"style": "nested"}),
    "PerpNegGuider": ("PerpNegGuider", POSITIVE | UNWANTED | THIRD | {"cfg": 4.0, "neg_scale": 1.0}),
}


@pytest.mark.parametrize("name", GUIDERS)
def test_a_guider_guides_as_it_does_comfyuis_model(mixing: Mixing, name: str) -> None:
    mixing.assert_same(advanced(graph(mixing), GUIDERS[name]), replaced=("model",))


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2m", "dpmpp_2m_sde", "uni_pc", "res_multistep", "er_sde"])
@pytest.mark.parametrize("scheduler", ["beta"])
def test_samplers_sample_as_they_do_comfyuis_model(mixing: Mixing, sampler: str, scheduler: str) -> None:
    mixing.assert_same(advanced(graph(mixing), GUIDERS["CFGGuider"], sampler, scheduler), replaced=("model",))


CONDITIONS: dict[str, Node] = {
    "combined": ("ConditioningCombine", {"conditioning_1": ["4", 0], "conditioning_2": ["30", 0]}),
    "concatenated": ("ConditioningConcat", {"conditioning_to": ["4", 0], "conditioning_from": ["30", 0]}),
    "averaged": (
        "ConditioningAverage",
        {"conditioning_to": ["4", 0], "conditioning_from": ["30", 0], "conditioning_to_strength": 0.6},
    ),
    "zeroed": ("ConditioningZeroOut", {"conditioning": ["4", 0]}),
    "area and all": ("ConditioningCombine", {"conditioning_1": ["4", 0], "conditioning_2": ["31", 0]}),
    "odd area and all": ("ConditioningCombine", {"conditioning_1": ["4", 0], "conditioning_2": ["32", 0]}),
    "mask and all": ("ConditioningCombine", {"conditioning_1": ["4", 0], "conditioning_2": ["34", 0]}),
    "one after the other": ("ConditioningCombine", {"conditioning_1": ["35", 0], "conditioning_2": ["36", 0]}),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_conditions_count_where_and_when_they_do_for_comfyuis_model(mixing: Mixing, name: str) -> None:
    other = {"conditioning": ["30", 0]}
    area = {"strength": 0.8, "x": 32, "y": 16}
    prompt = changed(
        graph(mixing, positive=["20", 0], steps=4),
        n20=CONDITIONS[name],
        n30=text(OTHER),
        n31=("ConditioningSetArea", other | area | {"width": 64, "height": 64}),
        n32=("ConditioningSetArea", other | area | {"y": 8, "width": 88, "height": 88}),
        n34=("ConditioningSetMask", other | {"mask": ["37", 0], "strength": 1.0, "set_cond_area": "default"}),
        n35=("ConditioningSetTimestepRange", {"conditioning": ["4", 0], "start": 0.0, "end": 0.5}),
        n36=("ConditioningSetTimestepRange", other | {"start": 0.5, "end": 1.0}),
        n37=("SolidMask", {"value": 1.0, "width": 64, "height": 96}),
    )
    mixing.assert_same(prompt)


def from_photo(mixing: Mixing, width: int = WIDTH, height: int = HEIGHT, **sampler: Any) -> Prompt:
    """Picture 50, encoded 51, is what the sampler begins with."""
    photo = mixing.photo(f"mixing-{width}x{height}.png", width, height)
    return changed(
        graph(mixing, latent_image=["51", 0], **sampler),
        n50=("LoadImage", {"image": photo}),
        n51=("VAEEncode", {"pixels": ["50", 0], "vae": ["3", 0]}),
    )


def test_an_image_changed_by_six_tenths_is_that_of_comfyui(mixing: Mixing) -> None:
    mixing.assert_same(from_photo(mixing, denoise=0.6))


@pytest.mark.parametrize("by_degrees", [False, True], ids=["mask", "differential diffusion"])
def test_a_part_painted_anew_is_that_of_comfyui(mixing: Mixing, by_degrees: bool) -> None:
    prompt = changed(
        from_photo(mixing, denoise=0.8, model=["54" if by_degrees else "1", 0]),
        n52=("SolidMask", {"value": 0.6, "width": WIDTH // 2, "height": HEIGHT}),
        n53=("SetLatentNoiseMask", {"samples": ["51", 0], "mask": ["52", 0]}),
        n54=("DifferentialDiffusion", {"model": ["1", 0], "strength": 1.0}),
    )
    mixing.assert_same(with_inputs(prompt, "7", latent_image=["53", 0]))


def test_a_batch_of_other_latents_is_that_of_comfyui(mixing: Mixing) -> None:
    prompt = changed(
        from_photo(mixing, denoise=0.7),
        n52=("RepeatLatentBatch", {"samples": ["51", 0], "amount": 2}),
        n53=("LatentBatch", {"samples1": ["51", 0], "samples2": ["52", 0]}),
    )
    mixing.assert_same(with_inputs(prompt, "7", latent_image=["53", 0]))
