"""What images would take on cards that nobody here has: simulated, not measured.

    python dev.py bench simulate

The planner plans Qwen-Image at its real size, from headers alone, for cards by their data sheets
(`tools/simulated_cards.py`). A discrete-event model (`tools/streaming_events.py`) runs the steps of that plan piece by
piece; encoding, loading, the timestep table and decoding are the planner's own forecast. Guided images take 20 steps,
Lightning's 8 without guidance; prompts have 512 tokens, the text encoder is in fp8. From RAM: as many blocks are held
as the machine has memory for; from disk: within 2 GiB of it, so that blocks are read at every step. Nothing is in the
system's file cache. `first`, `seed` and `prompt` are seconds of the first image, and of one with another seed or prompt
after it.

`twice`: the same machine, format and ring, but all weights of the transformer, modulation included, pass through the
card once for each branch of a step, twice where there is guidance, and none stays there: an image with another seed.
Its other stages are taken to be ours. No peer is run here.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from qwenimage_lowvram.engine.errors import DoesNotFit
from qwenimage_lowvram.engine.models.qwen_image.costs import PROMPT_SIZES
from qwenimage_lowvram.engine.planning.footprint import TransformerFootprint
from qwenimage_lowvram.engine.planning.overlap import ways
from qwenimage_lowvram.engine.planning.request import GIB, Limits
from qwenimage_lowvram.engine.planning.stages import ImagePlan, ImageRequest, Stage, plan_image
from simulated_cards import CARDS, FORMATS, SimulatedCard, models
from streaming_events import first_seconds, job_of, machine_of, step_seconds

PROMPT_TOKENS = 512
SIZES = (1024, 1328)
DISK_GIB = 2
IN_README = {"1328 guided, 20 steps": "fp8", "1024 Lightning, 8 steps": "fp8"}


def rows(quick: bool) -> list[dict[str, Any]]:
    """One for each card, format, size, guidance and place; quick: the cards of 4 and 12 GB in two formats."""
    cards = [card for card in CARDS if card.vram_gib in (4, 12)] if quick else CARDS
    return [
        row(card, weight_format, request, place)
        for card in cards
        for weight_format in (("fp8", "nf4") if quick else FORMATS)
        for request in requests()
        for place in ("RAM", "disk")
    ]


def requests() -> Iterator[ImageRequest]:
    for guided, steps in ((True, 20), (False, 8)):
        for side in SIZES:
            # the template's last tokens are kept
            tokens = PROMPT_TOKENS - PROMPT_SIZES.behind
            yield ImageRequest(side, side, 1, guided, steps, tokens, prompts=PROMPT_SIZES)


def row(card: SimulatedCard, weight_format: str, request: ImageRequest, place: str) -> dict[str, Any]:
    """Seconds of one case; those of images are None where it does not fit the card."""
    found: dict[str, Any] = {
        "who": card.name,
        "case": f"{request.width} {'guided' if request.guided else 'Lightning'}, {request.steps} steps",
        "format": weight_format,
        "from": place,
    }
    sizes, speeds = models(weight_format, card.dtype), card.speeds
    ram = (card.ram_gib if place == "RAM" else DISK_GIB) * GIB
    try:
        plan = plan_image(sizes, request, Limits(card.limit_bytes, ram), speeds)
    except DoesNotFit:
        return found | dict.fromkeys(("first", "seed", "prompt", "twice"))
    transformer, sampling = sizes.transformer, plan.sampling
    job, machine = job_of(transformer, sampling, speeds), machine_of(speeds)
    step, first = step_seconds(job, machine, steps=3), first_seconds(job, machine)
    ours = _with_steps(plan, first=first, step=step)
    twice = _twice(transformer, plan, card, ram)
    seconds = {**ours, "twice": twice, "step": step}
    seconds |= {"forecast_step": sampling.forecast.seconds, "forecast_first": plan.seconds}
    return found | {
        **{name: round(value, 2) for name, value in seconds.items()},
        "bound": sampling.forecast.bound.value,
        "stay": len(sampling.resident),
        "held": len(sampling.held),
        "read": sampling.from_file,
        "slots": sampling.slots,
    }


def _with_steps(plan: ImagePlan, *, first: float, step: float) -> dict[str, float]:
    """Seconds of images whose steps take what the model says."""
    run, steps = plan.sampling.run, plan.sampling.request.timesteps
    others = plan.seconds - (plan.stage(Stage.SAMPLING).seconds or 0.0)
    return {
        "first": others + first + (steps - 1) * step,
        "seed": plan.again_seconds - run.again_seconds + steps * step,
        "prompt": plan.prompt_seconds - run.again_seconds + steps * step,
    }


def _twice(transformer: TransformerFootprint, plan: ImagePlan, card: SimulatedCard, ram: int) -> float:
    """Seconds of another seed's image where all weights pass through the card once for each branch."""
    speeds, sampling = card.speeds, plan.sampling
    whole = transformer.stored_bytes + transformer.modulation_stored_bytes
    decoding = transformer.decode_bytes + transformer.modulation_decode_bytes
    launches = transformer.decode_launches + transformer.modulation_decode_launches
    larger = replace(transformer, stored_bytes=whole, decode_bytes=decoding, decode_launches=launches)
    held = min(transformer.blocks, ram // whole)
    job = job_of(larger, sampling, speeds)
    branches = sampling.request.branches
    alone = replace(
        job,
        ways=ways(transformer.blocks, streamed=transformer.blocks, from_file=transformer.blocks - held),
        compute_seconds=job.compute_seconds / branches,
        branches=1,
        slots=2,
    )
    # the planner's own share is what is not sampling
    others = plan.again_seconds - sampling.run.again_seconds
    step = branches * step_seconds(alone, machine_of(speeds), steps=3)
    return others + sampling.request.timesteps * step


def readme_table(made: list[dict[str, Any]]) -> str:
    """The rows of README's table: seconds from RAM, and from the disk."""
    lines = [
        "| card | image | first image | another seed | another prompt | all weights twice a guided step |",
        "|---|---|---|---|---|---|",
    ]
    for card in CARDS:
        for case, weight_format in IN_README.items():
            wanted = {"who": card.name, "case": case, "format": weight_format}
            found = {one["from"]: one for one in made if wanted.items() <= one.items()}
            if len(found) < 2:
                continue
            cells = [_both(found, key) for key in ("first", "seed", "prompt", "twice")]
            lines.append(f"| {card.name} | {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _both(found: dict[str, dict[str, Any]], key: str) -> str:
    seconds = [found[place].get(key) for place in ("RAM", "disk")]
    return " / ".join("does not fit" if one is None else f"{one:.0f}" for one in seconds) + " s"
