"""Resampling: who is dead, what is drawn, what changes; the same on one rank and on two (as a script, this file is one of the two)."""

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gsae.config import ResamplingConfig
from gsae.sae.objective import build, objective
from gsae.store.stream import Batch
from gsae.train.firing import FiringCounter
from gsae.train.optim import SAEOptimizer
from gsae.train.resample import ResamplingPlan, apply, dead_after, draw_keys, plan
from gsae.world import Group, lanes_of, start

D_MODEL, NUM_FEATURES, NUM_LANES = 6, 24, 4
DEAD = [1, 4, 5, 9, 16, 22]
ALIVE = [feature for feature in range(NUM_FEATURES) if feature not in DEAD]


@pytest.fixture(scope="module")
def group():
    with start("cpu") as world:
        yield world.group


def trained(name="gated"):
    """An SAE after two updates, on a scale at which features are on for a part of the rows."""
    sae = build(name, D_MODEL, NUM_FEATURES, seed=0, dtype=torch.float64)
    optimizer = SAEOptimizer(sae, betas=(0.9, 0.999), eps=1e-8, unit_norm=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    for _ in range(2):
        sae.zero_grad()
        objective(name)(sae, torch.randn(32, D_MODEL, generator=generator, dtype=torch.float64)).losses.total(0.1).backward()
        optimizer.step(1e-3)
    return sae, optimizer


def lane_rows(lane: int, rows: range) -> torch.Tensor:
    """A lane's activations, of norms spread over an order of magnitude."""
    drawn = torch.randn(1000, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(lane))
    return (drawn * torch.logspace(-0.5, 0.5, 1000, dtype=torch.float64)[:, None])[rows.start : rows.stop]


def candidates(lanes, num_batches=10, rows_a_lane=16, repeat=1) -> Iterator[Batch]:
    """Batches of so many rows of every lane; with `repeat`, every batch comes again."""
    for number, _ in itertools.product(range(num_batches), range(repeat)):
        rows = range(number * rows_a_lane, (number + 1) * rows_a_lane)
        x = torch.cat([lane_rows(lane, rows) for lane in lanes])
        yield Batch(x, torch.tensor(lanes).repeat_interleave(rows_a_lane), torch.tensor(rows).repeat(len(lanes)))


def found(dead=DEAD) -> ResamplingPlan:
    mask = torch.zeros(NUM_FEATURES, dtype=torch.bool)
    mask[dead] = True
    return ResamplingPlan(event=1, dead=mask, dead_of_parts=(len(dead),), dead_rows=100, candidate_rows=640, refused=None)


def resample(group, sae, optimizer, batches=None, config=None, dead=DEAD, run_name="gated-m24"):
    batches = candidates(list(lanes_of(group, NUM_LANES))) if batches is None else batches
    return apply(found(dead), sae, optimizer, batches, config=config or ResamplingConfig(), seed=0, run_name=run_name, group=group)


def snapshot(sae, optimizer):
    return {name: value.detach().clone() for name, value in {**sae.state_dict(), **optimizer.state_tensors()}.items()}


# plan


def fired_at(rows_of_features: list[int], rows: int, interval_start: int = 0) -> FiringCounter:
    firing = FiringCounter(len(rows_of_features), torch.device("cpu"))
    zeros = torch.zeros(len(rows_of_features), dtype=torch.int64)
    state = {
        "position": torch.tensor([rows, interval_start]),
        "fired": zeros,
        "opened": zeros,
        "last_fired": torch.tensor(rows_of_features),
    }
    firing.load_state_tensors(state)
    return firing


@pytest.mark.parametrize(
    ("total_rows", "interval_rows", "wanted"),
    [
        (10**9, 10**6, 10_000_000),  # as configured
        (10**9, 10**8, 50_000_000),  # at least half the interval
        (300_000, 75_000, 60_000),  # at most 20 % of the run
        (300_000, 150_000, 75_000),  # half the interval wins over that bound
    ],
)
def test_the_threshold_of_death(total_rows, interval_rows, wanted):
    assert dead_after(ResamplingConfig(dead_after_rows=10_000_000), total_rows, interval_rows) == wanted


def test_a_plan_names_the_dead_and_the_rows_to_draw_from():
    # 1 M rows in all, so dead after 200,000 (20 %), and 50,000 candidates (5 %).
    found = plan(fired_at([0, 300_000, 99_999, 100_001], rows=300_000), ResamplingConfig(), total_rows=1_000_000, event=2)
    assert found.dead.tolist() == [True, False, True, False]
    assert (found.event, found.dead_rows, found.candidate_rows, found.refused) == (2, 200_000, 50_000, None)
    assert plan(fired_at([0], rows=300_000), ResamplingConfig(max_candidate_rows=7), 1_000_000, 0).candidate_rows == 7


def test_a_short_interval_is_refused():
    found = plan(fired_at([0, 300_000], rows=300_000, interval_start=250_001), ResamplingConfig(), 1_000_000, 0)
    assert "interval holds 49999 rows, fewer than train.resampling.min_interval_rows (50000)" in found.refused
    assert found.candidate_rows == 0
    assert plan(fired_at([0, 300_000], rows=300_000, interval_start=250_000), ResamplingConfig(), 1_000_000, 0).refused is None


def test_an_event_before_anything_can_be_dead_is_refused():
    found = plan(fired_at([0, 0], rows=100_000), ResamplingConfig(), total_rows=1_000_000, event=0)
    assert "100000 rows were seen, fewer than the 200000" in found.refused


def test_nothing_dead_is_no_refusal_and_needs_no_candidates(group):
    found = plan(fired_at([300_000, 299_000], rows=300_000), ResamplingConfig(), 1_000_000, 0)
    assert (found.refused, found.candidate_rows) == (None, 0)
    report = apply(found, *trained(), iter(()), config=ResamplingConfig(), seed=0, run_name="r", group=group)
    assert (report.dead, report.resampled, report.candidate_rows, report.refused, len(report.features)) == (0, 0, 0, None, 0)


# the draw


def test_draws_are_proportional_to_squared_loss():
    # 20,000 draws of one row of four. Shares 1 : 4 : 9 : 2.25 of 16.25.
    loss = torch.tensor([1.0, 2.0, 3.0, 1.5], dtype=torch.float64)
    row = torch.arange(80_000)
    winners = draw_keys(loss.repeat(20_000), row % 3, row, "0/a/0").reshape(20_000, 4).argmax(dim=1)
    observed, expected = winners.bincount(minlength=4).double(), 20_000 * loss.square() / loss.square().sum()
    chi_square = ((observed - expected).square() / expected).sum()
    assert chi_square < 16.3  # the 0.1 % point at 3 degrees of freedom


def test_keys_depend_on_every_part_of_a_rows_name():
    lane, row = (part.flatten() for part in torch.meshgrid(torch.arange(30), torch.arange(40), indexing="ij"))
    ones = torch.ones(1200)
    keys = torch.cat([draw_keys(ones, lane, row, name) for name in ("0/a/0", "0/a/1", "0/b/0", "1/a/0")])
    assert keys.unique().numel() == 4800
    # log u of a uniform u has mean -1 and standard deviation 1.
    assert abs(keys.mean() + 1) < 4 / 4800**0.5
    assert keys.dtype == torch.float64


def test_rows_without_a_loss_are_never_drawn():
    loss = torch.tensor([0.0, torch.nan, torch.inf, 1e-3])
    keys = draw_keys(loss, torch.arange(4), torch.arange(4), "x")
    assert keys.isneginf().tolist() == [True, True, True, False]


def test_the_new_directions_are_the_best_rows_in_order_of_lane_and_row(group):
    sae, optimizer = trained()
    everything = next(candidates(list(range(NUM_LANES)), num_batches=1, rows_a_lane=160))
    loss = (everything.x - sae(everything.x)).square().sum(dim=1)
    keys = draw_keys(loss, everything.lane, everything.row, "0/gated-m24/1")
    # Rows of `everything` stand in order of (lane, row).
    best = keys.argsort(descending=True)[: len(DEAD)].sort().values
    wanted = everything.x[best] - sae.b_dec
    report = resample(group, sae, optimizer)
    assert report.features.tolist() == DEAD
    assert (report.dead, report.resampled, report.dead_rows, report.candidate_rows) == (6, 6, 100, 640)
    torch.testing.assert_close(sae.W_dec[DEAD].detach(), (wanted / wanted.norm(dim=1, keepdim=True)).detach())


def test_a_row_that_comes_twice_is_drawn_once(group):
    once, twice = trained(), trained()
    resample(group, *once, candidates(list(range(NUM_LANES))))
    resample(group, *twice, candidates(list(range(NUM_LANES)), repeat=2))
    torch.testing.assert_close(once[0].W_dec, twice[0].W_dec)
    assert once[0].W_dec.detach().unique(dim=0).shape[0] == NUM_FEATURES


def test_fewer_rows_than_dead_features(group):
    sae, optimizer = trained()
    before = snapshot(sae, optimizer)
    report = resample(group, sae, optimizer, candidates([2], num_batches=1, rows_a_lane=4, repeat=3))
    assert report.features.tolist() == DEAD[:4]
    assert (report.dead, report.resampled) == (6, 4)
    assert torch.equal(sae.W_dec[DEAD[4:]], before["W_dec"][DEAD[4:]])


def test_rows_that_give_no_direction_are_never_drawn(group):
    sae, optimizer = trained()
    batch = next(candidates([0], num_batches=1, rows_a_lane=8))
    batch.x[2:6] = sae.b_dec.detach()
    batch.x[7] = torch.nan
    report = resample(group, sae, optimizer, iter([batch]))
    assert (report.resampled, report.candidate_rows) == (3, 8)
    assert all(value.isfinite().all() for value in snapshot(sae, optimizer).values())


def test_no_candidates_resample_nothing(group):
    sae, optimizer = trained()
    before = snapshot(sae, optimizer)
    assert resample(group, sae, optimizer, iter(())).resampled == 0
    assert all(torch.equal(value, before[name]) for name, value in snapshot(sae, optimizer).items())


# what changes


@pytest.mark.parametrize("name", ["relu", "gated", "gated-no-aux"])
def test_only_dead_slices_change(group, name):
    sae, optimizer = trained(name)
    before = snapshot(sae, optimizer)
    resample(group, sae, optimizer)
    after = snapshot(sae, optimizer)
    for parameter, axis in sae.FEATURE_AXIS.items():
        for key in (parameter, f"{parameter}.exp_avg", f"{parameter}.exp_avg_sq"):
            kept = torch.tensor(ALIVE)
            assert torch.equal(after[key].index_select(axis, kept), before[key].index_select(axis, kept)), key
            assert not torch.equal(after[key], before[key]), key
        assert after[f"{parameter}.exp_avg"].index_select(axis, torch.tensor(DEAD)).abs().max() == 0
    assert all(torch.equal(after[key], before[key]) for key in before if key.startswith("b_dec") or key.endswith(".step"))


@pytest.mark.parametrize("name", ["relu", "gated", "gated-no-aux"])
def test_new_features_have_unit_rows_small_encoders_and_no_biases(group, name):
    sae, optimizer = trained(name)
    mean_norm = sae.encoder[:, ALIVE].norm(dim=0).mean().item()
    resample(group, sae, optimizer, config=ResamplingConfig(encoder_norm=0.3))
    assert (sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-12
    torch.testing.assert_close(sae.encoder[:, DEAD], 0.3 * mean_norm * sae.W_dec[DEAD].T)
    biases = ["b_enc"] if name == "relu" else ["r_mag", "b_mag", "b_gate"]
    assert all(getattr(sae, bias)[DEAD].abs().max() == 0 for bias in biases)


def test_the_direction_may_be_the_residual(group):
    sae, optimizer = trained()
    everything = next(candidates(list(range(NUM_LANES)), num_batches=1, rows_a_lane=160))
    residuals = everything.x - sae(everything.x)
    residuals = (residuals / residuals.norm(dim=1, keepdim=True)).detach()
    resample(group, sae, optimizer, config=ResamplingConfig(direction="residual"))
    assert (sae.W_dec[DEAD].detach() @ residuals.T).max(dim=1).values.min() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", ["relu", "gated"])
def test_the_gate_may_open_as_often_as_the_alive_features_do(group, name):
    sae, optimizer = trained(name)
    everything = next(candidates(list(range(NUM_LANES)), num_batches=1, rows_a_lane=160)).x
    counts = (sae.encode(everything) > 0).sum(dim=0)[ALIVE]
    resample(group, sae, optimizer, config=ResamplingConfig(gate_bias="median-density"))
    on = ((everything - sae.b_dec) @ sae.encoder + (sae.b_enc if name == "relu" else sae.b_gate) > 0).sum(dim=0)[DEAD]
    assert on.tolist() == [counts.median().item()] * len(DEAD)
    assert 0 < counts.median() < 640
    assert torch.equal((sae.encode(everything) > 0).sum(dim=0)[DEAD], on)


def test_rows_that_are_not_finite_place_no_gate(group):
    (sae, optimizer), (plain, plain_optimizer) = trained(), trained()
    config = ResamplingConfig(gate_bias="median-density")
    batch = next(candidates([0], num_batches=1, rows_a_lane=40))
    others = Batch(batch.x[:20].clone(), batch.lane[:20], batch.row[:20])
    batch.x[20:] = torch.nan
    resample(group, sae, optimizer, iter([batch]), config)
    resample(group, plain, plain_optimizer, iter([others]), config)
    assert sae.b_gate.isfinite().all()
    assert torch.equal(sae.W_gate, plain.W_gate)


@pytest.mark.parametrize("gate_bias", ["zero", "median-density"])
def test_all_features_may_be_dead(group, gate_bias):
    sae, optimizer = trained()
    report = resample(group, sae, optimizer, config=ResamplingConfig(gate_bias=gate_bias), dead=list(range(NUM_FEATURES)))
    assert report.resampled == NUM_FEATURES
    # No alive feature has a norm to take: 0.2 times 1.
    torch.testing.assert_close(sae.W_gate.norm(dim=0), torch.full((NUM_FEATURES,), 0.2, dtype=torch.float64))
    assert sae.b_gate.abs().max() == 0
    assert all(value.isfinite().all() for value in snapshot(sae, optimizer).values())


# ranks

CASES = list(itertools.product(("relu", "gated", "gated-no-aux"), ("activation", "residual"), ("zero", "median-density")))


def resample_all(group: Group) -> dict[str, torch.Tensor]:
    """Every case's parameters and state after an event, under one flat name each."""
    tensors = {}
    for name, direction, gate_bias in CASES:
        sae, optimizer = trained(name)
        config = ResamplingConfig(direction=direction, gate_bias=gate_bias)
        report = resample(group, sae, optimizer, config=config, run_name=name)
        case = f"{name}/{direction}/{gate_bias}"
        tensors |= {f"{case}/{key}": value for key, value in snapshot(sae, optimizer).items()}
        tensors |= {f"{case}/features": report.features, f"{case}/candidate_rows": torch.tensor(report.candidate_rows)}
    return tensors | resample_apart(group)


def resample_apart(group: Group) -> dict[str, torch.Tensor]:
    """The new features of ranks whose weights differ in their last bits, as on two kinds of GPU."""
    sae, optimizer = trained()
    with torch.no_grad():
        sae.W_gate *= 1 + 1e-10 * group.rank
    resample(group, sae, optimizer, config=ResamplingConfig(gate_bias="median-density"))
    return {f"apart/{name}": sae.get_parameter(name).detach().movedim(axis, 0)[DEAD] for name, axis in sae.FEATURE_AXIS.items()}


def test_two_ranks_draw_what_one_draws_and_end_alike(group, tmp_path):
    ranks = [subprocess.Popen([sys.executable, __file__, str(tmp_path), str(rank)]) for rank in range(2)]
    alone = resample_all(group)
    assert [rank.wait(timeout=60) for rank in ranks] == [0, 0]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys() == alone.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


if __name__ == "__main__":
    import torch.distributed as dist

    from gsae.world import cut_into_groups

    folder, this_rank = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=this_rank, world_size=2)
    found = resample_all(cut_into_groups(torch.device("cpu"), 1).group)
    save_file({name: value.contiguous() for name, value in found.items()}, folder / f"{this_rank}.safetensors")
    dist.destroy_process_group()
