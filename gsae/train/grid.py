"""From what pilots found to lambda. In: lambda and L0 of each, a target L0. Out: the lambda that gives it, or lambdas to try next.

log L0 is a line in log lambda between two neighbours, and never rises: neighbours that noise makes rise share their mean.
Short runs end with more L0 than long ones, so the lambdas that two lengths tell are followed to the whole one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gsae.errors import ConfigError

MAX_DECADES = 2
"""Tried beyond the first lambdas, at either end."""
_LAMBDAS_A_DECADE = 3
_LESS = 0.65
"""How much lower than on shorter pilots the lambdas of longer ones begin."""
_POWER = 0.5
_LEAST_L0 = 0.1
"""A pilot that is all but closed counts as this open: below, L0 has no logarithm worth a line."""


@dataclass(frozen=True)
class Pilot:
    """What one pilot found."""

    lambda_: float
    l0: float | None
    """Features on per row at its end; None where it diverged."""
    fvu: float | None
    rows: int


def wanted_lambdas(pilots: Sequence[Pilot], targets: Sequence[float], first: Sequence[float], where: str) -> list[float]:
    """The lambdas to try next; none where all targets lie between two pilots.

    Args:
        pilots: what was found so far.
        targets: the values of L0 that are looked for.
        first: the lambdas to begin with.
        where: what the pilots are of, for messages.

    Raises:
        ConfigError: a target is beyond all that may be tried.
    """
    first = [rounded(lambda_) for lambda_ in first]
    tried = {pilot.lambda_ for pilot in pilots}
    missing = [lambda_ for lambda_ in first if lambda_ not in tried]
    if missing:
        return missing
    found = [pilot.l0 for pilot in pilots if pilot.l0 is not None]
    if not found:
        raise ConfigError(f"{where}: all pilots diverged; lower the learning rate, or give the sweep lambdas instead of train.target_l0")
    is_above, is_below = max(targets) > max(found), min(targets) < min(found)
    limit = 10.0**MAX_DECADES * 1.001  # lambdas are rounded
    if (is_above and min(tried) * limit < 10 * min(first)) or (is_below and max(tried) > max(first) * limit / 10):
        target = max(targets) if is_above else min(targets)
        raise ConfigError(
            f"{where}: pilots with lambda {min(tried):g} to {max(tried):g} ended with L0 {max(found):.3g} to {min(found):.3g}, "
            f"so none is near train.target_l0 {target:g}; give a target within, or other train.pilot.lambdas"
        )
    steps = [10 ** (number / _LAMBDAS_A_DECADE) for number in range(1, _LAMBDAS_A_DECADE + 1)]
    below = [min(tried) / step for step in reversed(steps)] if is_above else []
    above = [max(tried) * step for step in steps] if is_below else []
    return [rounded(lambda_) for lambda_ in below + above]


def interpolate(pilots: Sequence[Pilot], target_l0: float) -> float:
    """The lambda at which pilots would end with an L0; it lies between those of two."""
    usable = sorted((pilot.lambda_, max(pilot.l0, _LEAST_L0)) for pilot in pilots if pilot.l0 is not None)
    log_lambda = [math.log(lambda_) for lambda_, _ in usable]
    log_l0 = falling([math.log(l0) for _, l0 in usable])
    target = math.log(target_l0)
    left = max(number for number, value in enumerate(log_l0) if value >= target or number == 0)
    right = min(number for number, value in enumerate(log_l0) if value <= target or number == len(log_l0) - 1)
    if log_l0[left] == log_l0[right]:  # a level stretch at the target, or a target beyond what the averages leave
        return rounded(math.exp((log_lambda[left] + log_lambda[right]) / 2))
    share = (log_l0[left] - target) / (log_l0[left] - log_l0[right])
    return rounded(math.exp(log_lambda[left] + share * (log_lambda[right] - log_lambda[left])))


def near(pilots: Sequence[Pilot], targets: Sequence[float]) -> list[float]:
    """The lambdas to try on longer pilots: the answers of shorter ones and less, as longer ones end with less L0. Two a target."""
    answers = [interpolate(pilots, target) for target in targets]
    return sorted({rounded(factor * answer) for answer in answers for factor in (_LESS, 1)})


def extrapolate(short: float, long: float, share: float) -> float:
    """The lambda of a whole run, from those of pilots of `share` of its length and of half of that.

    log lambda = a + b / length^p; what runs of a small Llama took is on both sides of this p.
    """
    return rounded(long * (long / short) ** ((1 - share**_POWER) / (2**_POWER - 1)))


def falling(values: Sequence[float]) -> list[float]:
    """The nearest values, by squared distance, that never rise."""
    blocks: list[list[float]] = []  # neighbours that share their mean
    for value in values:
        blocks.append([value])
        while len(blocks) > 1 and _mean(blocks[-2]) < _mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    return [_mean(block) for block in blocks for _ in block]


def rounded(lambda_: float) -> float:
    """To four digits: what ranks differ in by the order of their sums is gone, and pilots tell no more."""
    return float(f"{lambda_:.4g}")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
