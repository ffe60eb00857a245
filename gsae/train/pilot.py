"""Lambda for a target L0, by pilots: short runs on the site's own stream. In: a bank whose runs name an L0. Out: the same with lambda.

Pilots are of two lengths, and all of a length are one bank. Runs that differ in target and seed alone share theirs. What pilots found is
kept in `<output>/<site>/pilots.json`; their directories, in `pilots.partial` beside it, go when all of a bank have ended.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gsae.config import Config
from gsae.errors import CheckpointError
from gsae.heartbeat import Heartbeat
from gsae.store.manifest import Manifest, fingerprint
from gsae.store.parts import load_visit, num_parts
from gsae.store.runs import PILOTS_DIRECTORY, read_metrics
from gsae.train.checkpoint import find_resume_point
from gsae.train.chores import checkpoint_interval
from gsae.train.directories import begin_runs
from gsae.train.grid import Pilot, extrapolate, interpolate, near, rounded, wanted_lambdas
from gsae.train.ledger import PILOTS_FILE, Entry, read_entries, write_entries
from gsae.train.plan import BankSpec, RunSpec, describe_run, pilot_lengths, search_name
from gsae.world import Group

MEASURED_FRACTION = 0.1
"""Share of a pilot, at its end, over which its L0 is taken."""


@dataclass(frozen=True)
class Search:
    """Runs that one set of pilots is for."""

    name: str
    runs: tuple[RunSpec, ...]

    @property
    def first(self) -> RunSpec:
        """The run whose seed the pilots take."""
        return self.runs[0]

    @property
    def targets(self) -> list[float]:
        """The values of L0 that are looked for, rising."""
        return sorted({run.target_l0 for run in self.runs if run.target_l0 is not None})


@dataclass(frozen=True)
class Found:
    """What became of the search for a bank's lambdas."""

    spec: BankSpec | None
    """The bank, with them; None where the search has not ended."""
    is_stopped: bool = False
    """Whether a request stopped it, so that no other site is begun. Otherwise the part that pilots read is not whole yet."""


def find_searches(spec: BankSpec) -> Iterator[Search]:
    """What pilots a bank needs: one set for all runs without lambda that differ in target and seed alone."""
    names = dict.fromkeys(search_name(run) for run in spec.runs if run.lambda_ is None)
    for name in names:
        yield Search(name, tuple(run for run in spec.runs if run.lambda_ is None and search_name(run) == name))


def find_lambdas(
    config: Config,
    manifest: Manifest,
    spec: BankSpec,
    group: Group,
    train: Callable[[Config, BankSpec], bool],
    beats: Heartbeat,
    say: Callable[[str], None],
) -> Found:
    """Give each run of a bank its lambda, training pilots where it takes some, and make the runs' directories. A collective.

    Args:
        config: the config.
        manifest: of the store.
        spec: the bank; the runs without lambda name a target L0.
        group: the ranks that train it.
        train: trains a bank by a config to its end; False when a request stopped it before.
        beats: of this rank.
        say: shows a line, on the group's first rank.

    Raises:
        ConfigError: no lambda that may be tried reaches a target.
        CheckpointError: what pilots left on the disk is of other settings, or other runs of the site have begun.
    """
    work = _Work(config, manifest, spec)
    with beats.busy():
        lengths = group.on_first(work.lengths)
    if lengths is None:
        return Found(None)
    for number in range(len(lengths)):
        while (bank := group.on_first(lambda: work.next_pilots(lengths[: number + 1]))) is not None:  # noqa: B023
            say(f"looks for lambda with {len(bank.runs)} pilots of {bank.total_rows:,} rows")
            if not train(pilot_config(config, spec.site, bank.total_steps), bank):
                return Found(None, is_stopped=True)
            with beats.busy():
                group.on_first(lambda: work.take_results(bank))
    with beats.busy():
        found, lines = group.on_first(lambda: work.finish(lengths))
    for line in lines:
        say(line)
    return Found(found)


@dataclass(frozen=True)
class _Work:
    """What the group's first rank does meanwhile, with files only."""

    config: Config
    manifest: Manifest
    spec: BankSpec

    def lengths(self) -> list[int] | None:
        """Steps of the pilots, rising, within the first part; None while that is not whole."""
        directories = {run.name: Path(self.config.output) / self.spec.site / run.name for run in self.spec.runs}
        # Refuses runs that were added to others of the site, before their pilots are trained.
        find_resume_point(directories, checkpoint_interval(self.spec.total_steps, self.config.train))
        steps = pilot_lengths(self.config.train, self.spec.total_steps)
        if num_parts(self.manifest) == 1:
            return steps
        first_part = load_visit(Path(self.config.store_directory), self.manifest, 0)
        if first_part is None:
            return None
        longest = max(1, min(steps[-1], first_part.sites[self.spec.site].rows // self.spec.batch_rows))
        return sorted({max(1, longest // 2), longest})

    def next_pilots(self, lengths: Sequence[int]) -> BankSpec | None:
        """The pilots of the last of these lengths to train next, their directories made; None where no more are needed."""
        rows = [num_steps * self.spec.batch_rows for num_steps in lengths]
        entries, runs = self.entries(), []
        for search in find_searches(self.spec):
            entry = entries[search.name]
            targets = [target for target in search.targets if target not in entry.answers]
            if not targets:
                continue
            of_length = [[pilot for pilot in entry.pilots if pilot.rows == length] for length in rows]
            first = self.first_lambdas() if len(rows) == 1 else near(of_length[-2], targets)
            where = f"{self.spec.site} {search.name}, {rows[-1]:,} rows"
            for lambda_ in wanted_lambdas(of_length[-1], targets, first, where):
                name, seed = f"{search.name}-l{lambda_:g}", entry.seed
                runs.append(replace(search.first, name=name, lambda_=lambda_, target_l0=None, seed=seed))
        if not runs:
            return None
        bank = replace(self.spec, runs=tuple(runs), total_steps=lengths[-1], is_pilot=True)
        begin_runs(pilot_config(self.config, bank.site, bank.total_steps), self.manifest, bank)
        return bank

    def first_lambdas(self) -> list[float]:
        """Those of the config, on rows as they are trained on."""
        train = self.config.train
        scale = 1.0 if train.scale_activations else self.manifest.sites[self.spec.site].scale
        return [lambda_ / scale for lambda_ in train.pilot.lambdas]

    def take_results(self, bank: BankSpec) -> None:
        """Record what the pilots of a bank found, then remove their directories."""
        folder, entries = Path(pilot_config(self.config, bank.site, bank.total_steps).output), self.entries()
        for run in bank.runs:
            entry = entries[search_name(run)]
            result = _result(run, bank, folder / bank.site / run.name)
            entries[search_name(run)] = replace(entry, pilots=tuple(sorted((*entry.pilots, result), key=lambda p: (p.rows, p.lambda_))))
        write_entries(self.path, entries)
        shutil.rmtree(folder)

    def finish(self, lengths: Sequence[int]) -> tuple[BankSpec, list[str]]:
        """The bank with the answers, which are recorded, and a line about each; the runs' directories are made."""
        entries, lines, first_lines = self.entries(), [], {}
        runs = {run.name: run for run in self.spec.runs}
        for search in find_searches(self.spec):
            entry = entries[search.name]
            for target in search.targets:
                lambda_, text = _answer(entry, lengths, self.spec, target)
                entry = replace(entry, answers={**entry.answers, target: lambda_})
                lines.append(f"{search.name}: L0 {target:g} at {text}")
                for run in search.runs:
                    if run.target_l0 == target:
                        runs[run.name] = replace(run, lambda_=lambda_)
                        values = {"target_l0": target, "lambda": lambda_, "found": text}
                        first_lines[run.name] = {"kind": "pilots", "step": 0, "rows": 0, **values}
            entries[search.name] = entry
        write_entries(self.path, entries)
        bank = replace(self.spec, runs=tuple(runs.values()))
        begin_runs(self.config, self.manifest, bank, first_lines)
        return bank, lines

    @property
    def path(self) -> Path:
        """Where findings are recorded."""
        return Path(self.config.output) / self.spec.site / PILOTS_FILE

    def entries(self) -> dict[str, Entry]:
        """What is recorded, with an entry for each search.

        Raises:
            CheckpointError: it was found with other settings.
        """
        entries = read_entries(self.path)
        for search in find_searches(self.spec):
            described = describe_run(search.first, self.spec, self.config, self.manifest)
            own = ("name", "seed", "target_l0", "train_fingerprint")
            wanted = fingerprint({key: value for key, value in described.items() if key not in own})
            entry = entries.setdefault(search.name, Entry(wanted, search.first.seed))
            if entry.fingerprint != wanted:
                raise CheckpointError(
                    f"{self.path}: pilots of {search.name} were trained with other settings; give output another directory, or delete it"
                )
        return entries


def require_same_pilots(config: Config, manifest: Manifest, banks: Sequence[BankSpec]) -> None:
    """Raise CheckpointError where findings are on the disk that were made with other settings. One rank calls this."""
    for bank in banks:
        _Work(config, manifest, bank).entries()


def pilot_config(config: Config, site: str, num_steps: int) -> Config:
    """The config of a site's pilots of so many steps: what counts steps or rows is shortened as they are."""
    train = config.train
    share = num_steps * train.batch_rows / train.total_rows

    def shortened(settings: Any, *names: str) -> Any:
        return replace(settings, **{name: max(1, round(share * getattr(settings, name))) for name in names})

    train = replace(
        train,
        total_rows=num_steps * train.batch_rows,
        schedule=shortened(train.schedule, "max_warmup_steps", "max_lambda_warmup_steps"),
        resampling=shortened(train.resampling, "dead_after_rows", "min_interval_rows", "max_candidate_rows", "recovery_steps"),
        log_every_steps=max(1, min(train.log_every_steps, round(MEASURED_FRACTION * num_steps / 2))),
    )
    return replace(config, output=str(Path(config.output) / site / PILOTS_DIRECTORY), train=train)


def _result(run: RunSpec, bank: BankSpec, directory: Path) -> Pilot:
    """What a pilot's metrics say of its end."""
    lines = list(read_metrics(directory))
    steps = [line for line in lines if line["kind"] == "step"]
    assert run.lambda_ is not None
    if not steps or lines[-1]["kind"] != "finished":
        return Pilot(run.lambda_, None, None, bank.total_rows)
    lengths = [line["step"] - before for before, line in zip([0, *(line["step"] for line in steps)], steps, strict=False)]
    last = [number for number, line in enumerate(steps) if line["step"] > (1 - MEASURED_FRACTION) * bank.total_steps]
    total = sum(lengths[number] for number in last)
    l0, fvu = (sum(lengths[number] * steps[number][name] for number in last) / total for name in ("l0", "fvu"))
    return Pilot(run.lambda_, l0, fvu, bank.total_rows)


def _answer(entry: Entry, lengths: Sequence[int], spec: BankSpec, target: float) -> tuple[float, str]:
    """Lambda, and what it comes from."""
    if target in entry.answers:
        return entry.answers[target], f"lambda {entry.answers[target]:.4g}, as found before"
    rows = [num_steps * spec.batch_rows for num_steps in lengths]
    found = [interpolate([pilot for pilot in entry.pilots if pilot.rows == length], target) for length in rows]
    lambda_ = extrapolate(found[0], found[-1], lengths[-1] / spec.total_steps)
    parts = ", ".join(f"{value:.4g} in {length:,}" for value, length in zip(found, rows, strict=True))
    return rounded(lambda_), f"lambda {lambda_:.4g} ({parts} rows)"
