"""New directions for dead features (Bricken et al. 2023, appendix). In: firing counts and fresh rows. Out: changed slices of one SAE.

`plan` says which features are dead; it is pure, and the same on every rank that holds them. `apply` draws rows with probability
proportional to loss^2 and makes features of them. The draw depends on the rows alone, not on ranks or order: a row's key is
log(u) / loss^2 with u a hash of (seed, run, event, lane, row), and the largest keys win (Efraimidis and Spirakis 2006, weighted
sampling without replacement). The drawn rows, in the order of (lane, row), go to the dead features in their order, however those are
split over ranks.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gsae.config import ResamplingConfig
from gsae.sae.objective import SAE
from gsae.store.stream import Batch
from gsae.train.firing import FiringCounter
from gsae.train.optim import SAEOptimizer
from gsae.world import Group

_DEAD_FRACTION = 0.2
"""Upper bound of `dead_after_rows`, as a share of the run."""
_CANDIDATE_FRACTION = 0.05
"""Upper bound of `max_candidate_rows`, as a share of the run."""
_DENSITY_ROWS = 16_384
"""Rows, drawn evenly from the candidates, on which `gate_bias: median-density` places a gate's quantile."""
_QUANTILE_FEATURES = 1024
"""Features whose quantiles are taken at once."""


@dataclass(frozen=True, eq=False)
class ResamplingPlan:
    """What an event will do."""

    event: int
    """Ordinal of the event in the run."""
    dead: Bool[Tensor, " features"]
    """Of this rank's features."""
    dead_of_parts: tuple[int, ...]
    """How many there are in each part of the dictionary; of one in one part, in all."""
    dead_rows: int
    """Rows without firing after which a feature counts as dead."""
    candidate_rows: int
    """Fresh rows to draw from, over all ranks; 0 when nothing is to be resampled."""
    refused: str | None
    """Why nothing is resampled, if the event is refused."""


@dataclass(frozen=True, eq=False)
class ResamplingReport:
    """What an event did."""

    dead: int
    """Dead features found."""
    resampled: int
    """Features that got a new direction: the dead ones, or fewer where the candidates ran out."""
    dead_rows: int
    """Rows without firing after which a feature counted as dead."""
    candidate_rows: int
    """Rows drawn from, over all ranks."""
    refused: str | None
    """Why nothing was resampled, if the event was refused."""
    features: Int[Tensor, " resampled"]
    """The resampled ones of this rank's features."""


def dead_after(config: ResamplingConfig, total_rows: int, interval_rows: int) -> int:
    """Rows without firing after which a feature counts as dead: `dead_after_rows`, at most 20 % of the run, at least half the interval."""
    return max(min(config.dead_after_rows, int(_DEAD_FRACTION * total_rows)), interval_rows // 2, 1)


def plan(firing: FiringCounter, config: ResamplingConfig, total_rows: int, event: int, holders: Group | None = None) -> ResamplingPlan:
    """Find the dead features, or the reason to refuse. A refused event leaves the firing interval running.

    Args:
        firing: the run's counts, synchronised.
        config: the resampling settings.
        total_rows: rows of the run.
        event: ordinal of the event in the run.
        holders: the ranks that hold a part of the dictionary each; with them it is a collective.
    """
    dead_rows = dead_after(config, total_rows, firing.interval_rows)
    dead = firing.dead(dead_rows)
    refused = None
    if firing.interval_rows < config.min_interval_rows:
        least = config.min_interval_rows
        refused = f"the firing interval holds {firing.interval_rows} rows, fewer than train.resampling.min_interval_rows ({least})"
    elif firing.rows < dead_rows:
        refused = f"{firing.rows} rows were seen, fewer than the {dead_rows} after which a feature counts as dead"
    num_dead = int(dead.sum())
    dead_of_parts = (num_dead,) if holders is None else tuple(holders.gather_objects(num_dead))
    is_idle = refused is not None or not any(dead_of_parts)
    candidate_rows = 0 if is_idle else max(1, min(config.max_candidate_rows, int(_CANDIDATE_FRACTION * total_rows)))
    return ResamplingPlan(event, dead, dead_of_parts, dead_rows, candidate_rows, refused)


@torch.no_grad()
def apply(
    plan: ResamplingPlan,
    sae: SAE,
    optimizer: SAEOptimizer,
    candidates: Iterable[Batch],
    *,
    config: ResamplingConfig,
    seed: int,
    run_name: str,
    group: Group,
) -> ResamplingReport:
    """Give the dead features new directions and fresh optimizer state. A collective; all ranks end with the same parameters.

    The decoder row becomes the unit vector of the drawn row less b_dec (or of its residual), the encoder column the same
    direction at `encoder_norm` times the mean norm of the alive ones (1 when none is alive), biases and r_mag 0, and the gate's bias
    0 or at the alive features' median density.

    Args:
        plan: what `plan` found.
        sae: the SAE; only slices of dead features are changed.
        optimizer: its optimizer.
        candidates: fresh local batches in the SAE's type and unit, on its device; not read when there is nothing to do.
        config: the resampling settings.
        seed: the run's seed.
        run_name: the run's name; with seed and event it makes the draw its own.
        group: the ranks that train this SAE.
    """
    dead, num_dead = plan.dead.nonzero().flatten(), sum(plan.dead_of_parts)
    if plan.candidate_rows == 0:
        return ResamplingReport(num_dead, 0, plan.dead_rows, 0, plan.refused, dead[:0])
    with group.together():
        survey = _survey(sae, candidates, num_dead, f"{seed}/{run_name}/{plan.event}", config)
    rows = int(group.reduce(torch.tensor(survey.rows), "sum"))
    place = 0 if group.features is None else group.features.rank
    num_drawn, drawn = survey.drawn.merge(group, plan.dead_of_parts, place)
    features = dead[: len(drawn)]
    if num_drawn > 0:
        directions = drawn / torch.linalg.vector_norm(drawn, dim=1, keepdim=True)
        encoder = directions * (config.encoder_norm * _mean_norm(sae.encoder[:, ~plan.dead], group.features))
        gate_bias = encoder.new_zeros(len(features))
        if config.gate_bias == "median-density":
            sample = survey.sample.merge(group, (_DENSITY_ROWS,), 0)[1] - sae.b_dec
            alive_fired = group.rows.reduce(survey.fired, "sum")[~plan.dead]
            alive_fired = alive_fired if group.features is None else group.features.gather(alive_fired)
            gate_bias = _gate_bias(encoder, sample, alive_fired, rows)
        given = (group.rows.broadcast(values) for values in (encoder, directions, gate_bias))
        sae.replace_features(features, *given)
        optimizer.reset_slices(features, ~plan.dead)
    return ResamplingReport(num_dead, num_drawn, plan.dead_rows, rows, plan.refused, features)


def _mean_norm(encoder: Float[Tensor, "d_model alive"], holders: Group | None) -> float:
    """The mean norm of the alive features' encoder directions, over all parts of the dictionary; 1 where none is alive."""
    norms = torch.linalg.vector_norm(encoder, dim=0).double()
    sums = torch.stack([norms.sum(), norms.new_tensor(len(norms))])
    total, count = (sums if holders is None else holders.reduce(sums, "sum")).tolist()
    return total / count if count else 1.0


@dataclass(frozen=True, eq=False)
class KeyedRows:
    """The rows with the largest keys among those added, in order of (lane, row). Only the vectors are on the device."""

    capacity: int
    """How many are kept."""
    key: Float[Tensor, " rows"]
    lane: Int[Tensor, " rows"]
    row: Int[Tensor, " rows"]
    vectors: Float[Tensor, "rows d_model"]

    @classmethod
    def empty(cls, capacity: int, like: Float[Tensor, " d_model"]) -> Self:
        """No rows yet."""
        names = torch.zeros(0, dtype=torch.int64)
        return cls(capacity, torch.zeros(0, dtype=torch.float64), names, names, like.new_zeros(0, len(like)))

    def add(
        self, key: Float[Tensor, " rows"], lane: Int[Tensor, " rows"], row: Int[Tensor, " rows"], vectors: Float[Tensor, "rows d_model"]
    ) -> Self:
        """These rows and others, of which the best stay. Rows whose key is not finite have no weight and never stay."""
        keys, lanes, rows = (torch.cat(pair) for pair in ((self.key, key), (self.lane, lane), (self.row, row)))
        best = _best(keys, lanes, rows, self.capacity)
        return type(self)(self.capacity, keys[best], lanes[best], rows[best], torch.cat([self.vectors, vectors])[best.to(vectors.device)])

    def merge(self, group: Group, shares: Sequence[int], place: int) -> "Merged":
        """The best rows of all ranks, in order of (lane, row), dealt in shares. A collective; only the winners' vectors travel.

        Args:
            group: the ranks that have some of the rows each.
            shares: how many rows the first share has, the second, and so on, where there are so many.
            place: which of them this rank wants; it has no two shares in memory at once.
        """
        owner = group.gather(torch.full_like(self.lane, group.rank))
        best = _best(group.gather(self.key), group.gather(self.lane), group.gather(self.row), self.capacity)
        own_before = int((owner < group.rank).sum())
        wanted = self.vectors[:0]
        for number, share in enumerate(torch.split(best, _clipped(shares, len(best)))):
            owner_of_share = owner[share]
            mine = share[owner_of_share == group.rank] - own_before
            gathered = group.gather(self.vectors[mine.to(self.vectors.device)])
            if number == place:
                wanted = torch.empty_like(gathered)
                wanted[owner_of_share.argsort(stable=True).to(wanted.device)] = gathered
        return Merged(len(best), wanted)


class Merged(NamedTuple):
    """What all ranks together had."""

    total: int
    """Rows of all shares."""
    rows: Float[Tensor, "rows d_model"]
    """Those of this rank's share."""


def _clipped(shares: Sequence[int], total: int) -> list[int]:
    """The shares of `total` things, of which the last ones may get fewer or none."""
    clipped = []
    for share in shares:
        clipped.append(min(share, total))
        total -= clipped[-1]
    return clipped


def _best(key: Tensor, lane: Tensor, row: Tensor, capacity: int) -> Tensor:
    """Indices of the `capacity` largest finite keys, in order of (lane, row), which also decides ties; a row counts once."""
    order = row.argsort(stable=True)
    order = order[lane[order].argsort(stable=True)]
    is_new = torch.ones_like(order, dtype=torch.bool)
    is_new[1:] = (lane[order].diff() != 0) | (row[order].diff() != 0)
    order = order[is_new & key[order].isfinite()]
    return order[key[order].argsort(descending=True, stable=True)[:capacity].sort().values]


def draw_keys(loss: Float[Tensor, " rows"], lane: Int[Tensor, " rows"], row: Int[Tensor, " rows"], name: str) -> Float[Tensor, " rows"]:
    """log(u) / loss^2 in float64 on the CPU, u in (0, 1) a hash of (name, lane, row). Rows of loss 0, NaN or infinity get -inf.

    The k largest keys are a draw of k rows without replacement with probability proportional to loss^2.
    """
    state = np.full(len(lane), int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()), dtype=np.uint64)
    for part in (lane, row):
        state = _splitmix64(state + (part.cpu().numpy().astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    u = torch.from_numpy(((state >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)
    weight = loss.cpu().double().square()
    return torch.where(weight.isfinite() & (weight > 0), u.log() / weight, -torch.inf)


def _splitmix64(state: "np.ndarray[tuple[int], np.dtype[np.uint64]]") -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
    """The output function of SplitMix64 (Steele, Lea and Flood 2014), a bijection of 64-bit words."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


@dataclass
class _Survey:
    """What one pass over this rank's candidates found. The ranks that see the same rows share them out to keep."""

    drawn: KeyedRows
    """Rows to make features of, less b_dec or as residuals."""
    sample: KeyedRows
    """Rows as they are, drawn evenly; only for `gate_bias: median-density`."""
    fired: Int[Tensor, " features"]
    """Rows at which each feature was on."""
    rows: int = 0


def _survey(sae: SAE, candidates: Iterable[Batch], num_draws: int, name: str, config: ResamplingConfig) -> _Survey:
    needs_sample = config.gate_bias == "median-density"
    survey = _Survey(
        KeyedRows.empty(num_draws, sae.b_dec),
        KeyedRows.empty(_DENSITY_ROWS, sae.b_dec),
        torch.zeros(sae.num_features, dtype=torch.int64, device=sae.b_dec.device),
    )
    for batch in candidates:
        lane, row = batch.lane.cpu(), batch.row.cpu()
        f = sae.encode(batch.x)
        residual = batch.x - sae.decode(f)
        survey.fired += (f > 0).sum(dim=0)
        if sae.part is not None:
            own = slice(sae.part.holders.rank, None, sae.part.holders.size)
            batch, residual = replace(batch, x=batch.x[own]), residual[own]
            lane, row = lane[own], row[own]
        vectors = residual if config.direction == "residual" else batch.x - sae.b_dec
        has_direction = torch.linalg.vector_norm(vectors, dim=1) > 0
        loss = torch.where(has_direction, residual.square().sum(dim=1), 0.0)
        survey.drawn = survey.drawn.add(draw_keys(loss, lane, row, name), lane, row, vectors)
        if needs_sample:
            is_finite = residual.isfinite().all(dim=1).double()
            survey.sample = survey.sample.add(draw_keys(is_finite, lane, row, f"{name}/density"), lane, row, batch.x)
        survey.rows += len(batch.x)
    return survey


def _gate_bias(encoder: Tensor, sample: Tensor, alive_fired: Tensor, rows: int) -> Tensor:
    """Biases that open each new gate on as large a share of `sample` (x - b_dec) as the median alive feature is on for; 0 without one."""
    if len(alive_fired) == 0 or len(sample) < 2:
        return encoder.new_zeros(len(encoder))
    density = float(alive_fired.double().median()) / rows
    num_open = min(max(1, round(density * len(sample))), len(sample) - 1)
    largest = [(sample @ part.T).topk(num_open + 1, dim=0).values[-2:] for part in torch.split(encoder, _QUANTILE_FEATURES)]
    return -torch.cat(largest, dim=1).mean(dim=0)
