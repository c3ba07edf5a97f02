"""Say in words what a graph asks of our models that they do not do; nothing is silently ignored."""

from collections.abc import Sequence
from enum import Enum
from typing import Any, NoReturn

import comfy.hooks
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...engine.errors import InvalidRequest, Unsupported
from ...engine.log import logger
from ...engine.models.qwen_image.latents import LATENT_PX, PATCH
from ...engine.models.qwen_image.variants import Variant
from ...engine.texts import printable
from ...engine.told import Told
from ..display_names import ENCODE_EDIT, LOADER
from .easycache import is_easycache
from .error_events import errors_sent
from .progress import warn

# in a condition: its text was encoded for an editing model on purpose without an image
NO_IMAGES_KEY = "qwen_lowvram_no_pictures"


@errors_sent()
def refuse(what: str, instead: str, *, code: str, **values: Any) -> NoReturn:
    """Raise Unsupported in the pack's standard words, in which {loader} may stand as well as the values."""
    raise Unsupported(
        f"{what} does not work with models from '{{loader}}' yet.\n\nWhat to do: {instead}",
        code=code,
        loader=LOADER,
        **values,
    )


def check_graph(model_options: dict[str, Any], conds: dict[str, list[dict[str, Any]]]) -> None:
    """Raise Unsupported for what the graph asks for beside patches and ControlNets, before anything is loaded."""
    if "multigpu_clones" in model_options:
        refuse("Work split over several GPUs", "remove the multi-GPU node.", code="graph.multi_gpu")
    for entries in conds.values():
        for entry in entries or ():
            if entry.get("gligen") is not None:
                refuse("GLIGEN", "remove the GLIGEN node.", code="graph.gligen")


def check_device(
    patcher: Any,
    device: torch.device,
    *,
    what: str = "model",
    node: str = "Select Model Device",
    setting: str = "transformer_device",
) -> None:
    """Raise Unsupported where a node has told ComfyUI another device than that on which the model computes."""
    if patcher.load_device != device:
        refuse(
            "Moving the {part} from {device} to {moved_to} ({node})",
            "remove that node, and choose {setting} in the loader.",
            code="graph.moved_model",
            part=what,
            device=device,
            moved_to=patcher.load_device,
            node=node,
            setting=setting,
        )


def check_references(variant: Variant, conds: dict[str, list[dict[str, Any]]]) -> None:
    """Raise InvalidRequest for an editing model that is shown no image, unless a condition says that this is meant.

    The other way round is only worth a warning, on the node and in the log: files of editing models under other names
    pass for Qwen-Image. So is an image that patches do not cover, in the log: ComfyUI's own text nodes make such ones.
    Raises InvalidRequest as well for references that are no single image.
    """
    entries = [entry for named in conds.values() for entry in named or ()]
    references = [entry.get("reference_latents") or () for entry in entries]
    _check_images(variant, references)
    sizes = {tuple(latent.shape[-2:]) for latents in references for latent in latents}
    shown = bool(sizes)
    if variant.edits and not shown and not any(entry.get(NO_IMAGES_KEY) for entry in entries):
        raise no_image_to_edit(variant)
    if shown and not variant.edits and not variant.makes_layers:
        warn(image_for_no_editor(variant))
    for height, width in sorted(sizes):
        if height % PATCH or width % PATCH:
            logger.warning(
                "A reference image of %dx%d px is not a multiple of %d: its edge is wrapped around, as in ComfyUI's "
                "own model. %s.",
                width * LATENT_PX,
                height * LATENT_PX,
                PATCH * LATENT_PX,
                "Scale it first" if variant.makes_layers else f"'{ENCODE_EDIT}' chooses sizes that fit",
            )


def no_image_to_edit(variant: Enum) -> InvalidRequest:
    """Of a member that makes none of text alone."""
    return InvalidRequest(
        "{variant} edits images, but this graph gives it none: no conditioning has reference latents.\n\nWhat to "
        "do: encode the prompt with '{encode_edit}' or another node that takes the image and the VAE "
        "(TextEncodeQwenImageEditPlus), or add ReferenceLatent. For images from text alone, choose a Qwen-Image "
        "file, or set variant to {qwen_image} in '{loader}'.",
        code="graph.no_image_to_edit",
        variant=variant.value,
        encode_edit=ENCODE_EDIT,
        qwen_image=Variant.QWEN_IMAGE.value,
        loader=LOADER,
    )


def image_for_no_editor(variant: Enum) -> Told:
    """Of a member that is trained for text alone."""
    return Told(
        "{variant} is given an image to edit, which it was not trained for; a LoRA may have taught it. If the file "
        "is an Edit model under another name, set variant in '{loader}'.",
        code="told.image_for_no_editor",
        variant=variant.value,
        loader=LOADER,
    )


def _check_images(variant: Variant, references: Sequence[Sequence[Tensor]]) -> None:
    """Raise InvalidRequest for a reference of several frames or of another rank, and for a second image that is to be
    taken apart."""
    for latents in references:
        for latent in latents:
            if latent.ndim != 5:
                raise InvalidRequest(
                    "A reference latent has the shape {shape}; an image's has five dimensions, [1, 16, 1, height / 8, "
                    "width / 8].\n\nWhat to do: encode the image with VAE Encode and this model's VAE.",
                    code="graph.wrong_reference_shape",
                    shape=list(latent.shape),
                )
        frames = max((latent.shape[2] for latent in latents), default=1)
        if frames != 1:
            raise InvalidRequest(
                "A reference latent has {frames} frames; an image has one.\n\nWhat to do: encode one image at a time, "
                "and use an image instead of its layers.",
                code="graph.reference_of_frames",
                frames=frames,
            )
        if variant.makes_layers and len(latents) > 1:
            raise InvalidRequest(
                "{variant} takes one image apart, but a prompt in this graph gives it {count}.\n\nWhat to do: keep "
                "one ReferenceLatent per prompt.",
                code="graph.several_images_to_layer",
                variant=variant.value,
                count=len(latents),
            )


def check_channels_of_call(x: Tensor, channels: int) -> None:
    """Raise Unsupported for what other nodes joined to the latents that the model is called with."""
    if x.shape[1] != channels:
        refuse(
            "A latent of {channels} channels in the model (concat_cond, c_concat)",
            "remove that node.",
            code="graph.concat_condition",
            channels=x.shape[1],
        )


def seen_of_call(mask: Tensor | None) -> Tensor | None:
    """An attention mask as bool: True is seen. Raises Unsupported for one that weighs."""
    if mask is None:
        return None
    if mask.is_floating_point():
        refuse(
            "A fractional or additive attention mask",
            "connect the conditioning from a text encode node directly.",
            code="graph.fractional_mask",
        )
    return mask.bool()


def check_latents(latents: Tensor) -> None:
    """Raise Unsupported for latents of other models."""
    if latents.ndim != 5:
        raise Unsupported(
            "A latent of shape {shape} does not belong to an image. Use EmptySD3LatentImage, or encode images with "
            "this pack's VAE.",
            code="graph.latent_of_no_image",
            shape=list(latents.shape),
        )


def check_size(latents: Tensor) -> None:
    """Warn where patches do not cover the latents (..., H, W): ComfyUI's own model wraps them round, and graphs start
    from images of any size."""
    if any(side % PATCH for side in latents.shape[-2:]):
        height, width = (side * LATENT_PX for side in latents.shape[-2:])
        step = PATCH * LATENT_PX
        logger.warning(
            "An image of %dx%d px is not a multiple of %d: its edge is wrapped around, as in ComfyUI's own model. "
            "Scale or pad it to %dx%d to avoid this.",
            width,
            height,
            step,
            *(-(-side // step) * step for side in (width, height)),
        )


def check_layers(variant: Variant, frames: int) -> None:
    """Raise InvalidRequest where the latent has no layers and the model makes them, or the other way round."""
    if variant.makes_layers and frames == 1:
        raise InvalidRequest(
            "{variant} makes layers, but this graph's latent has none.\n\nWhat to do: use "
            "EmptyQwenImageLayeredLatentImage with 1 layer or more, and show the model the image with "
            "ReferenceLatent; for a whole image, choose a {qwen_image} file in '{loader}'.",
            code="graph.latent_without_layers",
            variant=variant.value,
            qwen_image=Variant.QWEN_IMAGE.value,
            loader=LOADER,
        )
    if not variant.makes_layers and frames != 1:
        raise InvalidRequest(
            "The latent has {frames} frames, but {variant} makes a single image.\n\nWhat to do: use "
            "EmptySD3LatentImage, or encode images with this pack's VAE; for layers, choose a {layered} file in "
            "'{loader}'.",
            code="graph.latent_with_layers",
            frames=frames,
            variant=variant.value,
            layered=Variant.LAYERED.value,
            loader=LOADER,
        )


def check_hooks(hooks: comfy.hooks.HookGroup) -> None:
    """Raise Unsupported for hooks that change weights."""
    if hooks.get_type(comfy.hooks.EnumHookType.Weight):
        refuse("A LoRA or model hook (Create Hook LoRA, Set Props)", "remove the hook nodes.", code="graph.weight_hook")


def why_one_by_one(model_options: dict[str, Any], own_key: str) -> str:
    """Why prompts must run one after another in this graph; empty where they can share each visit of a block.

    Recording the calls shows a wrapper zeros first; one that keeps state would believe them. EasyCache's is given back.
    """
    if "model_function_wrapper" in model_options:
        return "a node set a model function wrapper"
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {})
    for kind in (WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL):
        foreign = [
            key
            for key, functions in wrappers.get(kind, {}).items()
            if functions and key != own_key and not is_easycache(key, functions)
        ]
        if foreign:
            return f"the wrapper {printable(str(foreign[0] or 'of a node'))} ({kind}) sees each call"
    return ""
