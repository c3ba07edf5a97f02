"""Choose in which format a model's weights are held on this machine. Forecasts in, a name out; imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import DoesNotFit
from .footprint import TransformerFootprint
from .forecast import Speeds, StepForecast
from .memory import plan_memory
from .request import Limits, SamplingRequest

# a more faithful format may cost this much of the fastest one's time
TOLERANCE = 1.10


@dataclass(frozen=True)
class FormatChoice:
    """The format that is to be used, and what every format that fits would take. Prints as one line."""

    name: str
    forecasts: Mapping[str, StepForecast]

    def __str__(self) -> str:
        formats = ", ".join(f"{name} {forecast.seconds:.2f} s" for name, forecast in self.forecasts.items())
        return f"{self.name} (per step: {formats or 'none fits'})"


def choose_format(
    footprints: Mapping[str, TransformerFootprint], request: SamplingRequest, limits: Limits, speeds: Speeds
) -> FormatChoice:
    """The most faithful format whose forecast is within TOLERANCE of the fastest one's that fits.

    `footprints` of the model in each format, the most faithful first, which it is where none fits.
    """
    forecasts: dict[str, StepForecast] = {}
    for name, footprint in footprints.items():
        try:
            forecasts[name] = plan_memory(footprint, request, limits, speeds).forecast
        except DoesNotFit:
            continue
    fastest = min((forecast.seconds for forecast in forecasts.values()), default=0.0)
    fit = (name for name, forecast in forecasts.items() if forecast.seconds <= TOLERANCE * fastest)
    return FormatChoice(next(fit, next(iter(footprints))), forecasts)
