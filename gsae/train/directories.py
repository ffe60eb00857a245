"""Run directories before anything is trained. In: banks, a config. Out: `run.json` in each, or a refusal of those that hold other runs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gsae.config import Config
from gsae.errors import CheckpointError
from gsae.settings import dump_config
from gsae.store.durable import make_directory, write_aside, write_json_atomically
from gsae.store.manifest import Manifest
from gsae.store.parts import num_parts
from gsae.store.runs import METRICS_FILE, RUN_FILE, find_difference, read_run
from gsae.train.parts import record_waiting, remove_finished_parts
from gsae.train.plan import BankSpec, describe_run, with_all_settings


def prepare_directories(config: Config, manifest: Manifest, banks: Sequence[BankSpec]) -> list[BankSpec]:
    """Make the directories of all runs, before anything is trained. One rank calls this.

    Returns:
        The banks, with the lambdas that pilots found for runs that have begun. Runs without lambda have no `run.json` yet.

    Raises:
        CheckpointError: a directory holds another run.
    """
    output = Path(config.output)
    banks = [_with_known_lambdas(bank, output) for bank in banks]
    for bank in banks:
        _require_same_runs(config, manifest, bank)
    if num_parts(manifest) > 1:
        remove_finished_parts(config, manifest, banks)  # also what an interrupted removal left
    for bank in banks:
        begin_runs(config, manifest, bank)
    record_waiting(config, None)
    return banks


def begin_runs(config: Config, manifest: Manifest, bank: BankSpec, first_lines: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Make the directories of a bank's runs that have their lambda, where they are missing. One rank calls this.

    Args:
        config: what they are trained by.
        manifest: of the store.
        bank: the runs.
        first_lines: what a run's metrics begin with, by its name.

    Raises:
        CheckpointError: a directory holds another run.
    """
    _require_same_runs(config, manifest, bank)
    for run in bank.runs:
        directory = Path(config.output) / bank.site / run.name
        if run.lambda_ is not None and not (directory / RUN_FILE).exists():
            make_directory(directory)
            (directory / "config.yaml").write_text(dump_config(config), encoding="utf-8")
            if first_lines and run.name in first_lines:
                with write_aside(directory / METRICS_FILE) as file:
                    file.write(json.dumps(first_lines[run.name]).encode() + b"\n")
            write_json_atomically(directory / RUN_FILE, describe_run(run, bank, config, manifest))


def _with_known_lambdas(bank: BankSpec, output: Path) -> BankSpec:
    runs = list(bank.runs)
    for number, run in enumerate(runs):
        directory = output / bank.site / run.name
        if run.lambda_ is None and (directory / RUN_FILE).exists():
            runs[number] = replace(run, lambda_=read_run(directory).get("lambda"))
    return replace(bank, runs=tuple(runs))


def _require_same_runs(config: Config, manifest: Manifest, bank: BankSpec) -> None:
    for run in bank.runs:
        directory = Path(config.output) / bank.site / run.name
        if (directory / RUN_FILE).exists():
            _require_same(directory, read_run(directory), describe_run(run, bank, config, manifest))


def _require_same(directory: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    if there.get("format") != wanted["format"]:
        raise CheckpointError(
            f"run {directory} was begun by another version of gsae (run format {there.get('format')}, this one has {wanted['format']}); "
            "finish it with that version, or give output another directory"
        )
    difference = find_difference(with_all_settings(there), with_all_settings(wanted))
    if difference:
        raise CheckpointError(f"run {directory} was trained with {difference}; give output another directory, or restore the setting")
