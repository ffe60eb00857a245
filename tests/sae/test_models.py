"""Slices of features: which axis they lie on, and how they are replaced."""

import pytest
import torch

from gsae.sae.objective import build


@pytest.mark.parametrize("name", ["relu", "gated"])
def test_every_parameter_but_b_dec_has_one_slice_a_feature(name):
    sae = build(name, 3, 5, seed=0)
    shapes = {key: value.shape for key, value in sae.named_parameters()}
    assert set(sae.FEATURE_AXIS) == set(shapes) - {"b_dec"}
    assert all(shapes[key][axis] == 5 for key, axis in sae.FEATURE_AXIS.items())


@pytest.mark.parametrize("name", ["relu", "gated"])
def test_replaced_features_start_afresh_and_others_stay(name):
    sae = build(name, 3, 5, seed=0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 1.5
    before = {key: value.clone() for key, value in sae.state_dict().items()}
    new = torch.tensor([1, 4])
    encoder, directions, bias = torch.randn(2, 3), torch.randn(2, 3), torch.tensor([-0.5, 0.25])
    sae.replace_features(new, encoder, directions, bias)
    assert torch.equal(sae.encoder[:, new], encoder.T)
    assert torch.equal(sae.W_dec[new], directions)
    if name == "relu":
        assert torch.equal(sae.b_enc[new], bias)
    else:
        assert torch.equal(sae.b_gate[new], bias)
        assert sae.r_mag[new].tolist() == sae.b_mag[new].tolist() == [0, 0]
    for key, axis in sae.FEATURE_AXIS.items():
        kept = torch.tensor([0, 2, 3])
        assert torch.equal(sae.state_dict()[key].index_select(axis, kept), before[key].index_select(axis, kept))
    assert torch.equal(sae.b_dec, before["b_dec"])
