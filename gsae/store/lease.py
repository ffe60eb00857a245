"""Who may write in a directory. In: a directory, a stage, the ranks of a job. Out: one job at a time, or a refusal that names the other.

The job's first rank holds `<stage>.lease`: job, restart count, host, process. It renews the file's time; another job that sees no renewal
for long enough takes the lease over. Every durable write of every rank asks `require` first: a rank of a job that lost its lease, or
cannot renew it, stops before it writes. Clocks of several hosts are never compared.
"""

import errno
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from gsae.errors import ConfigError, GsaeError
from gsae.world import Group, host_name

SUFFIX = ".lease"
RENEW_SECONDS = 10.0
LOST_SECONDS = 30.0
"""Without a renewal for so long a job writes no more ..."""
EXPIRED_SECONDS = 40.0
"""... before another one takes over."""
SETTLE_SECONDS = 15.0
"""What a requeued job gives its own previous life to notice: more than a renewal."""
LOOK_SECONDS = 1.0
"""Between two looks for a sign of life."""
MOST_TRIES = 20
TRUST_SECONDS = 1.0
"""The lease is not looked at again for so long."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease."""

    job: str | None
    """Of Slurm."""
    restart: int
    """How often Slurm has started that job anew."""
    host: str
    pid: int
    began: float
    """When that process began; a number is given to another process later."""
    kernel: str
    """Which processes its number tells apart: the running system's and the process namespace's."""
    nonce: str

    def __str__(self) -> str:
        job = f"job {self.job} on " if self.job is not None else ""
        return f"{job}{self.host} (process {self.pid})"

    @property
    def is_dead_here(self) -> bool:
        """Whether it was a process of this system that is no more."""
        if self.kernel != _kernel():
            return False
        try:
            process = psutil.Process(self.pid)
            return bool(process.status() == psutil.STATUS_ZOMBIE or process.create_time() != self.began)
        except psutil.NoSuchProcess:
            return True

    def is_previous_life_of(self, other: "Holder") -> bool:
        """Whether the other is the same job, requeued since."""
        return self.job is not None and self.job == other.job and self.restart < other.restart


@dataclass
class _Held:
    """A lease of this job, as a rank of it knows it."""

    directory: Path
    path: Path
    nonce: str
    renewed_at: float | None
    """On the rank that renews it."""
    looked_at: float

    def require(self) -> None:
        now = time.monotonic()
        if now - self.looked_at < TRUST_SECONDS:
            return
        holder = _read(self.path)
        if holder is None or holder.nonce != self.nonce:
            whose = f"was taken over by {holder}" if holder is not None else "is gone"
            raise GsaeError(f"the lease {self.path} {whose}, so this job writes nothing more there; see that one job writes at a time")
        if self.renewed_at is not None and now - self.renewed_at > LOST_SECONDS:
            raise GsaeError(
                f"the lease {self.path} could not be renewed for {now - self.renewed_at:.0f} s, so this job writes nothing more there; "
                "see that the disk can be reached, then run the same again"
            )
        self.looked_at = time.monotonic()


_HELD: list[_Held] = []
"""The leases of this process's job."""


def require(path: Path) -> None:
    """Raise GsaeError where `path` lies in a directory whose lease this job had, and has no longer. Called before every durable write."""
    for held in _HELD:
        if path.is_relative_to(held.directory):
            held.require()


@contextmanager
def lease(directory: Path, stage: str, setting: str, group: Group, say: Callable[[str], None]) -> Iterator[None]:
    """A block in which this job is the only one that writes in `directory` as this stage. All ranks enter and leave it together.

    Args:
        directory: where; it is there.
        stage: as what; a training and an evaluation of the same runs do not meet.
        setting: that names the directory, for the message.
        group: the ranks of the job.
        say: shows a line on the first rank.

    Raises:
        ConfigError: another job holds it.
    """
    path = directory / f"{stage}{SUFFIX}"
    nonce = group.on_first(lambda: _acquire(path, setting, say))
    now = time.monotonic()
    held = _Held(directory, path, nonce, now if group.is_first else None, now)
    _HELD.append(held)
    ended = threading.Event()
    thread = threading.Thread(target=_renew, args=(held, ended), daemon=True, name="lease")
    if group.is_first:
        thread.start()
    try:
        yield
    finally:
        _HELD.remove(held)
        ended.set()
        if group.is_first:
            thread.join(RENEW_SECONDS)
            _release(held)


def clear(directory: Path, stage: str) -> None:
    """Remove a lease that was left by a process of this system that is no more, where nothing is to be written any more."""
    path = directory / f"{stage}{SUFFIX}"
    holder = _read(path)
    if holder is not None and holder.is_dead_here:
        path.unlink(missing_ok=True)


def _acquire(path: Path, setting: str, say: Callable[[str], None]) -> str:
    """Take the lease; gives its nonce."""
    mine = _this_process()
    partial = path.with_name(f"{path.name}.{mine.nonce}.partial")
    tries = 0
    try:
        while True:
            partial.write_text(json.dumps(asdict(mine)) + "\n", encoding="utf-8")
            if _place(partial, path):
                return mine.nonce
            holder = _read(path)
            if holder is None:  # given back since, or not written yet
                tries += 1
                if tries > MOST_TRIES:
                    raise ConfigError(f"{path} is empty; see that no job writes there, then delete it")
                time.sleep(LOOK_SECONDS)
                continue
            if not holder.is_dead_here and not _has_expired(path, holder, mine, setting, say):
                continue
            partial.replace(path)
            # A previous life is to notice; so is another job that takes over at this moment.
            time.sleep(SETTLE_SECONDS if holder.is_previous_life_of(mine) else 0.0 if holder.is_dead_here else LOOK_SECONDS)
            if (now := _read(path)) is not None and now.nonce == mine.nonce:
                return mine.nonce
    finally:
        partial.unlink(missing_ok=True)


def _place(partial: Path, path: Path) -> bool:
    """Give the file its name; False where there is one of that name."""
    try:
        os.link(partial, path)  # whole at once, on network file systems too
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        try:  # a file system without links
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        partial.replace(path)
    return True


def _has_expired(path: Path, holder: Holder, mine: Holder, setting: str, say: Callable[[str], None]) -> bool:
    """Whether the lease may be taken from its holder, which is waited for; False when it was given back meanwhile.

    Raises:
        ConfigError: the holder is alive.
    """
    if holder.is_previous_life_of(mine):
        say(f"{path} was held by this job before it was requeued; takes it over")
        return True
    say(f"{path} is held by {holder}; waits up to {EXPIRED_SECONDS:.0f} s for a sign of life")
    seen, since = _version(path), time.monotonic()
    while time.monotonic() - since < EXPIRED_SECONDS:
        time.sleep(LOOK_SECONDS)
        now = _version(path)
        if now == seen:
            continue
        current = _read(path)
        if current is None:
            return False
        if not current.is_dead_here:
            end = f"scancel {current.job}" if current.job is not None else "end that process"
            raise ConfigError(
                f"{setting} is {path.parent}, where {current} writes; wait for it, or {end}, or give {setting} another directory"
            )
    return True


def _renew(held: _Held, ended: threading.Event) -> None:
    """Renew until the block ends or the lease is another's."""
    own = _inode(held.path)
    while not ended.wait(RENEW_SECONDS):
        with suppress(OSError):
            if _inode(held.path) != own:
                return
            os.utime(held.path)
            held.renewed_at = time.monotonic()


def _release(held: _Held) -> None:
    with suppress(OSError):
        holder = _read(held.path)
        if holder is not None and holder.nonce == held.nonce:
            held.path.unlink()


def _read(path: Path) -> Holder | None:
    """The holder; None where there is no lease."""
    try:
        text = path.read_text(encoding="utf-8")
        return Holder(**json.loads(text)) if text else None
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); see that no job writes there, then delete it") from error


def _version(path: Path) -> tuple[int, int] | None:
    """Changes with the holder and with each renewal; None where there is no lease."""
    try:
        with path.open("rb") as file:  # network file systems look at a file anew when it is opened
            status = os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _inode(path: Path) -> int | None:
    version = _version(path)
    return None if version is None else version[0]


def _this_process() -> Holder:
    began = psutil.Process().create_time()
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return Holder(os.environ.get("SLURM_JOB_ID"), restart, host_name(), os.getpid(), began, _kernel(), secrets.token_hex(8))


def _kernel() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
