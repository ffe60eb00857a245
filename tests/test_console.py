import io
import os
import pty
import re
import subprocess
import sys
import textwrap

import pytest
from rich.console import Console as RichConsole

from gsae.console import Pace, RunStatus, _runs_table, format_count, format_duration, open_console

NUMBERS = {
    "rows_per_second": 3712.0,
    "reconstruction": 0.312,
    "sparsity": 1.8,
    "auxiliary": 0.331,
    "l0": 46.4,
    "fvu": 0.317,
    "dead_fraction": 0.012,
    "eta_seconds": 725.0,
}
STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


def test_importing_the_console_imports_neither_rich_nor_torch():
    code = "import sys, gsae.console; sys.exit(any(name in sys.modules for name in ('rich', 'torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_a_terminal_a_line_is_plain_and_timestamped(capsys):
    console = open_console(is_first_rank=True)
    console.say("harvest of [bold]3[/bold] sites")
    console.warn("12 % of the squared norm")
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(STAMP + re.escape("harvest of [bold]3[/bold] sites"), lines[0])
    assert re.fullmatch(STAMP + "warning: 12 % of the squared norm", lines[1])


def test_what_is_said_once_is_said_once(capsys):
    console = open_console(is_first_rank=True)
    for text in ("no kernels", "no kernels", "another"):
        console.warn_once(text)
    assert [line.partition("warning: ")[2] for line in capsys.readouterr().out.splitlines()] == ["no kernels", "another"]


def test_other_ranks_are_silent(capsys):
    console = open_console(is_first_rank=False)
    console.say("a")
    console.warn("b")
    with console.progress("harvest", 2, "contexts") as bar:
        bar.advance(2)
    with console.training("resid.15", ["run"], 100) as view:
        view.update("run", 50, **NUMBERS, state="running")
        view.say("c")
    assert capsys.readouterr() == ("", "")


def test_the_first_rank_of_another_group_shows_its_own_runs(capsys):
    console = open_console(is_first_rank=False)
    with console.training("resid.28", ["run"], 100, is_shown=True, num_groups=2) as view:
        view.update("run", 50, **NUMBERS, state="running")
        view.say("run resampled 12 features")
    first, second = capsys.readouterr().out.splitlines()
    assert "resid.28 run: rows 50 50%, rows/s 3.71k, reconstruction 0.312" in first
    assert second.endswith("resid.28: run resampled 12 features")


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("gsae.console.time", clock)
    return clock


def test_pace_slows_down_to_a_line_a_minute(clock):
    pace = Pace(least_seconds=5.0, most_seconds=60.0)

    def seconds_until_due() -> float:
        start = clock.now
        while not pace.is_due():
            clock.now += 0.5
        return clock.now - start

    assert seconds_until_due() == 0
    assert seconds_until_due() == 5
    clock.now = 1000.0
    seconds_until_due()
    assert seconds_until_due() == 10.5  # 1 % of 1010.5, in steps of half a second
    clock.now = 100_000.0
    seconds_until_due()
    assert seconds_until_due() == 60


def test_a_run_gets_a_line_at_first_at_a_new_state_and_at_the_end(capsys):
    console = open_console(is_first_rank=True)
    with console.training("resid.15", ["a", "b"], 100) as view:
        for rows in (10, 20, 30):
            view.update("a", rows, **NUMBERS, state="running")
        view.update("a", 40, **NUMBERS, state="stopped")
        view.update("b", 10, **NUMBERS, state="running")
        view.update("b", 20, **NUMBERS, state="running")
    shown = [re.search(r"(\w): rows (\d+) .* state (\w+)$", line) for line in capsys.readouterr().out.splitlines()]
    assert [match.groups() for match in shown if match] == [
        ("a", "10", "running"),
        ("a", "40", "stopped"),
        ("b", "10", "running"),
        ("b", "20", "running"),
    ]


def test_a_new_state_is_shown_at_once_beside_the_last_numbers(capsys):
    console = open_console(is_first_rank=True)
    with console.training("resid.15", ["a"], 100) as view:
        view.update("a", 10, **NUMBERS, state="running")
        view.set_state("a", "stopped")
        shown = capsys.readouterr().out.splitlines()
    assert [re.search(r"rows (\d+) .* state (\w+)$", line).groups() for line in shown] == [("10", "running"), ("10", "stopped")]


SHARES = "waiting 20%, copying 20%, computing 20%, communicating 20%, chores 20%"


def test_a_line_ends_with_what_the_time_goes_for(capsys):
    with open_console(is_first_rank=True).training("resid.15", ["a"], 100) as view:
        view.update("a", 10, **NUMBERS, state="running")
        view.show_times(SHARES)
        view.update("a", 20, **NUMBERS, state="finished")
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("state running")
    assert second.endswith(f"state finished ({SHARES})")


def test_the_last_numbers_are_shown_when_training_raises(capsys):
    def train() -> None:
        with open_console(is_first_rank=True).training("resid.15", ["a"], 100) as view:
            view.update("a", 10, **NUMBERS, state="running")
            view.update("a", 20, **NUMBERS, state="running")
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        train()
    assert "a: rows 20 20%" in capsys.readouterr().out


def test_progress_ends_with_the_total_and_its_rate_leaves_out_what_was_done_before(capsys, clock):
    with open_console(is_first_rank=True).progress("harvest", 200, "contexts", done=100) as bar:
        clock.now = 10.0
        bar.advance(50)
        bar.advance(30)
        clock.now = 16.0
        bar.advance(20)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.endswith("harvest: 75%, 150 of 200 contexts, 5/s, ETA 10s")
    assert last.endswith("harvest: 100%, 200 of 200 contexts, 6/s, took 16s")


def test_progress_shows_the_work_of_all_ranks_at_its_pace(capsys, clock):
    with open_console(is_first_rank=True).progress("harvest", 200, "contexts", done=100) as bar:
        for seconds, done in ((10, 140), (11, 150), (12, 160), (20, 180), (40, 210)):
            clock.now = float(seconds)
            bar.show(done, f"{done / 10:.1f} MB/s, {done} shards")
    lines = [line[20:] for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "harvest: 70%, 140 of 200 contexts, 4/s, ETA 15s, 14.0 MB/s, 140 shards",
        "harvest: 90%, 180 of 200 contexts, 4/s, ETA 5s, 18.0 MB/s, 180 shards",
        "harvest: 100%, 210 of 210 contexts, 3/s, took 40s, 21.0 MB/s, 210 shards",
    ]


def test_a_closed_bar_shows_nothing_more(capsys, clock):
    with open_console(is_first_rank=True).progress("harvest", 200, "contexts") as bar:
        bar.show(100)
    capsys.readouterr()
    clock.now = 100.0
    bar.show(200)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0, "0"), (512, "512"), (9_412, "9.41k"), (153_600, "154k"), (999_600, "1.00M"), (1e9, "1.00G")]
)
def test_counts_are_short(value, text):
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (float("inf"), "-"), (0.4, "0s"), (59.6, "1m00s"), (725, "12m05s"), (11_220, "3h07m"), (187_200, "2d04h")],
)
def test_durations_are_short(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize("width", [100, 140])
def test_long_run_names_are_whole_at_100_columns(width):
    names = ["relu-m2304-l0.15-s0", "gated-no-aux-resampled-m32768-l0.0125-s0", "gated-norm-weighted-m32768-l0.025-s1"]
    status = RunStatus(153_600, 12_345.0, 0.312, 121.2, 0.0001, 1046.4, 0.317, 0.123, 3900.0, "running")
    screen = RichConsole(width=width, file=io.StringIO(), record=True)
    screen.print(_runs_table("resid.15", dict.fromkeys(names, status), 300_000, width, SHARES))
    *lines, last = screen.export_text().splitlines()
    assert last.strip() == SHARES
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "…" not in text
    shown = "".join(line[: line.find(" 154k")].strip() if " 154k" in line else line.strip() for line in lines[2:])
    assert shown == "".join(names)
    assert re.search(r"154k 51% +12.3k +0.312 +121.2 +1e-04 +1.05k +0.317 +12.3% +1h05m +running", text)


def test_what_the_time_goes_for_is_one_line_under_a_narrow_table():
    screen = RichConsole(width=100, file=io.StringIO(), record=True)
    screen.print(_runs_table("resid.15", {"relu-m8-l1-s0": RunStatus()}, 300_000, 100, SHARES))
    assert screen.export_text().splitlines()[-1].strip() == SHARES


def on_terminal(code: str) -> str:
    """What a program writes to a terminal of 100 columns."""
    main, secondary = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=secondary, stderr=secondary, env=environment) as process:
        os.close(secondary)
        output = b""
        try:
            while part := os.read(main, 65536):
                output += part
        except OSError:  # the other end is closed
            pass
    os.close(main)
    assert process.returncode == 0, output.decode()
    return output.decode()


@pytest.mark.parametrize(("num_groups", "is_live"), [(1, True), (2, False)])
def test_on_a_terminal_one_group_gets_a_live_table_and_several_get_lines(num_groups, is_live):
    output = on_terminal(f"""
        from gsae.console import open_console
        console = open_console(is_first_rank=True)
        with console.training("resid.15", ["gated-m2304-l0.175-s0"], 1000, num_groups={num_groups}) as view:
            view.update("gated-m2304-l0.175-s0", 500, 10.0, 0.3, 1.8, 0.3, 46.4, 0.3, 0.01, 50, "running")
            view.say("a line above")
            view.show_times("{SHARES}")
            view.update("gated-m2304-l0.175-s0", 1000, 10.0, 0.3, 1.8, 0.3, 46.4, 0.3, 0.01, 0, "finished")
    """)
    moves_up = re.search(r"\x1b\[\d*A|\x1b\[2K", output) is not None
    assert moves_up == is_live
    assert output.rindex("resid.15: a line above") < output.rindex("finished")
    assert ("recon." in output) == is_live
    assert SHARES in output


def test_on_a_terminal_progress_is_a_bar():
    output = on_terminal("""
        from gsae.console import open_console
        with open_console(is_first_rank=True).progress("harvest", 20, "contexts") as bar:
            for _ in range(20):
                bar.advance()
    """)
    assert "━" in output
    assert "20 of 20 contexts" in output


def screens(output: str) -> list[str]:
    """What a terminal was told, without its control characters, a line each."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output).replace("\r", "\n").splitlines()


def test_on_a_terminal_of_100_columns_the_numbers_of_a_large_job_fit():
    output = on_terminal("""
        import time
        from gsae.console import open_console
        with open_console(is_first_rank=True).progress("harvest", 10**10, "tokens") as bar:
            time.sleep(0.3)
            bar.show(1_234_567_890, "12,345 MB/s, 1,234 of ~98,765 shards")
    """)
    *_, last = (line for line in screens(output) if line.strip())
    assert re.fullmatch(r"harvest [━╸╺]{4,} 12% 1.23G of 10.0G tokens, [\d.]+G/s, ETA \d+s, 12,345 MB/s, 1,234 of ~98,765 shards *", last)
    assert len(last) <= 100


def test_on_a_terminal_lines_and_a_bar_from_several_threads_do_not_mix():
    output = on_terminal("""
        import threading
        from gsae import console as module
        module.Pace.is_due = lambda pace: True
        console = module.open_console(is_first_rank=True)
        with console.progress("harvest", 300, "tokens") as bar:
            threads = [threading.Thread(target=lambda: [bar.show(n, "x") for n in range(300)]) for _ in range(2)]
            for thread in threads:
                thread.start()
            for n in range(100):
                console.say(f"line {n} of 100")
            for thread in threads:
                thread.join()
    """)
    said = [line for line in screens(output) if "line" in line]
    assert said == [f"line {n} of 100" for n in range(100)]
    assert output.rindex("\x1b[?25l") < output.index("\x1b[?25h") < output.index("line 0"), "a process that is killed leaves a cursor"


DIVERTED = "from gsae import console; import os, sys; console.divert(int(os.environ['RANK'])); os.write(1, b'library\\n'); "
DIVERTED += "os.write(2, b'warning\\n'); console.open_console(True).say('line'); console.complain('a  mistake')"


@pytest.mark.parametrize("rank", [0, 7])
def test_ranks_but_the_first_write_into_files_and_complain_to_the_user_too(tmp_path, rank):
    environment = {**os.environ, "GSAE_LOGS": str(tmp_path / "logs"), "RANK": str(rank)}
    done = subprocess.run([sys.executable, "-c", DIVERTED], capture_output=True, text=True, check=True, env=environment)
    assert done.stderr == "", "that is where launchers speak"
    if rank == 0:
        assert re.sub(r"\d{4}-.*:\d\d ", "", done.stdout).splitlines() == ["library", "warning", "line", "gsae: a mistake"]
        assert not (tmp_path / "logs").exists()
    else:
        assert done.stdout == "gsae: rank 7: a mistake\n"
        log = (tmp_path / "logs" / "rank-0007.log").read_text()
        assert re.sub(r"\d{4}-.*:\d\d ", "", log).splitlines() == ["library", "warning", "line", "gsae: rank 7: a mistake"]


def test_without_a_directory_for_logs_nothing_is_diverted():
    environment = {name: value for name, value in os.environ.items() if name != "GSAE_LOGS"} | {"RANK": "7"}
    done = subprocess.run([sys.executable, "-c", DIVERTED], capture_output=True, text=True, check=True, env=environment)
    assert done.stderr == "warning\ngsae: rank 7: a mistake\n"
