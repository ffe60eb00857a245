import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gsae.store.durable import append_line, make_directory, write_aside, write_json_atomically

KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from gsae.store.durable import write_aside
with write_aside(Path(sys.argv[1])) as file:
    file.write(b"half of it")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_file_takes_its_name_only_when_it_is_whole(tmp_path):
    path = tmp_path / "deep" / "file"
    with write_aside(path) as file:
        file.write(b"content")
        assert not path.exists()
    assert path.read_bytes() == b"content"
    assert list(path.parent.iterdir()) == [path]


@pytest.fixture
def synced(monkeypatch):
    """The names of what is fsynced, in order, with the names that were in its directory (or in it) at that time."""
    events = []

    def record(descriptor):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        directory = path if path.is_dir() else path.parent
        events.append((path.name, sorted(inner.name for inner in directory.iterdir())))

    monkeypatch.setattr("os.fsync", record)
    return events


def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_return(tmp_path, synced):
    with write_aside(tmp_path / "file") as file:
        file.write(b"content")
    assert synced == [("file.partial", ["file.partial"]), (tmp_path.name, ["file"])]


def test_an_appended_line_and_a_new_file_and_directory_are_on_the_disk(tmp_path, synced):
    append_line(tmp_path / "log", "one")
    append_line(tmp_path / "log", "two")
    make_directory(tmp_path / "a")
    assert [name for name, _ in synced] == ["log", tmp_path.name, "log", tmp_path.name]


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write_half():
        with write_aside(path) as file:
            file.write(b"ne")
            raise KeyError("stopped")

    with pytest.raises(KeyError):
        write_half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_write_cannot_be_read_as_whole(tmp_path):
    path = tmp_path / "file"
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [left.name for left in tmp_path.iterdir()] == ["file.partial"]


def test_json_is_read_back_equal_and_never_holds_nan(tmp_path):
    path = tmp_path / "value.json"
    value = {"a": [1, 0.1 + 0.2, None, "ä"], "b": {"c": True}}
    write_json_atomically(path, value)
    assert json.loads(path.read_text()) == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_atomically(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == value


def test_lines_are_appended(tmp_path):
    path = tmp_path / "log.jsonl"
    append_line(path, "one")
    append_line(path, "two")
    assert path.read_text() == "one\ntwo\n"


def test_directories_are_made_with_their_parents_and_may_exist(tmp_path):
    for _ in range(2):
        make_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
