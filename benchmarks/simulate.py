"""What images would take on cards that nobody here has: simulated, not measured.

    python dev.py bench simulate

The planner plans Qwen-Image at its real size, from headers alone, for cards by their data sheets
(`tools/simulated_cards.py`). A discrete-event model (`tools/streaming_events.py`) runs the steps of that plan piece by
piece; encoding, loading, the timestep table and decoding are the planner's own forecast. Guided images take 20 steps,
Lightning's 8 without guidance; prompts have 512 tokens, the text encoder is in fp8. Qwen-Image-2.1 takes 40 steps,
Turbo 8, without guidance; an edit is shown one image of a megapixel. From RAM: as many blocks are held as the machine
has memory for; from disk: within 2 GiB of it, so that blocks are read at every step. Nothing is in the system's file
cache. `first`, `seed` and `prompt` are seconds of the first image, and of one with another seed or prompt after it;
another prompt is about the same image to change. Looking at that is not counted.

`twice`: the same machine, format and ring, but all weights of the transformer, modulation included, pass through the
card once for each branch of a step, twice where there is guidance, and none stays there: an image with another seed.
Its other stages are taken to be ours, and it keeps as much of prompt and images. No peer is run here.

Two cards in one machine (`2 x ...`) divide the prompts of a step, or the blocks, as the planner chooses; `seed_alone`:
one of them by itself. Each card's steps run in the model by themselves; the slower one counts. Their other stages are
those of one card.

Four machines (`4 x ...`) divide the tokens of an image, each with a card and all blocks, and exchange them within each
block over a link of so many Gbit/s each way, 0.1 ms an exchange. That the card's bus carries what is exchanged, too, is
not counted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from qwenimage_lowvram.engine.compute.link import TYPICAL_LINK, Link
from qwenimage_lowvram.engine.errors import DoesNotFit
from qwenimage_lowvram.engine.models.families import QWEN_IMAGE, QWEN_IMAGE_21
from qwenimage_lowvram.engine.models.family import Family
from qwenimage_lowvram.engine.planning.branch_split import Card
from qwenimage_lowvram.engine.planning.footprint import TransformerFootprint
from qwenimage_lowvram.engine.planning.memory import plan_memory, without_secondaries
from qwenimage_lowvram.engine.planning.memory_plan import MemoryPlan
from qwenimage_lowvram.engine.planning.overlap import ways
from qwenimage_lowvram.engine.planning.request import GIB, Limits
from qwenimage_lowvram.engine.planning.several_cards import plan_on_cards
from qwenimage_lowvram.engine.planning.stages import ImagePlan, ImageRequest, Stage, plan_image
from simulated_cards import CARDS, FORMATS, FORMATS_21, SimulatedCard, models
from streaming_events import first_seconds, job_of, machine_of, step_seconds

PROMPT_TOKENS = 512
SIZES = (1024, 1328)
DISK_GIB = 2
PAIRS = ("RTX 5060 8 GB", "RTX 4060 Ti 16 GB")
FORMATS_OF_SEVERAL = ("bf16", "fp8", "nf4")
MACHINES, CARD_OF_MACHINES = 4, "RTX 3060 12 GB"
LINKS_GBIT = (1, 10, 25)
GBIT_BYTES = 1e9 / 8
SHOWN = {
    "1328 guided, 20 steps": "fp8",
    "1024 Lightning, 8 steps": "fp8",
    "1024 2.1, 40 steps": "int8_convrot",
    "1024 2.1 edit, 40 steps": "int8_convrot",
    "1024 2.1-Turbo, 8 steps": "int8_convrot",
}


@dataclass(frozen=True)
class Case:
    name: str
    family: Family
    formats: Sequence[str]
    request: ImageRequest


def rows(quick: bool) -> list[dict[str, Any]]:
    """One for each card, format, case and place; quick: the cards of 4 and 12 GB in two formats."""
    cards = [card for card in CARDS if card.sheet.gb in (4, 12)] if quick else CARDS
    return [*_rows_of_one(cards, quick), *([] if quick else [*pairs(), *fleets()])]


def pairs() -> list[dict[str, Any]]:
    """Two cards of 8 GB, and two of 16."""
    cards = [card for card in CARDS if card.name in PAIRS]
    return [pair(*of) for of in product(cards, FORMATS_OF_SEVERAL, _guided(), ("RAM", "disk"))]


def fleets() -> list[dict[str, Any]]:
    """Four machines with a card of 12 GB each."""
    return [fleet(*of) for of in product(LINKS_GBIT, FORMATS_OF_SEVERAL, _guided(), ("RAM", "disk"))]


def _guided() -> list[Case]:
    return [case for case in cases() if case.request.guided]


def _rows_of_one(cards: Sequence[SimulatedCard], quick: bool) -> list[dict[str, Any]]:
    return [
        row(card, weight_format, case, place)
        for card in cards
        for weight_format in (("fp8", "nf4") if quick else FORMATS)
        for case in cases()
        if weight_format in case.formats
        for place in ("RAM", "disk")
    ]


def cases() -> Iterator[Case]:
    for guided, steps in ((True, 20), (False, 8)):
        for side in SIZES:
            name = f"{side} {'guided' if guided else 'Lightning'}, {steps} steps"
            yield Case(name, QWEN_IMAGE, FORMATS, _request(QWEN_IMAGE, side, guided, steps))
    for name, references, steps in (("2.1", 0, 40), ("2.1 edit", 1, 40), ("2.1-Turbo", 0, 8), ("2.1-Turbo edit", 1, 8)):
        request = _request(QWEN_IMAGE_21, SIZES[0], False, steps, references)
        yield Case(f"{SIZES[0]} {name}, {steps} steps", QWEN_IMAGE_21, FORMATS_21, request)


def _request(family: Family, side: int, guided: bool, steps: int, references: int = 0) -> ImageRequest:
    prompts = family.prompts
    tokens = PROMPT_TOKENS - prompts.behind  # the template's last ones are kept
    return ImageRequest(side, side, 1, guided, steps, tokens, references=references, prompts=prompts)


def row(card: SimulatedCard, weight_format: str, case: Case, place: str) -> dict[str, Any]:
    """Seconds of one case; those of images are None where it does not fit the card."""
    found: dict[str, Any] = {
        "who": card.name,
        "case": case.name,
        "format": weight_format,
        "from": place,
    }
    sizes, speeds = models(weight_format, card.dtype, case.family), card.speeds
    ram = (card.ram_gib if place == "RAM" else DISK_GIB) * GIB
    try:
        plan = plan_image(sizes, case.request, Limits(card.limit_bytes, ram), speeds)
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


def pair(card: SimulatedCard, weight_format: str, case: Case, place: str) -> dict[str, Any]:
    """Seconds of one case on two such cards."""
    sizes, speeds = models(weight_format, card.dtype, case.family), card.speeds
    limits = Limits(card.limit_bytes, (card.ram_gib if place == "RAM" else DISK_GIB) * GIB)
    transformer, alone = sizes.transformer, plan_image(sizes, case.request, limits, speeds)
    other = Card("the second", card.limit_bytes, speeds)
    plan = plan_on_cards(transformer, alone.request.sampling, limits, speeds, [other])
    found = {"who": f"2 x {card.name}", "case": case.name, "format": weight_format, "from": place}
    machine, left = machine_of(speeds), without_secondaries(transformer, plan.secondaries)
    jobs = [job_of(left, one, speeds) for one in (plan, *(other.plan for other in plan.beside))]
    elsewhere = left.elsewhere * jobs[0].compute_seconds  # of blocks that lie on the other card
    step = max(step_seconds(job, machine, steps=3) for job in jobs) + elsewhere
    first = max(first_seconds(job, machine) for job in jobs) + elsewhere
    seconds = _with_steps(alone, first=first, step=step) | {"seed_alone": _alone(card, weight_format, case, place)}
    divided = "branches" if plan.beside else "blocks" if plan.secondaries else "nothing"
    return found | _of_several(alone, plan, {**seconds, "step": step}, divided)


def fleet(gbit: int, weight_format: str, case: Case, place: str) -> dict[str, Any]:
    """Seconds of one case on four machines, of which each makes a part of the image's tokens."""
    (card,) = (card for card in CARDS if card.name == CARD_OF_MACHINES)
    sizes, speeds = models(weight_format, card.dtype, case.family), card.speeds
    limits = Limits(card.limit_bytes, (card.ram_gib if place == "RAM" else DISK_GIB) * GIB)
    transformer, alone = sizes.transformer, plan_image(sizes, case.request, limits, speeds)
    link = Link(gbit * GBIT_BYTES, TYPICAL_LINK.begin_seconds)
    plan = plan_memory(transformer, replace(case.request.sampling, ranks=MACHINES, link=link), limits, speeds)
    who = f"{MACHINES} x {card.name}, {gbit} Gbit/s"
    found = {"who": who, "case": case.name, "format": weight_format, "from": place}
    job, machine = job_of(transformer, plan, speeds), machine_of(speeds)
    step, first = step_seconds(job, machine, steps=3), first_seconds(job, machine)
    seconds = _with_steps(alone, first=first, step=step) | {"seed_alone": _alone(card, weight_format, case, place)}
    return found | _of_several(alone, plan, {**seconds, "step": step, "link": plan.forecast.link_seconds}, "tokens")


def _alone(card: SimulatedCard, weight_format: str, case: Case, place: str) -> float:
    seconds: float = row(card, weight_format, case, place)["seed"]
    return seconds


def _of_several(alone: ImagePlan, plan: MemoryPlan, seconds: dict[str, float], divided: str) -> dict[str, Any]:
    others = alone.seconds - (alone.stage(Stage.SAMPLING).seconds or 0.0)
    steps = plan.run.first_step_seconds + (plan.run.steps - 1) * plan.run.step_seconds
    seconds = {**seconds, "forecast_step": plan.forecast.seconds, "forecast_first": others + steps}
    return {
        **{name: round(value, 2) for name, value in seconds.items()},
        "divided": divided,
        "bound": plan.forecast.bound.value,
        "stay": len(plan.resident),
        "read": plan.from_file,
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
    held = min(transformer.blocks, (ram - sampling.kept.host_bytes) // whole)
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


def times_of(made: list[dict[str, Any]], card: str, case: str, steps: int) -> str:
    """Seconds of README's table: of the first image, and of one with another seed, of `steps` steps, with blocks in
    RAM."""
    weight_format = "int8_convrot" if "2.1" in case else "fp8"
    wanted = {"who": card, "case": case, "format": weight_format, "from": "RAM"}
    (found,) = (one for one in made if wanted.items() <= one.items())
    more = (steps - int(case.split()[-2])) * found["step"]
    return f"{found['first'] + more:.0f} s, then {found['seed'] + more:.0f} s"


def shown_table(made: list[dict[str, Any]]) -> str:
    """The table of docs/measurements.md: seconds from RAM, and from the disk."""
    lines = [
        "| card | image | first image | another seed | another prompt | all weights twice a guided step |",
        "|---|---|---|---|---|---|",
    ]
    for card in CARDS:
        for case, weight_format in SHOWN.items():
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
