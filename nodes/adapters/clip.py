"""Our text encoder as ComfyUI's CLIP: tokens in, conditioning out, and nothing left on the device."""

import re
from collections.abc import Sequence
from enum import Enum
from numbers import Integral
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from torch import Tensor, nn

from ...engine.caches.prompt_cache import PromptCache
from ...engine.errors import InvalidRequest
from ...engine.models.qwen25_vl.vision_patches import patch_image
from ...engine.models.qwen_image.prompt_template import EDIT_TEMPLATE, IMAGE_PLACE, PROMPT_TEMPLATE
from ...engine.models.qwen_image.prompts import require_text
from ...engine.models.qwen_vl.image_prompts import IMAGE, ImagePrompt
from ...engine.models.qwen_vl.images import PatchedImage
from ...engine.out_of_memory import in_words
from ...engine.runs.encode import EncodeRun
from ...engine.runs.timeline import Timeline
from .error_events import errors_sent
from .graph_checks import check_device, refuse
from .in_comfyui import InComfyUI
from .limit_names import VRAM_LIMIT, loader_limit
from .progress import executing_prompt_id
from .value_checks import check_image

# ComfyUI's own for a prompt with images that names none: that of Edit, with one place before the text
ONE_IMAGE_TEMPLATE = EDIT_TEMPLATE.replace("{}", IMAGE_PLACE + "{}")


class LowVRAMCLIP(comfy.sd.CLIP):
    """Encodes through ComfyUI's own interface, so that its text nodes work with it.

    The encoder is read layer by layer at each call and owns nothing between calls; the patcher is empty. Prompts that
    `kept` has need no encoder.
    """

    tokens_key = "qwen25_7b"  # as ComfyUI's own Qwen-Image tokenizer names them
    template = PROMPT_TEMPLATE

    def __init__(
        self,
        encoder: Any,
        tokenizer: Any,
        limit_bytes: int | None,
        timeline: Timeline | None = None,
        kept: PromptCache | None = None,
        variant: Enum | None = None,
        limit_name: str = VRAM_LIMIT,
    ) -> None:
        """`encoder`, `tokenizer`: of the family, as `EncodeRun` takes them. `variant`: the model that the prompts are
        for, where it is known. `limit_name`: of the input that sets `limit_bytes`."""
        super().__init__(no_init=True)
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.limit_bytes, self.limit_name = limit_bytes, limit_name
        self.timeline = timeline or Timeline(executing_prompt_id)
        self.kept = kept
        self.variant = variant
        self.cond_stage_model = nn.Module()
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.cond_stage_model, load_device=encoder.hardware.device, offload_device=torch.device("cpu")
        )
        self.patcher.is_clip = True
        self.layer_idx = None
        self.tokenizer_options: dict[str, Any] = {}
        self.use_clip_schedule = False
        self.apply_hooks_to_conds = None

    def clone(self, disable_dynamic: bool = False) -> "LowVRAMCLIP":
        other = type(self)(
            self.encoder,
            self.tokenizer,
            self.limit_bytes,
            self.timeline,
            self.kept,
            self.variant,
            self.limit_name,
        )
        other.patcher = self.patcher.clone()
        other.tokenizer_options = dict(self.tokenizer_options)
        other.use_clip_schedule = self.use_clip_schedule
        other.apply_hooks_to_conds = self.apply_hooks_to_conds
        return other

    def clip_layer(self, layer_idx: int) -> None:
        refuse(
            "Using another layer of the text encoder (CLIPSetLastLayer)", "remove that node.", code="clip.other_layer"
        )

    def tokenize(
        self,
        text: str,
        return_word_ids: bool = False,
        *,
        llama_template: str | None = None,
        images: Sequence[Tensor] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """In ComfyUI's form: {name: [[(id, weight), ...]]}, with an image in the place of an id for each of `images`.
        Weights are always 1, as for every Qwen-Image encoder."""
        text = as_comfyui_reads(text)
        entries = [{"type": "image", "data": image, "original_type": "image"} for image in images or ()]
        template = llama_template or (ONE_IMAGE_TEMPLATE if entries else self.template)
        tokens = self.tokenizer.encode(text, template=template, images=len(entries))
        return self._as_tokens(tokens, entries)

    def _as_tokens(self, tokens: Sequence[int], entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """In ComfyUI's form, with `entries` where images stand."""
        shown = iter(entries)
        return {self.tokens_key: [[(next(shown) if token == IMAGE else token, 1.0) for token in tokens]]}

    def encode_from_tokens_scheduled(self, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        self._refuse_schedule()
        return super().encode_from_tokens_scheduled(tokens, *args, **kwargs)

    def encode_from_tokens(self, tokens: Any, return_pooled: Any = False, return_dict: bool = False) -> Any:
        pairs = self._own(tokens)
        prompt = self._prompt_of(pairs)
        cond, values = self._conditioned(prompt, self.encode_tokens([prompt])[0], pairs)
        if return_dict:
            out = {"cond": cond, "pooled_output": None, **values}
            self.add_hooks_to_dict(out)
            return out
        return (cond, None) if return_pooled else cond

    @errors_sent()
    @in_words("prompts were encoded")
    def encode_prompts(
        self, prompts: Sequence[str], *, template: str | None = None, images: Sequence[Tensor] = ()
    ) -> list[Any]:
        """A CONDITIONING for each prompt, all of them in one visit of the encoder; each shows all of `images`, which
        are seen once."""
        patched = tuple(self._patched(image) for image in images)
        texts = [as_comfyui_reads(prompt) for prompt in prompts]
        shown = {"template": template or self.template, "images": len(patched)}
        whole = [ImagePrompt(tuple(self.tokenizer.encode(text, **shown)), patched) for text in texts]
        made = [self._conditioned(*each) for each in zip(whole, self.encode_tokens(whole), strict=True)]
        return [[[cond, self.add_hooks_to_dict({"pooled_output": None, **values})]] for cond, values in made]

    @errors_sent()
    @in_words("prompts were encoded")
    def encode_tokens(self, prompts: list[ImagePrompt]) -> list[Tensor]:
        """(1, length of the prompt, dim) in float32 for each prompt.

        Only those that are not kept are encoded. Raises DoesNotFit before anything is read.
        """
        self._refuse_schedule()
        setting = "text_encoder_device"
        check_device(
            self.patcher, self.encoder.hardware.device, what="text encoder", node="Select CLIP Device", setting=setting
        )
        limit = loader_limit(self.limit_bytes, self.limit_name)
        run = EncodeRun(self.encoder, self.tokenizer, self.timeline, InComfyUI(), limit, self.kept)
        return [cond.to(comfy.model_management.intermediate_device()) for cond in run.encode(prompts)]

    def _conditioned(
        self, prompt: ImagePrompt, cond: Tensor, pairs: Sequence[tuple[Any, ...]] = ()
    ) -> tuple[Tensor, dict[str, Any]]:
        """What a conditioning holds of a prompt's states, and its values beside them; `pairs`: its tokens."""
        return cond, {}

    def _patched(self, image: Any) -> PatchedImage:
        check_image("An image in a prompt", image)
        return patch_image(image)

    def _own(self, tokens: Any) -> Sequence[tuple[Any, ...]]:
        """The prompt in ComfyUI's form. Raises InvalidRequest for the tokens of another text encoder."""
        batches = tokens.get(self.tokens_key) if isinstance(tokens, dict) else None
        pairs = batches[0] if isinstance(batches, list | tuple) and batches else None
        if not isinstance(pairs, list | tuple) or not all(isinstance(pair, list | tuple) and pair for pair in pairs):
            raise InvalidRequest(
                "These tokens are not from Qwen-Image's text encoder: there are none for {key}.\n\nWhat to do: "
                "tokenize the prompt with the CLIP that encodes it.",
                code="clip.other_tokens",
                key=self.tokens_key,
            )
        return pairs

    def _prompt_of(self, pairs: Sequence[tuple[Any, ...]]) -> ImagePrompt:
        """From ComfyUI's form. Raises Unsupported for what is neither a token nor an image."""
        tokens, images = [], []
        for element, *_ in pairs:
            if isinstance(element, Integral):
                tokens.append(int(element))
            elif isinstance(element, dict) and element.get("type") == "image":
                tokens.append(IMAGE)
                images.append(self._patched(element.get("data")))
            else:
                _refuse_embedding()
        return ImagePrompt(tuple(tokens), tuple(images))

    def _refuse_schedule(self) -> None:
        if self.use_clip_schedule and self.patcher.forced_hooks is not None:
            refuse(
                "A schedule of hooks on the text encoder (SetClipHooks)",
                "switch schedule_clip off.",
                code="clip.hook_schedule",
            )

    def load_model(self, tokens: Any = None) -> Any:
        return self.patcher

    def add_patches(self, patches: Any, strength_patch: float = 1.0, strength_model: float = 1.0) -> Any:
        return []  # no key of a LoRA is ours: our state dict has none, and ComfyUI says which keys it did not use

    def get_key_patches(self) -> Any:
        refuse("Merging text encoders (CLIPMerge)", "merge with ComfyUI's own loaders.", code="clip.merged")

    def get_sd(self) -> Any:
        refuse("Saving the text encoder (CLIPSave)", "copy the file it was loaded from.", code="clip.saved")

    def state_dict_for_saving(self) -> Any:
        refuse(
            "Saving the text encoder (CheckpointSave)",
            "copy the file it was loaded from.",
            code="clip.saved_in_checkpoint",
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        refuse(
            "Generating text with the encoder", "use ComfyUI's own CLIP loader for that.", code="clip.generates_text"
        )


def as_comfyui_reads(text: str) -> str:
    """Escaped brackets are brackets, though no weights are read. Raises Unsupported for embeddings."""
    require_text(text)
    if re.search(r"(?:^|\s)embedding:\S", text):
        _refuse_embedding()
    return text.replace("\\(", "(").replace("\\)", ")")


def _refuse_embedding() -> None:
    refuse("An embedding in a prompt (embedding:...)", "write the prompt in words.", code="clip.embedding")
