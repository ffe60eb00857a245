"""What is broken taken out of a store. In: what `verify` found. Out: a store that a harvest with the same config makes whole again.

The manifest goes last. Until then no reader takes the store for whole, since a log or tar that the manifest speaks of is gone; and a
repair that was killed goes on when it is run again, to the same end. Nothing else may write to the store at that time.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

from gsae.store.durable import fsync_directory
from gsae.store.manifest import MANIFEST_FILE
from gsae.store.progress import cut_log
from gsae.store.verify import Finding


def repair(store: Path, findings: Sequence[Finding]) -> list[str]:
    """Remove what the findings name: broken shards at every site, and of a lane whose log is doubtful what the doubt is about.

    The line of a broken shard stays as a gap, which says what text to make it of again; other shards stay as they are.

    Returns:
        What was removed, a line each.
    """
    removed = []
    for lane in sorted({finding.lane for finding in findings if finding.lane is not None}):
        of_lane = [finding for finding in findings if finding.lane == lane]
        keep = min((finding.shard for finding in of_lane if finding.and_later), default=None)
        removed += _clear_lane(store, lane, keep, {finding.shard for finding in of_lane if not finding.and_later})
    manifest = store / MANIFEST_FILE
    files = {finding.file for finding in findings if finding.file is not None} - {manifest}
    if any(finding.cure == "harvest" for finding in findings):
        files.add(manifest)
    for path in sorted(files, key=lambda path: (path == manifest, path)):
        if path.exists():
            _remove(path)
            removed.append(f"removed {path.relative_to(store)}")
    return removed


def _clear_lane(store: Path, lane: int, keep: int | None, lost: Collection[int]) -> list[str]:
    """Take shards out of a lane: the log first, since a shard exists if its line names its tars."""
    changed = cut_log(store, lane, keep, lost)
    gone: dict[int, int] = {}
    for tar in sorted(store.glob(f"*/{lane:04d}-*.tar")):
        shard = int(tar.stem.rpartition("-")[2])
        if shard in lost or (keep is not None and shard >= keep):
            _remove(tar)
            gone[shard] = gone.get(shard, 0) + 1
    return [
        f"removed shard {shard} of lane {lane}: {gone.get(shard, 0)} tars{', its line is a gap' if shard in lost else ''}"
        for shard in sorted({*gone, *changed})
    ]


def _remove(path: Path) -> None:
    path.unlink()
    fsync_directory(path.parent)
