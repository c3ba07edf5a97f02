"""Prompts to embeddings, in one call: kept ones are read, the others encoded in one visit of the encoder, and kept."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..caches.prompt_cache import PromptCache
from ..caches.prompt_key import PromptKey, arithmetic_of
from ..compute.finite import is_finite
from ..errors import DamagedFile, InvalidRequest
from ..log import logger
from ..models.qwen_vl.image_prompts import ImagePrompt, PromptTokenizer, drop_template
from ..models.qwen_vl.text_encoder import TextEncoder
from ..models.qwen_vl.vision_pass import VisionPass
from ..out_of_memory import in_words, reason, shortage
from ..planning.stages import Stage, encode_stage
from ..planning.text_encoder import plan_text_encoder, text_encoder_peak_bytes
from ..reports.image_report import Moved
from .limit import Limit
from .phases import Phase, PhaseProgress
from .surroundings import Surroundings
from .timeline import Timeline


@dataclass(frozen=True)
class EncodeRun:
    """What one call of the text encoder needs. `kept`: the embeddings of earlier prompts, which need no encoder.

    Guarantees: the encoder's layers are visited once for all prompts, and nothing stays on the device; the limit is
    kept; a kept prompt is what it was, to the last bit; where memory runs out, prompts are encoded once more with the
    least that is possible.
    """

    encoder: TextEncoder
    tokenizer: PromptTokenizer
    timeline: Timeline
    surroundings: Surroundings
    limit: Limit
    kept: PromptCache | None = None

    @in_words("prompts were encoded")
    def encode(self, prompts: Sequence[ImagePrompt]) -> list[Tensor]:
        """(1, length of the prompt, dim) in float32 on the host for each prompt, without its template.

        Raises DoesNotFit before anything is read, and InvalidRequest for prompts that are too long or overflow.
        """
        starts = [self._start(prompt) for prompt in prompts]
        for prompt in prompts:
            self.tokenizer.require_length(prompt)
        states = self._encode(prompts) if self.kept is None else self._encode_others(prompts, self.kept)
        return [drop_template(state, start) for state, start in zip(states, starts, strict=True)]

    def _encode_others(self, prompts: Sequence[ImagePrompt], kept: PromptCache) -> list[Tensor]:
        """The hidden states of each prompt: kept ones as they are, the others encoded and kept."""
        keys = self._keys(prompts)
        found = [kept.get(key) for key in keys]
        others = [i for i, state in enumerate(found) if state is None]
        if len(others) < len(prompts):
            logger.info("%d of %d prompts read from %s", len(prompts) - len(others), len(prompts), kept.folder)
        encoded = iter(self._encode([prompts[i] for i in others]) if others else ())
        states = [next(encoded) if state is None else state for state in found]
        if others and self._keys(prompts) != keys:
            raise DamagedFile(
                "The vision part beside the text encoder was changed while images were being encoded, so the result "
                "would be kept for the wrong file.\n\nWhat to do: queue the prompt again.",
                code="vision.changed",
            )
        for i in others:
            kept.put(keys[i], states[i])
        return states

    def _keys(self, prompts: Sequence[ImagePrompt]) -> list[PromptKey]:
        encoder, arithmetic = self.encoder, arithmetic_of(self.encoder.hardware.device)
        tower = VisionPass(encoder, prompts).identity
        return [
            PromptKey(
                f"{encoder.identity}, images {tower}" if prompt.images else encoder.identity,
                encoder.dtype,
                prompt.tokens,
                arithmetic,
                tuple(image.digest for image in prompt.images),
            )
            for prompt in prompts
        ]

    def _encode(self, prompts: Sequence[ImagePrompt]) -> list[Tensor]:
        """The hidden states of each prompt; where memory runs out, once more with the least that is possible."""
        device = self.encoder.hardware.device
        try:
            return self._visit(prompts)
        except Exception as error:
            if shortage(error) is None:
                raise
            why = reason(error)
        # after the except block: the traceback keeps the failed attempt's tensors alive
        self.surroundings.left(device)
        logger.warning("Memory ran out while prompts were encoded (%s). They are encoded again through one slot.", why)
        return self._visit(prompts, most_slots=1)

    def _visit(self, prompts: Sequence[ImagePrompt], *, most_slots: int = 2) -> list[Tensor]:
        """The hidden states of each prompt, in one visit of the encoder, and before it one of the vision tower."""
        encoder, looking, around = self.encoder, VisionPass(self.encoder, prompts), self.surroundings
        progress = PhaseProgress(around, Phase.ENCODING)
        device, footprint = encoder.hardware.device, encoder.footprint
        lengths = [prompt.length for prompt in prompts]
        wanted = max(text_encoder_peak_bytes(footprint, lengths, 2), looking.wanted_bytes)
        room = around.device_bytes(device, self.limit.nbytes, wanted, footprint.slot_bytes)
        with self.limit.naming(device, room):
            slots, looking_slots = plan_text_encoder(footprint, lengths, room), looking.plan(room)
        slots, looking_slots = min(slots, most_slots), min(looking_slots, most_slots)
        done, total = 0, looking.blocks + footprint.layers

        def on_block(index: int) -> None:
            nonlocal done
            around.check()
            progress(done, total)
            done += 1
            self.timeline.sample()

        with self.timeline.stage(Stage.ENCODE, device, moved=lambda: self._moved(looking)) as running:
            running.planned(looking.stage(encode_stage(footprint, lengths, slots), looking_slots))
            seen = looking.see(looking_slots, on_block)
            ids = [list(prompt.tokens) for prompt in prompts]
            states = encoder.encode(ids, images=seen, slots=slots, on_layer=on_block)
        progress(total, total)
        for prompt, state in zip(prompts, states, strict=True):  # before any is kept
            _require_embeddings(drop_template(state, self._start(prompt)))
        around.left(device)
        return states

    def _start(self, prompt: ImagePrompt) -> int:
        """Where the states of the template end."""
        return prompt.place(self.tokenizer.start(prompt.tokens))

    def _moved(self, looking: VisionPass) -> Moved:
        encoder = self.encoder
        waits = encoder.waits + looking.waits
        return Moved(
            encoder.fetched_bytes + looking.fetched_bytes,
            encoder.copied_bytes + looking.copied_bytes,
            waits.disk_seconds,
            waits.bus_seconds,
        )


def _require_embeddings(states: Tensor) -> None:
    """(1, length, dim): of at least one token, and numbers that are finite."""
    if not states.shape[1]:
        raise InvalidRequest(
            "The prompt consists only of its template: it has no tokens of its own.\n\nWhat to do: write something "
            "after the template, or leave the template out.",
            code="prompt.ends_with_template",
        )
    if not is_finite(states):
        raise InvalidRequest(
            "The text encoder's output holds numbers that are not finite (NaN or infinity).\n\nWhat to do: check the "
            "prompt's images; fp16 overflows in some models, bf16 and fp32 do not.",
            code="text_encoder.made_not_finite",
        )
