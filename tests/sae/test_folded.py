"""SAEs as users get them: the same function as in training, on raw activations of any shape and type, dense or sparse."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from gsae.sae.folded import FoldedSAE, folded, folded_description, jumprelu_weights
from gsae.sae.objective import SAE_CLASS, build

D_MODEL, FEATURES, SCALE = 6, 40, 0.013


def random_sae(name, dtype=torch.float64, seed=1):
    """An SAE with decoder rows of any norm, gates of both signs, and magnitudes that are 0 behind some open gates."""
    sae = build(name, D_MODEL, FEATURES, seed=0, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.4 * torch.randn(parameter.shape, generator=generator).to(dtype)
    return sae


def raw_rows(*shape, dtype=torch.float64):
    """Activations with norms near 100 and a mean as large as their spread."""
    generator = torch.Generator().manual_seed(2)
    mean = 40 * torch.randn(D_MODEL, generator=generator)
    return (40 * torch.randn(*shape, D_MODEL, generator=generator) + mean).to(dtype)


def folded_sae(name="gated", dtype=torch.float64, **description):
    sae = random_sae(name)
    description = {"objective": name, "scale": SCALE, **description}
    return FoldedSAE(jumprelu_weights(folded(sae, description)), folded_description(description)).to(dtype)


@pytest.mark.parametrize("name", SAE_CLASS)
def test_it_does_on_raw_rows_what_the_trained_sae_does_on_scaled_ones(name):
    sae, user, x = random_sae(name), folded_sae(name), raw_rows(500)
    f = sae.encode(SCALE * x)
    assert 0.02 < (f > 0).double().mean() < 0.9
    torch.testing.assert_close(user(x), sae(SCALE * x) / SCALE, rtol=1e-9, atol=1e-9)
    # x_hat = f W_dec / s: with unit directions a feature is as large as what it adds to x_hat.
    torch.testing.assert_close(user.encode(x), f * sae.W_dec.norm(dim=1) / SCALE, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(user.W_dec.norm(dim=1), torch.ones(FEATURES, dtype=torch.float64))


def test_the_threshold_is_where_the_gate_opens_or_the_magnitude_begins():
    sae = random_sae("gated").requires_grad_(False)
    weights = jumprelu_weights(sae)
    by_hand = [max(0.0, float(m) - float(torch.exp(r)) * float(g)) for m, r, g in zip(sae.b_mag, sae.r_mag, sae.b_gate, strict=True)]
    torch.testing.assert_close(weights.threshold, torch.tensor(by_hand, dtype=torch.float64))
    assert 0 < (weights.threshold > 0).sum() < FEATURES  # both kinds are among them


def test_a_feature_at_its_threshold_is_off():
    user = folded_sae()
    with torch.no_grad():
        user.b_dec.zero_()
        user.b_enc.copy_(user.threshold)
    assert user.encode(torch.zeros(1, D_MODEL, dtype=torch.float64)).count_nonzero() == 0


def test_what_is_folded_already_is_used_as_it_is():
    sae = random_sae("gated")
    used = folded(sae, {"scale": 1.0, "folded": True})
    assert all(torch.equal(value, used.state_dict()[key]) for key, value in sae.state_dict().items())
    once = folded_description({"scale": SCALE})
    assert once == {"scale": 1.0, "training_scale": SCALE, "folded": True}
    assert folded_description(once) == once


@pytest.mark.parametrize("shape", [(), (5,), (3, 5), (2, 3, 5), (0,), (3, 0)])
def test_any_leading_shape(shape):
    user, x = folded_sae(), raw_rows(*shape)
    f = user.encode(x)
    assert f.shape == (*shape, FEATURES)
    assert user(x).shape == x.shape
    flat = user.encode(x.reshape(-1, D_MODEL))
    torch.testing.assert_close(f.reshape(-1, FEATURES), flat)
    sparse = user.encode(x, sparse=True)
    assert sparse.shape == f.shape
    torch.testing.assert_close(sparse.to_dense(), f)
    torch.testing.assert_close(user.decode(sparse), user.decode(f))


def test_sparse_features_are_the_active_ones_with_their_places():
    user, x = folded_sae(), raw_rows(4, 7)
    f, sparse = user.encode(x), user.encode(x, sparse=True)
    assert sparse.is_coalesced()
    assert sparse._nnz() == (f > 0).sum() < f.numel()
    assert (sparse.values() > 0).all()
    context, position, feature = sparse.indices()
    assert torch.equal(sparse.values(), f[context, position, feature])


@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_features_of_other_makes_are_decoded_too():
    user = folded_sae()
    f = user.encode(raw_rows(9))
    torch.testing.assert_close(user.decode(f.to_sparse_csr()), user.decode(f))
    twice = torch.sparse_coo_tensor(torch.tensor([[1, 1], [3, 3]]), torch.tensor([2.0, 3.0], dtype=torch.float64), (2, FEATURES))
    torch.testing.assert_close(user.decode(twice), torch.stack([user.b_dec, user.b_dec + 5 * user.W_dec[3]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_it_computes_in_its_own_type_and_gives_back_that_of_x(dtype):
    user, x = folded_sae(dtype=torch.float32), raw_rows(3, 8, dtype=dtype)
    assert user.encode(x).dtype == torch.float32
    assert user.encode(x, sparse=True).dtype == torch.float32
    assert user(x).dtype == dtype
    torch.testing.assert_close(user.encode(x), user.encode(x.float()), rtol=0, atol=0)
    torch.testing.assert_close(user(x), user(x.float()).to(dtype), rtol=0, atol=0)


def test_gradients_pass_to_x_and_not_to_the_weights():
    user, x = folded_sae(), raw_rows(5).requires_grad_()
    dense = torch.autograd.grad(user(x).square().sum(), x)[0]
    sparse = torch.autograd.grad(user.decode(user.encode(x, sparse=True)).square().sum(), x)[0]
    torch.testing.assert_close(dense, sparse)
    step = torch.zeros_like(x)
    step[2, 1] = 1e-6
    by_hand = (user(x + step).square().sum() - user(x - step).square().sum()) / 2e-6
    torch.testing.assert_close(dense[2, 1], by_hand, rtol=1e-5, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in user.parameters())


def test_a_wrong_last_axis_is_named():
    user = folded_sae()
    with pytest.raises(ValueError, match=r"x has shape \(3, 7\); its last axis must be d_model, 6"):
        user.encode(torch.zeros(3, 7))
    with pytest.raises(ValueError, match=r"f has shape \(3, 6\); its last axis must be the number of features, 40"):
        user.decode(torch.zeros(3, 6))


@pytest.mark.parametrize("name", SAE_CLASS)
def test_safetensors_saves_it(tmp_path, name):
    user = folded_sae(name)
    save_file(user.state_dict(), tmp_path / "folded.safetensors")
    assert all(torch.equal(value, user.state_dict()[key]) for key, value in load_file(tmp_path / "folded.safetensors").items())


def test_the_repr_says_what_it_is():
    user = folded_sae(site="resid.15", llm={"name": "SmolLM2"})
    assert repr(user) == "FoldedSAE(resid.15 of SmolLM2, gated, d_model=6, num_features=40, dtype=torch.float64)"
    assert repr(copy.deepcopy(folded_sae("relu"))) == "FoldedSAE(relu, d_model=6, num_features=40, dtype=torch.float64)"
