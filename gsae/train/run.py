"""Stage 2: train the SAEs of a store's sites. In: a config, a whole store, the ranks. Out: run directories with checkpoints and metrics.

Groups take sites from a queue; all runs of a site train together from one stream. A rank that fails or falls silent ends all groups;
one whose group is through waits for the others. A second call continues where the first ended, and does nothing where there is nothing
left to do.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from gsae.config import Config
from gsae.console import Console, open_console
from gsae.errors import CheckpointError, ConfigError
from gsae.heartbeat import Heartbeat, heartbeat
from gsae.settings import dump_config
from gsae.store import manifest as manifests
from gsae.store.durable import make_directory, require_writable, write_json_atomically
from gsae.store.manifest import Manifest
from gsae.store.opening import store_of
from gsae.store.parts import num_parts, visit_directory
from gsae.store.runs import RUN_FILE, STOPPED_FILE, find_difference, read_run
from gsae.train.alive import CONTINUES, Patiently, with_beats
from gsae.train.bank import Bank, Chore, Position, Run, make_run, train
from gsae.train.checkpoint import ResumePoint, find_resume_point, restore_run, truncate_metrics
from gsae.train.chores import ChooseStep, Log, Resample, SaveCheckpoints, checkpoint_interval
from gsae.train.parts import find_stretch, record_waiting, remove_finished_parts, require_same_parts
from gsae.train.plan import BankSpec, describe_run, outline, plan_banks
from gsae.train.stop import StopOnRequest, StopRequest
from gsae.world import Group, World, lanes_of


def run_train(config: Config, world: World) -> None:
    """Train every run that the config asks for and that is not finished yet.

    Raises:
        StoreError: the store is missing, not whole, or of another number of lanes.
        ConfigError: sites, ranks or batch do not fit together, or the output directory cannot be written.
        CheckpointError: a run directory holds a run of other settings, or a damaged checkpoint.
        GsaeError: a rank failed, or got no further for stall_timeout_seconds.
    """
    console = open_console(world.is_first)
    output = Path(config.output)
    with (
        StopRequest(output).listening() as request,
        heartbeat(world, config.stall_timeout_seconds, continues=CONTINUES) as beats,
    ):
        with beats.busy():
            with world.everyone.together():
                store = store_of(config)
                manifest = manifests.load(store)
                _check_store(config, manifest)
                lanes_of(world.group, manifest.num_lanes)
                banks = plan_banks(config, outline(manifest))
            world.everyone.on_first(lambda: _prepare_directories(config, manifest, banks))
        # In what is written the store stays where it is, also where it is read through a mirror.
        local = replace(config, harvest=replace(config.harvest, store=str(store)))
        has_ended = True
        while has_ended and (ticket := world.next_ticket("sites")) < len(banks):
            has_ended = _train_bank(local, manifest, banks[ticket], world, console, request, beats)
            if has_ended and request.is_made(world.group)[0]:
                has_ended = False
                request.record(world.group, banks[ticket].site, banks[ticket].total_steps)
    if world.everyone.any(not has_ended):  # no group trains any more, so nobody is waited for
        console.say(f"stopped on request; the same command continues from here ({output / STOPPED_FILE})")
    elif num_parts(manifest) == 1:
        console.say("training: no site is left")
    else:
        world.everyone.on_first(lambda: _leave(config, manifest, banks, console))


def _leave(config: Config, manifest: Manifest, banks: list[BankSpec], console: Console) -> None:
    """What the first rank does when no group trains any more."""
    visit = remove_finished_parts(config, manifest, banks)
    record_waiting(config, visit)
    if visit is None:
        console.write("training: no site is left, and the parts of the store are removed")
    else:
        part = visit_directory(Path(config.store_directory), visit)
        console.write(f"training: waits for {part}; run gsae harvest, then gsae train again")


def _check_store(config: Config, manifest: Manifest) -> None:
    if manifest.num_lanes != config.corpus.num_lanes:
        raise ConfigError(
            f"corpus.num_lanes is {config.corpus.num_lanes} but the store has {manifest.num_lanes} lanes; set it to {manifest.num_lanes}"
        )
    require_same_parts(config, manifest)


def _prepare_directories(config: Config, manifest: Manifest, banks: list[BankSpec]) -> None:
    """Make the run directories, or refuse those that hold other runs, before anything is trained."""
    output = Path(config.output)
    require_writable(output, "output")
    wanted = {output / bank.site / spec.name: describe_run(spec, bank, config, manifest) for bank in banks for spec in bank.runs}
    new = {directory: run for directory, run in wanted.items() if not (directory / RUN_FILE).exists()}
    for directory, run in wanted.items():
        if directory not in new:
            _require_same(directory, read_run(directory), run)
    if num_parts(manifest) > 1:
        remove_finished_parts(config, manifest, banks)  # also what an interrupted removal left
    for directory, run in new.items():
        make_directory(directory)
        (directory / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        write_json_atomically(directory / RUN_FILE, run)
    (output / STOPPED_FILE).unlink(missing_ok=True)
    record_waiting(config, None)


def _require_same(directory: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    if there.get("format") != wanted["format"]:
        raise CheckpointError(
            f"run {directory} was begun by another version of gsae (run format {there.get('format')}, this one has {wanted['format']}); "
            "finish it with that version, or give output another directory"
        )
    difference = find_difference(there, wanted)
    if difference:
        raise CheckpointError(f"run {directory} was trained with {difference}; give output another directory, or restore the setting")


def _train_bank(
    config: Config, manifest: Manifest, spec: BankSpec, world: World, console: Console, request: StopRequest, beats: Heartbeat
) -> bool:
    """Train the runs of one site to their end, or as far as the parts of the store go; False when a request stopped it before."""
    group, site = world.group, manifest.sites[spec.site]
    directories = {run.name: Path(config.output) / spec.site / run.name for run in spec.runs}
    interval = checkpoint_interval(spec.total_steps, config.train)
    with beats.busy():
        point = group.on_first(lambda: find_resume_point(directories, interval))
        if not point.sources:
            if group.is_first:
                console.write(f"{spec.site}: all {len(spec.runs)} runs have ended before")
            return True
        position = point.position or Position(0, point.step * spec.batch_rows)  # of a store in one part all rows are of visit 0
        first_step = point.step - position.rows // spec.batch_rows
        stretch = find_stretch(config, manifest, spec, group, position.visit, first_step)
        if stretch is None:
            return True
        with group.together():
            mean = site.mean * spec.scale
            runs = [make_run(run, directories[run.name], config.train, mean, group) for run in spec.runs if run.name in point.sources]
            _resume(runs, point, group)
    variance = 1.0 if config.train.scale_activations else site.scale**-2
    names = [run.spec.name for run in runs]
    with console.training(spec.site, names, spec.total_rows, group.is_first, world.num_groups) as view:
        bank = Bank(spec, config.train, group, stretch, runs, variance, point.step)
        if point.step:
            view.say(f"continues at step {point.step} of {spec.total_steps}")
        log = Log(view)
        save, stop = Patiently(SaveCheckpoints(), beats), StopOnRequest(request, log, beats)
        chores: list[Chore] = [log, ChooseStep(), Resample(bank, view), save, stop]
        while stretch is not None:
            bank.stretch = with_beats(stretch, beats)
            train(bank, chores)
            if bank.stopping or not bank.active_runs:
                break
            with beats.busy():
                stretch = find_stretch(config, manifest, spec, group, stretch.visit + 1, stretch.end_step)
    return not bank.stopping


def _resume(runs: list[Run], point: ResumePoint, group: Group) -> None:
    """Bring all runs to the resume point."""
    for run in runs:
        source = point.sources[run.spec.name]
        if source is not None:
            restore_run(run, source)
        if group.is_first:
            truncate_metrics(run.directory, point.step)
