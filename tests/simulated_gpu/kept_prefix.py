"""Runs of Qwen-Image-2.1, whose blocks keep what they make of a prompt: on the card, in host memory, or nowhere."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from branches_21 import make_branch, make_prefix
from qwenimage_lowvram.engine.models.qwen_image_21.branch import Branch
from qwenimage_lowvram.engine.planning.kept import KeptTiers
from small_transformer_21 import LAYERS, SMALL
from torch import Tensor

from .rig import TIMES, Rig, host
from .scenarios import Interrupted

PROMPTS = (13, 7)  # tokens of the positive and of the negative one, behind two images and what stands before them
TOKENS = 24 + 8 + 5 + sum(PROMPTS)
DTYPE = torch.bfloat16
BLOCK_BYTES = 2 * TOKENS * SMALL.inner_dim * DTYPE.itemsize + 3 * 4  # with a factor of each, where they are in fp16


def prefix_kept(
    rig: Rig,
    *,
    remade: int,
    on_device: int,
    then: int,
    stops: Sequence[tuple[int, int]] = (),
    dtype: torch.dtype = DTYPE,
) -> list[Tensor]:
    """A run that makes it and one with another seed; one with `then` blocks' on the card; one after the model was asked
    to leave, which keeps a part in host memory. `stops`: (run, block) where its first step ends, and begins again."""
    model = rig.transformer_21(dtype)
    made: list[Tensor] = []
    first = 0
    for number, on_card in enumerate((on_device, on_device, then, then)):
        model.load((1,), (), (), tiers(remade, on_card))
        with model.session(slots=2) as session:
            for at in (block for run, block in stops if run == number):
                _stopped(
                    partial(session.forward, branches(rig, TIMES[0], number, dtype=model.dtype), on_block=_stopping(at))
                )
            for timestep in TIMES:
                of_step = branches(rig, timestep, number, dtype=model.dtype)
                made += host(session.forward(of_step, more=timestep != TIMES[-1]))
        if number == 0:
            first = model.store.kept.made_tokens
        elif number == 1 and not stops:  # each of two steps makes anew what is not kept
            assert model.store.kept.made_tokens - first == len(TIMES) * remade * TOKENS
        elif number == 2:
            model.unload()
    model.load((1,), (), (), tiers(remade, 0))  # what lay on the card is on its way to host memory
    model.store.leave_host()
    model.unload()
    model.store.leave_host()
    return made


def prompts_change(rig: Rig) -> list[Tensor]:
    """Each step has prompts of its own, with room for one step's, in host memory."""
    model = rig.transformer_21()
    model.load((), (), (), tiers(0, 0))
    with model.session(slots=2) as session:
        answers = [session.forward(branches(rig, TIMES[0], 0, images=number)) for number in range(3)]
        made = [tensor for answer in answers for tensor in host(answer)]
    model.unload()
    model.store.leave_host()
    return made


def tiers(remade: int, on_device: int) -> KeptTiers:
    return KeptTiers(LAYERS, remade, on_device, BLOCK_BYTES, spare_bytes=2 * BLOCK_BYTES)


def branches(rig: Rig, timestep: float, seed: int, images: int = 0, *, dtype: torch.dtype = DTYPE) -> list[Branch]:
    """`images`: of which set."""
    device = rig.hardware.device
    made = []
    for length in PROMPTS:
        branch = make_branch(1, dtype=dtype, seed=seed, timestep=timestep)
        prefix = make_prefix(length, dtype=dtype, references=2)
        prefix = replace(prefix, references=tuple(image + images for image in prefix.references))
        first, last = (stretch.key for stretch in prefix.stretches)  # read on the host, as the nodes do once for a run
        shown = tuple(image.to(device) for image in prefix.references)
        prefix = replace(prefix, text=prefix.text.to(device), references=shown, keys=(first, last))
        made.append(replace(branch, tokens=branch.tokens.to(device), prefix=prefix))
    return made


def _stopping(at: int) -> Callable[[int], None]:
    def stop(index: int) -> None:
        if index == at:
            raise Interrupted

    return stop


def _stopped(action: Callable[[], object]) -> None:
    try:
        action()
    except Interrupted:
        return
    raise AssertionError("nothing was interrupted")
