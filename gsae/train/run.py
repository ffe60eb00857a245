"""Stage 2: train the SAEs of a store's sites. In: a config, a whole store, the ranks. Out: run directories with checkpoints and metrics.

Groups take sites from a queue; all runs of a site train together from one stream. A rank that fails or falls silent ends all groups;
one whose group is through waits for the others. A second call continues where the first ended, and does nothing where there is nothing
left to do.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from gsae.config import Config
from gsae.console import Console, open_console
from gsae.errors import ConfigError
from gsae.heartbeat import Heartbeat, heartbeat
from gsae.sae.formats import read_sae
from gsae.store import manifest as manifests
from gsae.store.durable import require_writable
from gsae.store.lease import lease
from gsae.store.manifest import Manifest
from gsae.store.opening import store_of
from gsae.store.parts import num_parts, visit_directory
from gsae.store.runs import METRICS_FILE, newest_checkpoint, read_metrics
from gsae.store.stopping import CONTINUES as STOPPED
from gsae.store.stopping import STOPPED_FILE, StopRequest
from gsae.train.alive import CONTINUES, with_beats
from gsae.train.bank import Bank, Chore, Position, Run, make_run, train
from gsae.train.checkpoint import Keep, ResumePoint, find_resume_point, restore_run, truncate_metrics
from gsae.train.chores import ChooseStep, Log, Resample, SaveCheckpoints, checkpoint_interval
from gsae.train.directories import prepare_directories
from gsae.train.parts import find_stretch, record_waiting, remove_finished_parts, require_same_parts
from gsae.train.pilot import find_lambdas, require_same_pilots
from gsae.train.plan import BankSpec, by_site, outline, plan_banks
from gsae.train.probe import Evaluate, Probe
from gsae.train.saving import Background, Saver
from gsae.train.stop import StopOnRequest
from gsae.train.trackers import tracked
from gsae.world import Group, World, lanes_of
from gsae.world.tracking import require_trackers


def run_train(config: Config, world: World, make_probe: Callable[[], Probe] | None = None) -> None:
    """Train every run that the config asks for and that is not finished yet.

    Args:
        config: the settings.
        world: the ranks.
        make_probe: makes what evaluates runs while they train, on all ranks together; None for nothing.

    Raises:
        StoreError: the store is missing, not whole, or of another number of lanes.
        ConfigError: sites, ranks or batch do not fit together, the output directory cannot be written, or a tracker is not there.
        CheckpointError: a run directory holds a run of other settings, or a damaged checkpoint.
        ConfigError: another job trains into the output directory.
        GsaeError: a rank failed, or got no further for stall_timeout_seconds.
    """
    console = open_console(world.is_first)
    output = Path(config.output)
    with ExitStack() as holding, StopRequest("train", output).listening() as request:
        with Background() as background, heartbeat(world, config.stall_timeout_seconds, continues=CONTINUES) as beats:
            with beats.busy():
                with world.everyone.together():
                    require_trackers(config.train.trackers if world.group.is_first else ())
                    store = store_of(config)
                    manifest = manifests.load(store)
                    _check_store(config, manifest)
                    lanes_of(world.group, manifest.num_lanes)
                    banks = plan_banks(config, outline(manifest))
                world.everyone.on_first(lambda: require_writable(output, "output"))
                holding.enter_context(lease(output, "train", "output", world.everyone, console.say))
                banks = world.everyone.on_first(lambda: prepare_directories(config, manifest, banks))
                world.everyone.on_first(lambda: require_same_pilots(config, manifest, banks))
                world.everyone.on_first(request.forget)
                probe = None if make_probe is None else make_probe()
            # In what is written the store stays where it is, also where it is read through a mirror.
            local = replace(config, harvest=replace(config.harvest, store=str(store)))
            sites, has_ended = by_site(banks), True
            while has_ended and (ticket := world.next_ticket("sites")) < len(sites):
                for bank in sites[ticket]:
                    has_ended = has_ended and _train_runs(local, manifest, bank, world, console, request, background, beats, probe)
                if has_ended and request.is_made(world.group)[0]:
                    has_ended = False
                    if world.group.is_first:
                        request.record(site=bank.site, step=bank.total_steps)
        if world.everyone.any(not has_ended):  # no group trains any more, so nobody is waited for
            console.say(f"{STOPPED} ({output / STOPPED_FILE})")
        else:
            world.everyone.on_first(lambda: _leave(config, manifest, banks, console))


def _leave(config: Config, manifest: Manifest, banks: list[BankSpec], console: Console) -> None:
    """What the first rank does when no group trains any more."""
    _warn_of_stopped(config, banks, console)
    if num_parts(manifest) == 1:
        console.write("training: no site is left")
        return
    visit = remove_finished_parts(config, manifest, banks)
    record_waiting(config, visit)
    if visit is None:
        console.write("training: no site is left, and the parts of the store are removed")
    else:
        part = visit_directory(Path(config.store_directory), visit)
        console.write(f"training: waits for {part}; run gsae harvest, then gsae train again")


def _warn_of_stopped(config: Config, banks: list[BankSpec], console: Console) -> None:
    """Name the runs that ended before their time: their reasons were said long ago, or by an earlier training."""
    names = [f"{bank.site}/{run.name}" for bank in banks for run in bank.runs]
    ends = {name: [line for line in read_metrics(Path(config.output) / name) if line["kind"] in ("stopped", "finished")] for name in names}
    stopped = [name for name, lines in ends.items() if lines and lines[-1]["kind"] == "stopped"]
    if stopped:
        were = "was stopped before its end" if len(stopped) == 1 else "were stopped before their ends"
        shown = ", ".join(stopped[:5]) + (f" and {len(stopped) - 5} others" if len(stopped) > 5 else "")
        console.warn(f"{len(stopped)} of {len(names)} runs {were}, for the reason in {METRICS_FILE}: {shown}")


def _check_store(config: Config, manifest: Manifest) -> None:
    if manifest.num_lanes != config.corpus.num_lanes:
        raise ConfigError(
            f"corpus.num_lanes is {config.corpus.num_lanes} but the store has {manifest.num_lanes} lanes; set it to {manifest.num_lanes}"
        )
    require_same_parts(config, manifest)


def _train_runs(
    config: Config,
    manifest: Manifest,
    spec: BankSpec,
    world: World,
    console: Console,
    request: StopRequest,
    background: Background,
    beats: Heartbeat,
    probe: Probe | None,
) -> bool:
    """Find the lambdas that are missing and train the runs of one bank; as `_train_bank`."""

    def train_bank(settings: Config, bank: BankSpec) -> bool:
        return _train_bank(settings, manifest, bank, world, console, request, background, beats, probe)

    if any(run.lambda_ is None for run in spec.runs):
        found = find_lambdas(config, manifest, spec, world.group, train_bank, beats, lambda line: _say(line, spec, world.group, console))
        if found.spec is None:
            return not found.is_stopped
        spec = found.spec
    return train_bank(config, spec)


def _say(line: str, spec: BankSpec, group: Group, console: Console) -> None:
    if group.is_first:
        console.write(f"{spec.site}: {line}")


def _train_bank(
    config: Config,
    manifest: Manifest,
    spec: BankSpec,
    world: World,
    console: Console,
    request: StopRequest,
    background: Background,
    beats: Heartbeat,
    probe: Probe | None,
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
    missing = runs[0].training.why_no_kernels
    if missing is not None and config.train.kernels and group.device.type == "cuda" and group.is_first:
        console.warn_once(f"training goes without kernels, more slowly: {missing}")
    variance = 1.0 if config.train.scale_activations else site.scale**-2
    bank = Bank(spec, config.train, group, stretch, runs, variance, point.step)
    shown = console.training(spec.site, [run.spec.name for run in runs], spec.total_rows, group.is_first, world.num_groups)
    with tracked(bank, console, beats), shown as view:
        if point.step:
            view.say(f"continues at step {point.step} of {spec.total_steps}")
        every = config.train.keep_every
        saver = Saver(background, Keep(config.train.keep_checkpoints, every and every * interval), beats)
        log = Log(view, saver)
        evaluations: list[Chore] = [] if probe is None else [Evaluate(probe, view, beats)]
        after: list[Chore] = [SaveCheckpoints(saver), StopOnRequest(request, log, saver)]
        chores: list[Chore] = [log, ChooseStep(), Resample(bank, view), *evaluations, *after]
        while stretch is not None:
            bank.stretch = with_beats(stretch, beats)
            train(bank, chores)
            saver.finish(group)
            if bank.stopping or not bank.active_runs:
                break
            with beats.busy():
                stretch = find_stretch(config, manifest, spec, group, stretch.visit + 1, stretch.end_step)
    return not bank.stopping


def _resume(runs: list[Run], point: ResumePoint, group: Group) -> None:
    """Bring all runs to the resume point, or to where they start from."""
    for run in runs:
        source = point.sources[run.spec.name]
        if source is not None:
            restore_run(run, source)
        elif run.spec.starts_from is not None:
            features = None if run.sae.part is None else run.sae.part.features
            neighbour = newest_checkpoint(run.directory.with_name(run.spec.starts_from)).path
            run.sae.load_state_dict(read_sae(neighbour, features).sae.state_dict())
        if group.is_first:
            truncate_metrics(run.directory, point.step)
