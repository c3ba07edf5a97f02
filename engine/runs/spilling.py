"""Steps that take far longer than forecast because a driver lends RAM to a full card. Says so; changes nothing."""

import os

# such steps take several times as long; another program that computes takes half of the card's time at most
SLOW = 3.0


def spill_warning(seconds: float, forecast_seconds: float, *, system: str = os.name) -> str:
    """What to tell of steps whose computing took `seconds` on a card, waits for blocks left out; empty where nothing is
    to be told.

    On Windows memory that does not fit on a card raises nothing: the driver lends it of RAM ("shared GPU memory").
    """
    if system != "nt" or seconds < SLOW * forecast_seconds:
        return ""
    return (
        f"Computing took {seconds:.1f} s per step, {seconds / forecast_seconds:.0f} times the forecast of "
        f"{forecast_seconds:.1f} s. "
        "On Windows this usually means that the card is full and its driver uses RAM instead. What to do: close "
        "programs that use the card, set vram_limit_gb 1 GB lower, or set 'CUDA - Sysmem Fallback Policy' to 'Prefer "
        "No Sysmem Fallback' in NVIDIA's control panel: then it is noticed when memory runs out, and a smaller plan is "
        "made."
    )
