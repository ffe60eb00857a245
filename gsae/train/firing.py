"""When features were on. In: the counts of each local batch. Out: counts and dead features, over all ranks."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from gsae.world import Group


class FiringCounter:
    """Counts, over a firing interval, the rows a feature was on for, and remembers the row at which it last was.

    `update` adds to this rank's own counts and never waits for the device. `synchronise` moves them into the counts over all
    ranks, once; everything else is read from those. Rows are numbered by how many rows of the run, over all ranks, were
    seen: a batch's rows all bear the number of its end, so that the numbers do not depend on how ranks share the batch.
    """

    def __init__(self, num_features: int, device: torch.device) -> None:
        """Count nothing yet; of a part of a dictionary `num_features` are those of the part."""
        self.rows = 0
        """Rows of the run seen, over all ranks."""
        self.interval_start = 0
        """`rows` when the firing interval began."""
        self._fired, self._opened, self._last_fired = (torch.zeros(num_features, dtype=torch.int64, device=device) for _ in range(3))
        self._local_fired, self._local_opened = torch.zeros_like(self._fired), torch.zeros_like(self._opened)
        self._is_synchronised = True

    @property
    def interval_rows(self) -> int:
        """Rows of the firing interval so far, over all ranks."""
        return self.rows - self.interval_start

    @property
    def fired(self) -> Int[Tensor, " features"]:
        """Rows of the interval at which the feature was on (f > 0)."""
        self._require_synchronised()
        return self._fired

    @property
    def open_at_zero(self) -> Int[Tensor, " features"]:
        """Rows of the interval at which the gate was open but the magnitude 0, so that the feature was off."""
        self._require_synchronised()
        return self._opened - self._fired

    @property
    def last_fired(self) -> Int[Tensor, " features"]:
        """The number of the row at which the feature was last on; 0 when it never was."""
        self._require_synchronised()
        return self._last_fired

    @torch.no_grad()
    def update(self, fired: Int[Tensor, " features"], opened: Int[Tensor, " features"], batch_rows: int) -> None:
        """Count one local batch.

        Args:
            fired: this rank's rows at which each feature was on.
            opened: this rank's rows at which each gate was open, at least as many.
            batch_rows: rows of the whole batch, over all ranks.
        """
        self.rows += batch_rows
        self._local_fired += fired
        self._local_opened += opened
        self._last_fired.masked_fill_(fired > 0, self.rows)
        self._is_synchronised = False

    def synchronise(self, group: Group) -> None:
        """Bring the counts of all ranks that hold these features together. A collective; a second call in a row changes nothing."""
        group = group.rows
        self._fired += group.reduce(self._local_fired, "sum")
        self._opened += group.reduce(self._local_opened, "sum")
        self._last_fired = group.reduce(self._last_fired, "max")
        self._local_fired.zero_()
        self._local_opened.zero_()
        self._is_synchronised = True

    def start_interval(self) -> None:
        """Begin a new firing interval: the counts are 0, the rows at which features last fired stay."""
        self._require_synchronised()
        self._fired.zero_()
        self._opened.zero_()
        self.interval_start = self.rows

    def dead(self, dead_rows: int) -> Bool[Tensor, " features"]:
        """Features that were not on for the last `dead_rows` rows or more."""
        return self.rows - self.last_fired >= dead_rows

    def dead_fraction(self, dead_rows: int, holders: Group | None = None) -> float:
        """Share of features that are dead; with the ranks that hold a part of the dictionary each, of all its features: a collective."""
        fraction = self.dead(dead_rows).double().mean()
        return float(fraction if holders is None else holders.reduce(fraction, "sum") / holders.size)

    def state_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint needs; the same on all ranks, whatever their number."""
        position = torch.tensor([self.rows, self.interval_start], dtype=torch.int64)
        self._require_synchronised()
        return {"position": position, "fired": self._fired, "opened": self._opened, "last_fired": self._last_fired}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state_tensors` gave, from any device."""
        self.rows, self.interval_start = tensors["position"].tolist()
        for own, name in ((self._fired, "fired"), (self._opened, "opened"), (self._last_fired, "last_fired")):
            own.copy_(tensors[name])
        self._local_fired.zero_()
        self._local_opened.zero_()
        self._is_synchronised = True

    def _require_synchronised(self) -> None:
        if not self._is_synchronised:
            raise RuntimeError("the firing counts of the ranks are apart; call synchronise on all ranks first")
