import math

import pytest
import torch

from gsae.evaluate.density import FiringCounts
from gsae.evaluate.gates import gate_metrics
from gsae.evaluate.reconstruction import reconstruct
from gsae.sae.gated import GatedSAE
from gsae.sae.relu import ReluSAE


def make_gated() -> GatedSAE:
    """Gates open above 0 and 1, magnitudes positive above 2 and 0.5, along the two axes; the second direction is 60 degrees off."""
    sae = GatedSAE(2, 2, torch.float64)
    with torch.no_grad():
        sae.W_gate.copy_(torch.eye(2))
        sae.W_dec.copy_(torch.tensor([[2.0, 0], [math.sin(math.pi / 3), math.cos(math.pi / 3)]]))
        sae.b_gate.copy_(torch.tensor([0.0, -1]))
        sae.b_mag.copy_(torch.tensor([-2.0, -0.5]))
    return sae.requires_grad_(False)


def test_gates_and_magnitudes_by_hand():
    # (3, 0.7): gate 1 open and positive; 2 closed, positive. (1, 2): 1 open, zero; 2 both. (-1, 0): neither. The last row is dropped.
    x = torch.tensor([[3.0, 0.7], [1, 2], [-1, 0], [5, 5]], dtype=torch.float64)
    found = reconstruct(make_gated(), x, 1.0, torch.tensor([True, True, True, False]))
    assert found.gates.tolist() == [3, 3, 2]
    metrics = gate_metrics(FiringCounts(found.firing_counts, torch.zeros(3), found.gates), make_gated())
    assert metrics.gate_open_magnitude_zero_fraction == pytest.approx(1 / 3)
    assert metrics.gate_magnitude_agreement == pytest.approx(2 / 4)
    assert metrics.encoder_decoder_cosine_mean == pytest.approx((1 + 0.5) / 2)
    assert metrics.encoder_decoder_cosine_p10 == pytest.approx(0.55)


def test_a_plain_sae_has_no_gates():
    sae = ReluSAE(2, 2, torch.float64).requires_grad_(False)
    sae.W_enc.copy_(torch.eye(2))
    sae.W_dec.copy_(-torch.eye(2))
    found = reconstruct(sae, torch.ones(3, 2, dtype=torch.float64), 1.0, torch.ones(3, dtype=torch.bool))
    metrics = gate_metrics(FiringCounts(found.firing_counts, torch.zeros(3), found.gates), sae)
    assert (metrics.gate_open_magnitude_zero_fraction, metrics.gate_magnitude_agreement) == (None, None)
    assert metrics.encoder_decoder_cosine_mean == -1
