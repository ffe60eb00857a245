"""What is broken taken out of a store. In: what `verify` found. Out: a store that a harvest with the same config makes whole again.

The manifest goes last. Until then no reader takes the store for whole, since a log or tar that the manifest speaks of is gone; and a
repair that was killed goes on when it is run again, to the same end. Nothing else may write to the store at that time.
"""

from collections.abc import Sequence
from pathlib import Path

from gsae.store.durable import fsync_directory, write_aside
from gsae.store.manifest import MANIFEST_FILE
from gsae.store.progress import progress_path
from gsae.store.verify import Finding


def repair(store: Path, findings: Sequence[Finding]) -> list[str]:
    """Remove what the findings name: of a lane, the first broken shard and those after it, at every site.

    A lane's log is cut there because a lane is harvested from where its log ends; shards before it and other lanes stay as they are.

    Returns:
        What was removed, a line each.
    """
    first_broken: dict[int, int] = {}
    for finding in findings:
        if finding.lane is not None:
            first_broken[finding.lane] = min(finding.shard, first_broken.get(finding.lane, finding.shard))
    removed = [line for lane, shard in sorted(first_broken.items()) for line in _cut_lane(store, lane, shard)]
    manifest = store / MANIFEST_FILE
    files = {finding.file for finding in findings if finding.file is not None} - {manifest}
    if any(finding.cure == "harvest" for finding in findings):
        files.add(manifest)
    for path in sorted(files, key=lambda path: (path == manifest, path)):
        if path.exists():
            _remove(path)
            removed.append(f"removed {path.relative_to(store)}")
    return removed


def _cut_lane(store: Path, lane: int, keep: int) -> list[str]:
    """Leave a lane its first `keep` shards: the log first, since a shard exists if its line does."""
    log = progress_path(store, lane)
    lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
    if keep == 0 and lines:
        _remove(log)
    elif len(lines) > keep:
        with write_aside(log) as file:
            file.write(b"".join(lines[:keep]))
    tars = [path for path in sorted(store.glob(f"*/{lane:04d}-*.tar")) if int(path.stem.rpartition("-")[2]) >= keep]
    for tar in tars:
        _remove(tar)
    if not tars and len(lines) <= keep:
        return []
    return [f"removed shards {keep} and later of lane {lane}: {len(tars)} tars, {max(0, len(lines) - keep)} lines of its log"]


def _remove(path: Path) -> None:
    path.unlink()
    fsync_directory(path.parent)
