"""Training on a store that may be in parts. In: a bank's position, the checkpoints of all runs. Out: what it reads next; parts removed.

A bank is through with a part after floor(rows of the part / batch_rows) batches; lanes shorter than the mean have begun again by then.
A part is removed when every run that goes on has a checkpoint beyond it, and only between trainings, by one rank.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path

from gsae.config import Config
from gsae.corpus.documents import seeded_hash
from gsae.errors import CheckpointError, ConfigError, StoreError
from gsae.store.durable import write_json_atomically
from gsae.store.manifest import Manifest
from gsae.store.parts import WAITING_FILE, Used, load_visit, num_parts, read_used, remove_used, visit_directory, write_used
from gsae.store.runs import find_runs, read_run
from gsae.store.stream import Stream
from gsae.train.bank import Position, Stretch
from gsae.train.checkpoint import find_resume_position
from gsae.train.plan import BankSpec
from gsae.train.sharing import SharedStream
from gsae.world import Group, lanes_of


def find_stretch(config: Config, manifest: Manifest, spec: BankSpec, group: Group, visit: int, first_step: int) -> Stretch | None:
    """What a bank reads from a step on; None while that is a part that is not whole. A collective.

    Args:
        config: the config.
        manifest: of the store.
        spec: the bank.
        group: the ranks that train it.
        visit: the visit that the step belongs to; 0 of a store that is not in parts.
        first_step: step at which the visit begins.

    Raises:
        StoreError: the part is not of this store, or shorter than a batch.
    """
    train, store = config.train, Path(config.store_directory)
    seed, end_step = train.seed, spec.total_steps
    is_part = num_parts(manifest) > 1
    if is_part:
        num_steps = group.on_first(lambda: _steps_of_visit(store, manifest, spec, visit))
        if num_steps is None:
            return None
        store, end_step = visit_directory(store, visit), first_step + num_steps
        seed = seeded_hash("visit", train.seed, str(visit))  # another order when the same part comes again
    open_stream: Callable[[], Stream] = partial(
        Stream,
        store,
        spec.site,
        lanes_of(group, manifest.num_lanes),
        batch_rows=spec.batch_rows,
        window_rows=train.window_rows,
        seed=seed,
        verify_shards=train.verify_shards,
        max_rows=train.max_rows,
        read_threads=train.read_threads,
        pinned=group.device.type == "cuda",
    )
    if train.shared_reads and group.features is not None:
        open_stream = partial(SharedStream, open_stream, store, spec.site, group.features)
    return Stretch(open_stream, first_step, end_step, visit, is_part)


def _steps_of_visit(store: Path, manifest: Manifest, spec: BankSpec, visit: int) -> int | None:
    found = load_visit(store, manifest, visit)
    if found is None:
        return None
    rows = found.sites[spec.site].rows
    if rows < spec.batch_rows:
        raise StoreError(
            f"store {visit_directory(store, visit)} has {rows} rows at {spec.site}, fewer than a batch; "
            f"lower train.batch_rows ({spec.batch_rows}), or harvest with fewer corpus.parts ({num_parts(manifest)}) into another directory"
        )
    return rows // spec.batch_rows


def require_same_parts(config: Config, manifest: Manifest) -> None:
    """Raise ConfigError unless the store has the config's number of parts."""
    parts = num_parts(manifest)
    if parts != config.corpus.parts:
        raise ConfigError(f"corpus.parts is {config.corpus.parts} but the store {config.store_directory} has {parts}; set it to {parts}")


def remove_finished_parts(config: Config, manifest: Manifest, banks: Sequence[BankSpec]) -> int | None:
    """Remove the parts that no run will need again. One rank calls this while none trains.

    Returns:
        The visit at which training goes on; None where all runs have ended.

    Raises:
        CheckpointError: a run would go on in a part that is gone, or its checkpoint is damaged.
    """
    store = Path(config.store_directory)
    used = read_used(store)
    positions = dict(_positions(config, manifest, banks))
    if positions:
        name, position = min(positions.items(), key=lambda item: item[1].visit)
        visits = position.visit
        if visits < used.visits:
            raise CheckpointError(
                f"{name} goes on in {visit_directory(store, visits).name} of {store}, which was removed after its use; "
                "give output and harvest.store other directories to begin anew"
            )
    else:
        visits = next(visit for visit in count(used.visits) if load_visit(store, manifest, visit) is None)
    found = Used(visits, is_over=not positions)
    if found != used:
        write_used(store, found)
    remove_used(store)
    return visits if positions else None


def _positions(config: Config, manifest: Manifest, banks: Sequence[BankSpec]) -> Iterator[tuple[str, Position]]:
    """Where each bank goes on, and each run that is on the disk but not in the config; none of those that have ended."""
    output = Path(config.output)
    groups = {f"the training of {bank.site}": {run.name: output / bank.site / run.name for run in bank.runs} for bank in banks}
    known = {directory for directories in groups.values() for directory in directories.values()}
    for directory in find_runs(output):
        if directory not in known and read_run(directory).get("store_fingerprint") == manifest.fingerprint:
            groups[f"run {directory}"] = {directory.name: directory}
    for name, directories in groups.items():
        position = find_resume_position(directories)
        if position is not None:
            yield name, position


def record_waiting(config: Config, visit: int | None) -> None:
    """Write or remove `waiting.json`: the visit that training waits for, if it waits. One rank calls this."""
    path = Path(config.output) / WAITING_FILE
    if visit is None:
        path.unlink(missing_ok=True)
    else:
        write_json_atomically(path, {"waits_for": visit_directory(Path(config.store_directory), visit).name})
