"""A signal that comes at a bad moment."""

import os
import signal

import pytest
import torch

from gsae.store.stopping import StopRequest, read_stop


class SlowGroup:
    """Ranks that talk long enough for a signal to come meanwhile."""

    def reduce(self, value: torch.Tensor, operation: str) -> torch.Tensor:
        result = value.clone()
        os.kill(os.getpid(), signal.SIGUSR1)
        return result


def test_a_signal_that_comes_while_the_ranks_talk_is_not_lost(tmp_path):
    with StopRequest("train", tmp_path).listening() as request:
        assert not request.is_made(SlowGroup())[0]
        assert request.is_made(SlowGroup())[0]


@pytest.mark.parametrize("is_told", [True, False])
def test_what_the_job_was_told_before_is_not_lost(tmp_path, monkeypatch, is_told):
    monkeypatch.setenv("GSAE_TOLD", str(tmp_path / "told-3"))
    if is_told:
        (tmp_path / "told-3").touch()
    with StopRequest("train", tmp_path).listening() as request:
        assert request.is_made(QuietGroup())[0] == is_told
        if is_told:
            request.record(step=0)
            assert read_stop(tmp_path).stage == "train"


class QuietGroup:
    def reduce(self, value: torch.Tensor, operation: str) -> torch.Tensor:
        return value
