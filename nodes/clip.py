"""Our text encoder as ComfyUI's CLIP: tokens in, conditioning out, and nothing left on the device."""

from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch
from torch import Tensor, nn

from ..engine.plan import plan_text_encoder, text_encoder_peak_bytes
from ..engine.prompts import PromptTokenizer, drop_template
from ..engine.text_encoder import TextEncoder
from .limits import stage_bytes
from .unsupported import refuse

TOKENS_KEY = "qwen25_7b"  # as ComfyUI's own Qwen-Image tokenizer names them

EDIT_NODES = "Pictures in a prompt (TextEncodeQwenImageEdit)"


class LowVRAMCLIP(comfy.sd.CLIP):
    """Encodes through ComfyUI's own interface, so that its text nodes work with it.

    The encoder is read layer by layer at each call and owns nothing between calls; the patcher is empty.
    """

    def __init__(self, encoder: TextEncoder, tokenizer: PromptTokenizer, limit_bytes: int | None) -> None:
        super().__init__(no_init=True)
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.limit_bytes = limit_bytes
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
        other = LowVRAMCLIP(self.encoder, self.tokenizer, self.limit_bytes)
        other.patcher = self.patcher.clone()
        other.tokenizer_options = dict(self.tokenizer_options)
        other.use_clip_schedule = self.use_clip_schedule
        other.apply_hooks_to_conds = self.apply_hooks_to_conds
        return other

    def clip_layer(self, layer_idx: int) -> None:
        refuse("Another layer of the text encoder (CLIPSetLastLayer)", "remove that node.")

    def tokenize(
        self, text: str, return_word_ids: bool = False, *, llama_template: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """In ComfyUI's form: {name: [[(id, weight), ...]]}. Weights are always 1, as for every Qwen-Image encoder."""
        if kwargs.get("images"):
            refuse(EDIT_NODES, "use ComfyUI's own CLIP loader (type qwen_image) for editing.")
        if llama_template is not None and not text.startswith("<|im_start|>"):
            text = llama_template.format(text)
        return {TOKENS_KEY: [[(token, 1.0) for token in self.tokenizer.encode(text)]]}

    def encode_from_tokens_scheduled(self, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        self._refuse_schedule()
        return super().encode_from_tokens_scheduled(tokens, *args, **kwargs)

    def encode_from_tokens(self, tokens: Any, return_pooled: Any = False, return_dict: bool = False) -> Any:
        pairs = tokens[TOKENS_KEY][0]
        if not all(isinstance(pair[0], int) for pair in pairs):
            refuse(EDIT_NODES, "use ComfyUI's own CLIP loader (type qwen_image) for editing.")
        cond = self.encode_ids([[pair[0] for pair in pairs]])[0]
        if return_dict:
            out = {"cond": cond, "pooled_output": None}
            self.add_hooks_to_dict(out)
            return out
        return (cond, None) if return_pooled else cond

    def encode_prompts(self, prompts: list[str]) -> list[Any]:
        """A CONDITIONING for each prompt, all of them in one visit of the encoder."""
        conds = self.encode_ids([self.tokenizer.encode(prompt) for prompt in prompts])
        return [[[cond, self.add_hooks_to_dict({"pooled_output": None})]] for cond in conds]

    def encode_ids(self, ids: list[list[int]]) -> list[Tensor]:
        """(1, length of the prompt, dim) in float32 for each list of token ids.

        Raises DoesNotFit before anything is read.
        """
        self._refuse_schedule()
        device, footprint = self.encoder.hardware.device, self.encoder.footprint
        lengths = [len(tokens) for tokens in ids]
        wanted = text_encoder_peak_bytes(footprint, lengths, 2)
        slots = plan_text_encoder(footprint, lengths, stage_bytes(device, self.limit_bytes, wanted))
        bar = comfy.utils.ProgressBar(footprint.layers)

        def on_layer(index: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(index + 1)

        states = self.encoder.encode(ids, slots=slots, on_layer=on_layer)
        comfy.model_management.soft_empty_cache()
        out = comfy.model_management.intermediate_device()
        starts = [self.tokenizer.start(tokens) for tokens in ids]
        return [drop_template(state, start).to(out) for state, start in zip(states, starts, strict=True)]

    def _refuse_schedule(self) -> None:
        if self.use_clip_schedule and self.patcher.forced_hooks is not None:
            refuse("A schedule of hooks on the text encoder (SetClipHooks)", "switch schedule_clip off.")

    def load_model(self, tokens: Any = None) -> Any:
        return self.patcher

    def add_patches(self, patches: Any, strength_patch: float = 1.0, strength_model: float = 1.0) -> Any:
        refuse("A LoRA on the text encoder (Load LoRA)", "use LoraLoaderModelOnly's kind of LoRA once it is supported.")

    def get_key_patches(self) -> Any:
        refuse("Merging text encoders (CLIPMerge)", "merge with ComfyUI's own loaders.")

    def get_sd(self) -> Any:
        refuse("Saving the text encoder (CLIPSave)", "copy the file it was loaded from.")

    def state_dict_for_saving(self) -> Any:
        refuse("Saving the text encoder (CheckpointSave)", "copy the file it was loaded from.")

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        refuse("Generating text with the encoder", "use ComfyUI's own CLIP loader for that.")
