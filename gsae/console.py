"""What a person sees while a stage works. In: lines, progress and runs' numbers. Out: a live view on a terminal, plain lines elsewhere.

Nothing is set up at import, and rich is imported only when something is first shown on a terminal. Ranks other than the
first are silent.
"""

import math
import os
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.live import Live
    from rich.progress import Progress
    from rich.table import Table

_STATE_STYLES = {"waiting": "dim", "finished": "green", "stopped": "red"}
_COLUMNS = ("rows", "rows/s", "recon.", "spars.", "aux.", "L0", "FVU", "dead", "ETA", "state")
_WORDS = ("rows", "rows/s", "reconstruction", "sparsity", "auxiliary", "L0", "FVU", "dead", "ETA", "state")


LOGS = "GSAE_LOGS"
"""Environment variable: directory of a log file for each rank but the first. Slurm jobs set it."""
_user: "TextIO | None" = None
"""Where a diverted process still reaches the user."""


def divert(rank: int) -> None:
    """Keep the ranks' voices apart, where `GSAE_LOGS` names a directory: one a job reads, and what launchers say on stderr is none of them.

    The first rank writes all to its stdout, every other one to `rank-<rank>.log` there; what `complain` says goes to both.
    """
    global _user
    directory = os.environ.get(LOGS)
    if not directory or _user is not None:
        return
    _user = os.fdopen(os.dup(1), "w")
    if not rank:
        os.dup2(1, 2)
        return
    Path(directory).mkdir(parents=True, exist_ok=True)
    log = os.open(Path(directory) / f"rank-{rank:04d}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)


def complain(message: str) -> None:
    """Tell the user what is wrong: one line on stderr that begins with `gsae:`, and with the rank where that is not the first."""
    rank = int(os.environ.get("RANK", "0"))
    where = f"rank {rank}: " if rank else ""
    for stream in (sys.stderr, _user if rank else None):
        if stream is not None:
            stream.write(f"gsae: {where}{' '.join(message.split())}\n")
            stream.flush()


@dataclass(frozen=True)
class RunStatus:
    """The numbers a training shows of one run; None where there is none yet."""

    rows: int = 0
    rows_per_second: float | None = None
    reconstruction: float | None = None
    sparsity: float | None = None
    auxiliary: float | None = None
    l0: float | None = None
    fvu: float | None = None
    dead_fraction: float | None = None
    eta_seconds: float | None = None
    state: str = "waiting"
    """`waiting`, `running`, `finished`, `stopped`, or another short word."""


def open_console(is_first_rank: bool) -> "Console":
    """The console of this rank; open one a process."""
    return Console(is_first_rank)


class Console:
    """One rank's voice. Made by `open_console`."""

    def __init__(self, is_first_rank: bool) -> None:
        self._is_first_rank = is_first_rank
        self._warned: set[str] = set()
        self._is_terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._rich: RichConsole | None = None

    def say(self, text: str) -> None:
        """One line of the log."""
        if self._is_first_rank:
            self.write(text)

    def warn(self, text: str) -> None:
        """One line about something that does not stop the work but should be known."""
        if self._is_first_rank:
            self.write(f"warning: {text}", style="yellow")

    def warn_once(self, text: str) -> None:
        """As `warn`, unless it was said before."""
        if text not in self._warned:
            self._warned.add(text)
            self.warn(text)

    @contextmanager
    def training(
        self, site: str, run_names: Sequence[str], total_rows: int, is_shown: bool | None = None, num_groups: int = 1
    ) -> "Iterator[TrainingView]":
        """A view of the runs of one site while they train.

        Args:
            site: name of the site, the view's title.
            run_names: the runs, in the order of the lines.
            total_rows: rows of each run.
            is_shown: whether this rank shows it; None shows it on the job's first rank. With several groups pass each group's `is_first`.
            num_groups: groups that train at once. Several cannot share a terminal's live view, so they write plain lines.
        """
        shown = self._is_first_rank if is_shown is None else is_shown
        view = TrainingView(self, site, run_names, total_rows, shown, self._rich_console() if shown and num_groups == 1 else None)
        try:
            yield view
        finally:
            view.close()

    @contextmanager
    def progress(self, title: str, total: int | None, unit: str, done: int = 0) -> "Iterator[ProgressBar]":
        """One bar over the work of all ranks, shown by the first.

        Args:
            title: what is being done.
            total: how many units there are, over all ranks; None where that is not known.
            unit: their name, in the plural.
            done: how many an interrupted job had done before.
        """
        shown = self._is_first_rank
        bar = ProgressBar(self, title, total, unit, done, shown, self._rich_console() if shown else None)
        try:
            yield bar
        finally:
            bar.close()

    def write(self, text: str, style: str = "") -> None:
        """One line, whatever the rank; with the time where there is no terminal. `style` colours it on a terminal."""
        terminal = self._rich_console()
        if terminal is None:
            sys.stdout.write(f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S} {text}\n")
            sys.stdout.flush()
        else:
            terminal.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def _rich_console(self) -> "RichConsole | None":
        """The one rich console of this process, if there is a terminal: what is written through it stands above a live view."""
        if self._is_terminal and self._rich is None:
            from rich.console import Console as RichConsole

            self._rich = RichConsole()
        return self._rich


class Pace:
    """When the next line is due: `least_seconds` after the last, later a hundredth of the time so far, at most `most_seconds`."""

    def __init__(self, least_seconds: float = 5.0, most_seconds: float = 60.0) -> None:
        self._least_seconds, self._most_seconds = least_seconds, most_seconds
        self._start = time.monotonic()
        self._last = -math.inf

    def is_due(self) -> bool:
        """Whether it is time for a line; if so, the wait for the next begins."""
        now = time.monotonic()
        if now - self._last < min(max(self._least_seconds, 0.01 * (now - self._start)), self._most_seconds):
            return False
        self._last = now
        return True


class TrainingView:
    """The runs of one site while they train: a live table on a terminal, elsewhere a plain line a run from time to time and at the end."""

    def __init__(
        self, console: Console, site: str, run_names: Sequence[str], total_rows: int, is_shown: bool, terminal: "RichConsole | None"
    ) -> None:
        self._console = console
        self._site = site
        self._total_rows = total_rows
        self._is_shown = is_shown
        self._statuses = dict.fromkeys(run_names, RunStatus())
        self._written = dict(self._statuses)
        self._paces = {name: Pace() for name in run_names}
        self._times = ""
        self._frames = Pace(least_seconds=0.25, most_seconds=0.25)
        self._live = None if terminal is None else self._start_live(terminal)

    def show_times(self, shares: str) -> None:
        """What the time goes for, in at most 75 characters; shown with the next numbers, under the table or at the end of a line."""
        self._times = shares

    def update(
        self,
        run_name: str,
        rows: int,
        rows_per_second: float | None,
        reconstruction: float | None,
        sparsity: float | None,
        auxiliary: float | None,
        l0: float | None,
        fvu: float | None,
        dead_fraction: float | None,
        eta_seconds: float | None,
        state: str,
    ) -> None:
        """New numbers of one run. The view decides when it shows them: a new state at once, numbers at its pace."""
        self._take(
            run_name,
            RunStatus(rows, rows_per_second, reconstruction, sparsity, auxiliary, l0, fvu, dead_fraction, eta_seconds, state),
        )

    def set_state(self, run_name: str, state: str) -> None:
        """A new state of one run beside its last numbers; shown at once."""
        self._take(run_name, replace(self._statuses[run_name], state=state))

    def _take(self, run_name: str, status: RunStatus) -> None:
        is_new_state = self._statuses[run_name].state != status.state
        self._statuses[run_name] = status
        if self._live is not None:
            if self._frames.is_due() or is_new_state:
                self._live.update(self._table(self._live.console.width), refresh=True)
        elif self._is_shown and (self._paces[run_name].is_due() or is_new_state):
            self._write_line(run_name)

    def say(self, text: str) -> None:
        """One line of the log about this site, from the rank that shows the view."""
        if self._is_shown:
            self._console.write(f"{self._site}: {text}")

    def close(self) -> None:
        """Show the last numbers and leave the terminal as it was."""
        if self._live is not None:
            self._live.update(self._table(self._live.console.width))
            self._live.stop()
        elif self._is_shown:
            for name, status in self._statuses.items():
                if status is not self._written[name]:
                    self._write_line(name)

    def _start_live(self, terminal: "RichConsole") -> "Live":
        from rich.live import Live

        live = Live(self._table(terminal.width), console=terminal, auto_refresh=False)
        live.start(refresh=True)
        return live

    def _table(self, width: int) -> "Table":
        title = f"{self._site}, {format_count(self._total_rows)} rows a run"
        return _runs_table(title, self._statuses, self._total_rows, width, self._times)

    def _write_line(self, run_name: str) -> None:
        status = self._written[run_name] = self._statuses[run_name]
        numbers = ", ".join(f"{word} {cell}" for word, cell in zip(_WORDS, _cells(status, self._total_rows), strict=True))
        self._console.write(f"{self._site} {run_name}: {numbers}{self._times and f' ({self._times})'}")


class ProgressBar:
    """Work done out of a total: a bar on a terminal, elsewhere a plain line from time to time and at the end."""

    def __init__(
        self, console: Console, title: str, total: int | None, unit: str, done: int, is_shown: bool, terminal: "RichConsole | None"
    ) -> None:
        self._console = console
        self._title, self._total, self._unit = title, total, unit
        self._done_before = self._done = done
        self._extra = self._last_line = ""
        self._is_shown = is_shown
        self._is_closed = False
        self._lock = threading.RLock()
        self._start = time.monotonic()
        self._pace = Pace() if terminal is None else Pace(least_seconds=0.25, most_seconds=0.25)
        self._live = None if terminal is None else self._start_live(terminal)

    def advance(self, n: int = 1) -> None:
        """`n` more units are done, over all ranks."""
        with self._lock:
            self.show(self._done + n)

    def show(self, done: int, extra: str = "") -> None:
        """So many units are done, over all ranks. From any thread. A total that was estimated too low grows with them.

        Args:
            done: those done before included.
            extra: a few words more for the end of the line; a terminal of 100 columns has room for about 35 characters.
        """
        with self._lock:
            self._done, self._extra = done, extra
            self._total = None if self._total is None else max(self._total, done)
            if self._is_shown and not self._is_closed and self._pace.is_due():
                self._write()

    def close(self) -> None:
        """Show the last numbers and leave the terminal as it was."""
        with self._lock:
            self._is_closed = True
            if self._is_shown:
                self._write()
            if self._live is not None:
                self._live.stop()

    def _start_live(self, terminal: "RichConsole") -> "Progress":
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[numbers]}", markup=False))
        live = Progress(*columns, console=terminal, auto_refresh=False)
        live.add_task(self._title, total=self._total, completed=self._done, numbers="")
        live.start()
        terminal.show_cursor()  # a process that is ended midway could not bring it back
        return live

    def _write(self) -> None:
        seconds = time.monotonic() - self._start
        rate = (self._done - self._done_before) / seconds if seconds > 0 else 0.0
        if self._total is None:
            when, share, of_all = format_duration(seconds), "", ""
        else:
            left = self._total - self._done
            when = f"ETA {format_duration(left / rate if rate > 0 else None)}" if left > 0 else f"took {format_duration(seconds)}"
            share, of_all = f"{100 * self._done // max(self._total, 1)}%", " of "
        rest = ", ".join(filter(None, (f"{format_count(rate)}/s", when, self._extra)))
        if self._live is None:
            counts = f"{self._done:,}{of_all}{f'{self._total:,}' if of_all else ''} {self._unit}"
            line = f"{self._title}: {', '.join(filter(None, (share, counts, rest)))}"
            if line != self._last_line:  # the end may have been shown already
                self._console.write(line)
            self._last_line = line
        else:
            counts = f"{format_count(self._done)}{of_all}{format_count(self._total) if of_all else ''} {self._unit}"
            numbers = f"{share} {counts}, {rest}".lstrip()
            self._live.update(self._live.task_ids[0], total=self._total, completed=self._done, numbers=numbers, refresh=True)


def format_count(value: float | None) -> str:
    """A count in at most five characters: `512`, `9.41k`, `154k`, `1.20M`."""
    if value is None:
        return "-"
    units = iter(("", "k", "M", "G", "T"))
    unit = next(units)
    while 999.5 <= abs(value) < math.inf and unit != "T":
        value, unit = value / 1000, next(units)
    digits = 0 if unit == "" or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f}{unit}"


def format_duration(seconds: float | None) -> str:
    """A time in at most six characters: `45s`, `12m05s`, `3h07m`, `2d04h`."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def _format_number(value: float | None) -> str:
    """A number in at most five characters: `0.312`, `46.4`, `1.05k`, `3e-05`."""
    if value is None or abs(value) >= 999.5:
        return format_count(value)
    if 0 < abs(value) < 0.0005:
        return f"{value:.0e}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _cells(status: RunStatus, total_rows: int) -> list[str]:
    """The texts of `_COLUMNS`."""
    done = f"{format_count(status.rows)} {status.rows / max(total_rows, 1):.0%}"
    losses = [_format_number(value) for value in (status.reconstruction, status.sparsity, status.auxiliary, status.l0, status.fvu)]
    dead = "-" if status.dead_fraction is None else f"{100 * status.dead_fraction:.1f}%"
    return [done, format_count(status.rows_per_second), *losses, dead, format_duration(status.eta_seconds), status.state]


def _runs_table(title: str, statuses: Mapping[str, RunStatus], total_rows: int, width: int, caption: str = "") -> "Table":
    """One line a run; a name too long for the width is broken at a hyphen instead of being cut."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0), header_style="dim")
    if caption:
        table.caption = Text(caption, style="dim", no_wrap=True, overflow="ignore")  # the table may be narrower
    table.add_column("run", no_wrap=True)
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
    rows_of_cells = {name: _cells(status, total_rows) for name, status in statuses.items()}
    taken = sum(1 + max(len(cell) for cell in column) for column in zip(_COLUMNS, *rows_of_cells.values(), strict=True))
    for name, cells in rows_of_cells.items():
        lines = textwrap.wrap(name, max(width - taken - 1, 16), subsequent_indent="  ")
        table.add_row("\n".join(lines), *cells, style=_STATE_STYLES.get(statuses[name].state, ""))
    return table
