"""A rank's clock. On a CPU it is given times; on a GPU it watches a device that sleeps."""

import time
from types import SimpleNamespace

import pytest
import torch

from gsae.train.clock import Clock, Seconds


def test_time_goes_to_what_was_entered_last(monkeypatch):
    now = 10.0
    monkeypatch.setattr("gsae.train.clock.time", SimpleNamespace(perf_counter=lambda: now))
    clock = Clock(torch.device("cpu"))
    for phase, seconds in (("waiting", 1), ("copying", 2), ("computing", 4), ("communicating", 8), ("computing", 16), ("chores", 32)):
        clock.enter(phase)
        now += seconds
    assert clock.read() == Seconds(waiting=1, copying=2, computing=20, communicating=8, chores=32)
    now += 64
    clock.enter("waiting")
    now += 128
    assert clock.read() == Seconds(waiting=128, chores=64), "it goes on in the phase that was entered, with nothing of what was read"


def test_seconds_add_up():
    both = Seconds(1, 2, 3, 4, 5) + Seconds(10, 20, 30, 40, 50)
    assert both == Seconds(11, 22, 33, 44, 55)
    assert both.total == 165


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_time_is_the_devices_and_no_entry_waits_for_it():
    clock = Clock(torch.device("cuda", torch.cuda.current_device()))
    clock.read()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(600):  # more entries than are kept
            clock.enter("computing")
            torch.cuda._sleep(1_000_000)
            clock.enter("chores")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    clock.enter("waiting")
    torch.cuda.synchronize()
    time.sleep(0.3)
    clock.enter("computing")
    spent = clock.read()
    assert spent.computing > 10 * spent.chores
    assert 0.3 <= spent.waiting < 0.4, "an empty queue waits, for the host here"
