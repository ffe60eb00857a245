"""Learning rate, lambda and event times over a run. In: a step, the run's length, the config. Out: multipliers and steps.

`step` counts the updates already made, so it is also the index, from 0, of the one about to be made; the run's updates are
0 ... total_steps - 1. Pure functions: a resumed run needs no state of theirs.
"""

import math
from collections.abc import Sequence

from gsae.config import ResamplingConfig, ScheduleConfig

_RECOVERY_FRACTION = 0.05
"""Upper bound of the return of the learning rate after a resampling event, as a share of the run."""


def learning_rate_multiplier(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """Share of the full learning rate: the warm-up times the schedule's shape."""
    return _rise(step, _learning_rate_warmup_steps(total_steps, config)) * _shape(step, total_steps, config)


def lambda_multiplier(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """Share of the full lambda."""
    return _rise(step, _lambda_warmup_steps(total_steps, config))


def warmup_steps(total_steps: int, config: ScheduleConfig) -> int:
    """Steps until both the learning rate and lambda have risen to their full values."""
    return max(_learning_rate_warmup_steps(total_steps, config), _lambda_warmup_steps(total_steps, config))


def _learning_rate_warmup_steps(total_steps: int, config: ScheduleConfig) -> int:
    return min(round(config.warmup_fraction * total_steps), config.max_warmup_steps)


def _lambda_warmup_steps(total_steps: int, config: ScheduleConfig) -> int:
    return min(round(config.lambda_warmup_fraction * total_steps), config.max_lambda_warmup_steps)


def recovery_multiplier(step: int, event_step: int | None, total_steps: int, config: ResamplingConfig) -> float:
    """Further factor on the learning rate after features were resampled.

    At the first update after the event it is `learning_rate_factor`; it returns to 1 by half a cosine over `recovery_steps`,
    at most 5 % of the run.

    Args:
        step: updates made.
        event_step: `step` at the last event that resampled any feature; None when there was none.
        total_steps: updates of the run.
        config: the resampling settings.
    """
    recovery_steps = min(config.recovery_steps, round(_RECOVERY_FRACTION * total_steps))
    if event_step is None or not 0 <= step - event_step < recovery_steps:
        return 1.0
    returned = (1 - math.cos(math.pi * (step - event_step) / recovery_steps)) / 2
    return config.learning_rate_factor + (1 - config.learning_rate_factor) * returned


def event_steps(fractions: Sequence[float], total_steps: int) -> tuple[int, ...]:
    """The steps nearest to shares of the run: at least 1, rising, each once."""
    return tuple(sorted({max(1, round(fraction * total_steps)) for fraction in fractions}))


def _rise(step: int, num_steps: int) -> float:
    """A line from 0, before the first update, to 1 at the last of `num_steps` updates."""
    return min(1.0, (step + 1) / num_steps) if num_steps > 0 else 1.0


def _shape(step: int, total_steps: int, config: ScheduleConfig) -> float:
    match config.kind:
        case "constant":
            return 1.0
        case "linear":
            decay_steps = round(config.decay_fraction * total_steps)
            return min(1.0, (total_steps - step) / decay_steps) if decay_steps > 0 else 1.0
        case "cosine":
            return _half_cosine(step / total_steps)
        case "cosine-restarts":
            return _half_cosine((step * config.num_cycles) % total_steps / total_steps)


def _half_cosine(phase: float) -> float:
    """From 1 at phase 0 to 0 at phase 1."""
    return (1 + math.cos(math.pi * phase)) / 2
