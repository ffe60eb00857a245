"""`gsae export` and `gsae import` in this process, and what their tests compare with."""

import pytest
import torch

from gsae.cli import main


def command(*words) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code)


def mistake(capsys, *words) -> str:
    """The one line that a command complains with."""
    assert command(*words) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    return shown


def close(ours, theirs):
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-3)
