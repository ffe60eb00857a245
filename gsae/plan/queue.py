"""Which group trains which site, and when. In: how long each site takes. Out: the turns that groups take at the queue of sites.

Groups take the sites in layer order; one that has finished takes the next that is left.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WORTH_A_CHANGE = 0.95
"""Share of the time below which another number of groups is named."""


@dataclass(frozen=True)
class Turn:
    """A site that a group trains."""

    site: str
    group: int
    begin_hours: float | None
    """From the start of the training; None without a rate."""
    end_hours: float | None


@dataclass(frozen=True)
class Sooner:
    """Another number of groups, of the same ranks, that would be through before this one."""

    groups: int
    time_fraction: float
    """Of the time that this one takes."""


@dataclass(frozen=True)
class Queue:
    """The sites on the groups."""

    turns: tuple[Turn, ...]
    """In the order in which sites are taken."""
    idle_groups: tuple[int, ...]
    """Groups that get no site."""
    hours: float | None
    """Until the last group is through."""
    sooner: Sooner | None


def plan_queue(
    sites: Sequence[str], time_of: Callable[[int, int], float], *, ranks: int, groups: int, num_lanes: int, in_hours: bool
) -> Queue:
    """Deal the sites to the groups, and look whether another number of groups would do better.

    Args:
        sites: in the order in which they are taken.
        time_of: the time that a site, by its place, takes a group of so many ranks.
        ranks: ranks of the job.
        groups: groups that they are cut into.
        num_lanes: lanes of the store, which the ranks of a group share evenly.
        in_hours: whether times are hours; otherwise only their ratios mean something.
    """

    def deal(number: int) -> list[tuple[int, float, float]]:
        return take_turns([time_of(place, max(1, ranks // number)) for place in range(len(sites))], number)

    def length(number: int) -> float:
        return max(end for _, _, end in deal(number))

    dealt = deal(groups)
    turns = tuple(
        Turn(site, group, *((begin, end) if in_hours else (None, None))) for site, (group, begin, end) in zip(sites, dealt, strict=True)
    )
    possible = [number for number in range(1, ranks + 1) if ranks % number == 0 and num_lanes % (ranks // number) == 0]
    best = min((number for number in possible if number <= len(sites)), key=lambda number: (length(number), -number), default=groups)
    share = length(best) / length(groups)
    is_sooner = ranks % groups == 0 and share < WORTH_A_CHANGE
    idle = tuple(range(len(sites), groups))
    return Queue(turns, idle, length(groups) if in_hours else None, Sooner(best, share) if is_sooner else None)


def take_turns(times: Sequence[float], groups: int) -> list[tuple[int, float, float]]:
    """The group, begin and end of each piece of work, taken in order by whichever group is free first; of several the first."""
    free = [(0.0, group) for group in range(groups)]
    turns = []
    for time in times:
        begin, group = heapq.heappop(free)
        turns.append((group, begin, begin + time))
        heapq.heappush(free, (begin + time, group))
    return turns
