"""Stage 2: train the SAEs of a store's sites. In: a config, a whole store, the ranks. Out: run directories with checkpoints and metrics.

Groups take sites from a queue; all runs of a site train together from one stream. A second call continues where the first
ended, and does nothing where there is nothing left to do.
"""

import time
from functools import partial
from pathlib import Path

from gsae.config import Config
from gsae.console import Console, TrainingView, open_console
from gsae.errors import CheckpointError, ConfigError
from gsae.settings import dump_config
from gsae.store import manifest as manifests
from gsae.store.durable import require_writable, write_json_atomically
from gsae.store.manifest import Manifest
from gsae.store.runs import RUN_FILE, find_difference, read_run
from gsae.store.stream import Stream
from gsae.train.bank import Bank, Chore, Run, make_run, train
from gsae.train.checkpoint import find_resume_point, restore_run, truncate_metrics
from gsae.train.chores import Log, Resample, SaveCheckpoints, StopOnSignal
from gsae.train.plan import BankSpec, describe_run, outline, plan_banks
from gsae.world import Group, World, lanes_of


def run_train(config: Config, world: World) -> None:
    """Train every run that the config asks for and that is not finished yet.

    Raises:
        StoreError: the store is missing, not whole, or of another number of lanes.
        ConfigError: sites, ranks or batch do not fit together, or the output directory cannot be written.
        CheckpointError: a run directory holds a run of other settings, or a damaged checkpoint.
    """
    console = open_console(world.is_first)
    output = Path(config.output)
    with world.everyone.together():
        manifest = manifests.load(Path(config.store_directory))
        _check_store(config, manifest)
        lanes_of(world.group, manifest.num_lanes)
        banks = plan_banks(config, outline(manifest))
    world.everyone.on_first(lambda: _prepare_directories(config, manifest, banks))
    while (ticket := world.next_ticket("sites")) < len(banks):
        if not _train_bank(config, manifest, banks[ticket], world, console):
            console.say(f"stopped on request; the same command continues from here ({output / 'stopped.json'})")
            return
    console.say("training: all runs have ended")


def _check_store(config: Config, manifest: Manifest) -> None:
    if manifest.num_lanes != config.corpus.num_lanes:
        raise ConfigError(
            f"corpus.num_lanes is {config.corpus.num_lanes} but the store has {manifest.num_lanes} lanes; set it to {manifest.num_lanes}"
        )


def _prepare_directories(config: Config, manifest: Manifest, banks: list[BankSpec]) -> None:
    """Make the run directories, or refuse those that hold other runs, before anything is trained."""
    output = Path(config.output)
    require_writable(output, "output")
    (output / "stopped.json").unlink(missing_ok=True)
    for bank in banks:
        for spec in bank.runs:
            directory = output / bank.site / spec.name
            wanted = describe_run(spec, bank, config, manifest)
            if (directory / RUN_FILE).exists():
                difference = find_difference(read_run(directory), wanted)
                if difference:
                    raise CheckpointError(
                        f"run {directory} was trained with {difference}; give output another directory, or restore the setting"
                    )
            else:
                directory.mkdir(parents=True, exist_ok=True)
                (directory / "config.yaml").write_text(dump_config(config), encoding="utf-8")
                write_json_atomically(directory / RUN_FILE, wanted)


def _train_bank(config: Config, manifest: Manifest, spec: BankSpec, world: World, console: Console) -> bool:
    """Train the runs of one site to their end; False when a signal ended it before."""
    group, output = world.group, Path(config.output)
    open_stream = partial(
        Stream,
        Path(config.store_directory),
        spec.site,
        lanes_of(group, manifest.num_lanes),
        batch_rows=spec.batch_rows,
        window_rows=config.train.window_rows,
        seed=config.train.seed,
        verify_shards=config.train.verify_shards,
    )
    site = manifest.sites[spec.site]
    runs = [make_run(run, output / spec.site / run.name, config.train, site, group) for run in spec.runs]
    step = _resume(runs, group)
    if not any(run.is_active for run in runs):
        if group.is_first:
            console.write(f"{spec.site}: all {len(runs)} runs have ended before")
        return True
    variance = 1.0 if config.train.scale_activations else site.scale**-2
    with (
        open_stream() as stream,
        console.training(spec.site, [run.name for run in spec.runs], spec.total_rows, group.is_first, world.num_groups) as view,
    ):
        bank = Bank(spec, config.train, group, open_stream, stream, runs, variance, step)
        stream.seek(bank.rows)
        if step:
            view.say(f"continues at step {step} of {spec.total_steps}")
        started = time.monotonic()
        train(bank, _chores(bank, view, output))
        if not bank.stopping:
            view.say(f"{len(runs)} runs of {spec.total_rows} rows, {time.monotonic() - started:.0f} s")
    return not bank.stopping


def _chores(bank: Bank, view: TrainingView, output: Path) -> list[Chore]:
    log = Log(view)
    return [log, Resample(bank, view), SaveCheckpoints(), StopOnSignal(log, output)]


def _resume(runs: list[Run], group: Group) -> int:
    """Bring all runs to the newest step that all unfinished ones have whole; the step."""
    directories = {run.spec.name: run.directory for run in runs}
    point = group.on_first(lambda: find_resume_point(directories))
    with group.together():
        for run in runs:
            source = point.sources[run.spec.name]
            if source is not None:
                restore_run(run, source)
            if group.is_first and run.is_active:
                truncate_metrics(run.directory, point.step)
    return point.step
