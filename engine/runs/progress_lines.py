"""What a run does as a line of a log, for those who have no page before them. English; holds no state."""

from collections.abc import Mapping
from typing import Any

from .phases import Phase

_WORDS = {
    Phase.OPENING: "Opening the model's files",
    Phase.QUANTIZING: "Quantizing: block",
    Phase.ENCODING: "Encoding prompts: layer",
    Phase.PREPARING: "Preparing to sample",
    Phase.LOADING: "Loading what stays on the device: block",
    Phase.MODULATION: "Reading weights once (not for the next seed): block",
    Phase.ENCODING_IMAGE: "Encoding an image: tile",
    Phase.DECODING: "Decoding: tile",
    Phase.MEASURING: "Measuring this machine: part",
}


def progress_line(progress: Mapping[str, Any]) -> str:
    """Of one event, as `Surroundings.tell` has it."""
    stage, seconds = progress["stage"], clock(progress.get("seconds", 0.0))
    if stage == "done":
        return f"Sampled {progress['steps']} steps in {seconds}"
    if stage == "stopped":
        return f"Sampling was stopped after {progress['step']} of {progress['steps']} steps, {seconds}"
    if stage == Phase.SAMPLING.value:
        left = f"about {clock(progress['seconds_left'])} left"
        return f"Sampling: step {progress['step']}/{progress['steps']}, {seconds}, {left}"
    words, done, total = _WORDS[Phase(stage)], progress.get("done", 0), progress.get("total", 0)
    if stage == Phase.OPENING.value and total:
        return f"Opened the model's files in {seconds}"
    if not total:
        return words.partition(":")[0]
    return (
        f"{words} {min(done + 1, total)}/{total}, {seconds}" if done < total else f"{words} {done}/{total}: {seconds}"
    )


def clock(seconds: float) -> str:
    """1:12, or 2:03:45."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
