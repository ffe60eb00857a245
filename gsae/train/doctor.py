"""What binds the speed of a training. In: the seconds of each rank. Out: their shares of the group's time, and a verdict in words.

A step takes as long as the way that reaches the sum of the gradients last; the other ranks wait for it there. So over ranks
    waiting, copying, chores = the most of any rank: it held up the others
    communicating            = the least of any rank: whoever came last waited for nobody, and what it still waited for is the sum itself
    computing                = the rest
A rank whose reads are slow shows as waiting and not as communicating of the others, one whose GPU is slow as computing.
"""

from dataclasses import asdict

import torch

from gsae.train.clock import Seconds
from gsae.world import Group

_NAMES = {
    "waiting": "waiting for data",
    "copying": "copying",
    "computing": "computing",
    "communicating": "communicating",
    "chores": "chores",
}


def critical_path(own: Seconds, group: Group) -> Seconds:
    """What the group's time went for, from what each rank's did. A collective."""
    values = [own.total, own.waiting, own.copying, own.chores, -own.communicating]
    total, waiting, copying, chores, negative = group.reduce(torch.tensor(values, dtype=torch.float64), "max").tolist()
    computing = max(0.0, total - waiting - copying - chores + negative)  # two ranks may be held up by different things
    return Seconds(waiting, copying, computing, -negative, chores)


def shares(seconds: Seconds) -> dict[str, float]:
    """Each as a share of all."""
    return {phase: value / seconds.total for phase, value in asdict(seconds).items()}


def verdict(seconds: Seconds) -> str:
    """What binds and the shares of all, for a line of the log."""
    found = shares(seconds)
    first = max(found, key=found.__getitem__)
    rest = ", ".join(f"{_NAMES[phase]} {100 * share:.0f} %" for phase, share in found.items() if phase != first)
    return f"{_NAMES[first]} {'bind' if first == 'chores' else 'binds'} ({100 * found[first]:.0f} % of the time; {rest})"


def brief(seconds: Seconds) -> str:
    """The shares in at most 75 characters."""
    return ", ".join(f"{phase} {100 * share:.0f}%" for phase, share in shares(seconds).items())
