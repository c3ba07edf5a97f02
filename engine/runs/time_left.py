"""How long a run of sampling will still take: by its forecast until a step is measured, then by the steps so far."""

from ..planning.run_forecast import RunForecast


class TimeLeft:
    """Seconds in, seconds out. The first step also reads what is to stay in host memory, so that it tells of the others
    only as its forecast does; from the second on they tell of themselves."""

    def __init__(self, forecast: RunForecast, steps: int) -> None:
        self._forecast, self._steps = forecast, max(1, steps)
        self._cold = False
        self._ends: list[float] = []  # of each step that is done, from the first one's beginning

    def replanned(self, forecast: RunForecast) -> None:
        self._forecast = forecast

    def reads(self) -> None:
        """The run has begun to read weights: it is the first of them, or what was there has gone."""
        self._cold = True

    def step_ended(self, seconds: float) -> None:
        """The next step is done, so long after the first one began."""
        self._ends.append(seconds)

    @property
    def step_seconds(self) -> float | None:
        """Of a measured step, without the first where there are others; None before there is any."""
        if len(self._ends) < 2:
            return self._ends[0] if self._ends else None
        return (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)

    def of_steps(self, part: float) -> float:
        """For what is left of the steps, `part` of the present one being done."""
        done = len(self._ends)
        left = max(0.0, self._steps - done - min(1.0, max(0.0, part)))
        if not done:
            return max(0.0, left - self._steps + 1) * self._first + (self._steps - 1) * self._other
        if done == 1:
            return left * self._other * (self._ends[0] / self._first if self._first else 1.0)
        return left * (self.step_seconds or 0.0)

    def of_all(self, loading: float, reading: float) -> float:
        """Before the first step: these parts of what is loaded, and of what is read once, are yet to do."""
        return loading * self._forecast.load_seconds + reading * self._forecast.modulation_seconds + self.of_steps(0.0)

    @property
    def _first(self) -> float:
        return self._forecast.first_step_seconds if self._cold else self._forecast.step_seconds

    @property
    def _other(self) -> float:
        """Of a step behind the first; of steps that are not computed the seconds are spread over all."""
        others = max(0, self._forecast.computed - 1) / max(1, self._steps - 1)
        return self._forecast.step_seconds * others
