"""Forwards that are collectives. In: ranks with unequal numbers of LLM batches. Out: as many forwards on each.

Where the LLM's parameters are split over ranks, a forward needs all of them: a rank that ran one alone would wait for ever.
"""

from collections.abc import Callable

from gsae.world import Group


class Lockstep:
    """Ranks agree before each forward whether any of them still has work; those that have none run a dummy forward.

    Args:
        group: the ranks that the LLM is split over.
        needed: whether forwards are collectives; otherwise nothing here does anything.
        dummy: runs one forward of any shape through the same layers as the work.
        on_turn: called before each forward that the ranks make together, as a sign of life: where one rank hangs, the others wait for it
            in the same forward, and the one that has had fewer turns is at fault.
    """

    def __init__(self, group: Group, needed: bool, dummy: Callable[[], None], on_turn: Callable[[], None]) -> None:
        self._group = group
        self._needed = needed
        self._dummy = dummy
        self._on_turn = on_turn

    def before_forward(self) -> None:
        """This rank is about to run exactly one forward. No other collective may come between."""
        if self._needed:
            self._on_turn()
            self._group.any(True)

    def finish(self) -> None:
        """This rank has no more work: it joins the others' forwards until nobody has any."""
        while self._needed:
            self._on_turn()
            if not self._group.any(False):
                return
            self._dummy()
