"""A signal that comes at a bad moment."""

import os
import signal

import torch

from gsae.train.stop import StopRequest


class SlowGroup:
    """Ranks that talk long enough for a signal to come meanwhile."""

    def reduce(self, value: torch.Tensor, operation: str) -> torch.Tensor:
        result = value.clone()
        os.kill(os.getpid(), signal.SIGUSR1)
        return result


def test_a_signal_that_comes_while_the_ranks_talk_is_not_lost(tmp_path):
    with StopRequest(tmp_path).listening() as request:
        assert not request.is_made(SlowGroup())[0]
        assert request.is_made(SlowGroup())[0]
