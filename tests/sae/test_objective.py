"""Every loss term, by the dense and by the sparse step: values and gradients by hand, against the formulas, by finite differences; cost."""

import math
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gsae.sae.gated import GatedSAE
from gsae.sae.objective import SAE_CLASS, UNIT_NORM, Losses, build, objective
from gsae.sae.relu import ReluSAE
from gsae.sae.sparse import sparse_objective

STEPS = {
    "dense": objective,
    "sparse": partial(sparse_objective, in_bfloat16=False),
    "proposed": partial(sparse_objective, in_bfloat16=True),
}
"""By name, what gives the step of an objective: the reference, the sparse step, and the sparse step with entries proposed in bfloat16."""
GATED = ("gated", "gated-no-aux", "gated-norm-weighted")
TERMS = ("reconstruction", "sparsity", "auxiliary")


@pytest.fixture(params=STEPS)
def step_of(request):
    return STEPS[request.param]


def set_parameters(sae, **values):
    with torch.no_grad():
        for name, value in values.items():
            getattr(sae, name).copy_(torch.tensor(value, dtype=torch.float64))
    return sae


def gradients(sae, term):
    """The gradient of one term at every parameter; zeros where the term does not reach it."""
    names = dict(sae.named_parameters())
    if not term.requires_grad:
        return {name: torch.zeros_like(value) for name, value in names.items()}
    found = torch.autograd.grad(term, list(names.values()), retain_graph=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def assert_gradients(sae, term, **expected):
    """All parameters that are not named must have gradient 0."""
    for name, value in gradients(sae, term).items():
        wanted = torch.tensor(expected.get(name, 0.0), dtype=torch.float64).expand_as(value)
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


# Two rows, two features, d_model 2; encoder directions (1, 0) and (0, 1); b_dec = (1, 0).
# Row 1 is x = (3, 2): a = x - b_dec = (2, 2), pi_gate = a + (-1, -3) = (1, -1): feature 0 is on, feature 1 off.
# Row 2 is b_dec: a = 0, all gates closed, x_hat = x: it adds nothing, and every mean over rows is half of row 1's value.
X = torch.tensor([[3.0, 2.0], [1.0, 0.0]], dtype=torch.float64)
# pi_mag = (exp(ln 2) 2 + 1, 2 + 5) = (5, 7), so f = (5, 0).
GATED_VALUES = {
    "W_gate": [[1, 0], [0, 1]],
    "r_mag": [math.log(2), 0],
    "b_mag": [1, 5],
    "b_gate": [-1, -3],
    "W_dec": [[0.6, 0.8], [1, 0]],
    "b_dec": [1, 0],
}


def gated_by_hand():
    return set_parameters(GatedSAE(2, 2, torch.float64), **GATED_VALUES)


def assert_gated_reconstruction(sae, losses):
    # x_hat = 5 (0.6, 0.8) + (1, 0) = (4, 4); x_hat - x = (1, 2), of square 5. dx_hat = 2 (1, 2) = (2, 4).
    # dW_dec[0] = 5 (2, 4); df_0 = (2, 4) . (0.6, 0.8) = 4.4 = db_mag_0; dr_mag_0 = 4.4 * 2 * a_0 = 17.6; da_0 = 4.4 * 2 = 8.8.
    # dW_gate[:, 0] = 8.8 (2, 2); db_dec = (2, 4) - 8.8 (1, 0). b_gate gets nothing: no gradient through the step.
    assert losses.reconstruction.item() == pytest.approx(5 / 2)
    assert_gradients(
        sae,
        losses.reconstruction,
        W_dec=[[5, 10], [0, 0]],
        b_mag=[2.2, 0],
        r_mag=[8.8, 0],
        W_gate=[[8.8, 0], [8.8, 0]],
        b_dec=[-3.4, 2],
    )


def assert_gated_sparsity(sae, losses):
    # relu(pi_gate) = (1, 0), of sum 1. dpi_gate_0 = 1 = db_gate_0 = da_0; dW_gate[:, 0] = (2, 2); db_dec = -(1, 0).
    assert losses.sparsity.item() == pytest.approx(1 / 2)
    assert_gradients(sae, losses.sparsity, b_gate=[0.5, 0], W_gate=[[1, 0], [1, 0]], b_dec=[-0.5, 0])


def test_gated_by_hand(step_of):
    sae = gated_by_hand()
    out = step_of("gated")(sae, X)
    assert out.fired.tolist() == out.opened.tolist() == [1, 0]
    torch.testing.assert_close(out.x_hat, torch.tensor([[4.0, 4.0], [1.0, 0.0]], dtype=torch.float64))
    assert_gated_reconstruction(sae, out.losses)
    assert_gated_sparsity(sae, out.losses)
    # By the gates alone: 1 (0.6, 0.8) + (1, 0) = (1.6, 0.8); less x (-1.4, -1.2), of square 3.4; its gradient h = (-2.8, -2.4).
    # dpi_gate_0 = h . (0.6, 0.8) = -3.6 = db_gate_0; dW_gate[:, 0] = -3.6 (2, 2). W_dec and the decoder's b_dec are frozen,
    # so b_dec has its encoder side alone: 3.6 (1, 0).
    assert out.losses.auxiliary.item() == pytest.approx(3.4 / 2)
    assert_gradients(sae, out.losses.auxiliary, b_gate=[-1.8, 0], W_gate=[[-3.6, 0], [-3.6, 0]], b_dec=[1.8, 0])


def test_gated_no_aux_by_hand(step_of):
    sae = gated_by_hand()
    losses = step_of("gated-no-aux")(sae, X).losses
    assert_gated_reconstruction(sae, losses)
    assert_gated_sparsity(sae, losses)
    assert losses.auxiliary.item() == 0
    assert_gradients(sae, losses.auxiliary)


def test_gated_norm_weighted_by_hand(step_of):
    # As above with a decoder row of norm 2: W_dec[0] = (1.2, 1.6).
    sae = set_parameters(gated_by_hand(), W_dec=[[1.2, 1.6], [1, 0]])
    losses = step_of("gated-norm-weighted")(sae, X).losses
    # x_hat = 5 (1.2, 1.6) + (1, 0) = (7, 8); less x (4, 6), of square 52.
    assert losses.reconstruction.item() == pytest.approx(52 / 2)
    # relu(pi_gate)_0 |W_dec[0]| = 2; dW_dec[0] = 1 (0.6, 0.8); dpi_gate_0 = 2.
    assert losses.sparsity.item() == pytest.approx(2 / 2)
    assert_gradients(sae, losses.sparsity, W_dec=[[0.3, 0.4], [0, 0]], b_gate=[1, 0], W_gate=[[2, 0], [2, 0]], b_dec=[-1, 0])
    # (1.2, 1.6) + (1, 0) - (3, 2) = (-0.8, -0.4), of square 0.8; h = (-1.6, -0.8). dW_dec[0] = h; dpi_gate_0 = h . (1.2, 1.6) = -3.2;
    # db_dec = h + 3.2 (1, 0): nothing is frozen.
    assert losses.auxiliary.item() == pytest.approx(0.8 / 2)
    assert_gradients(
        sae, losses.auxiliary, W_dec=[[-0.8, -0.4], [0, 0]], b_gate=[-1.6, 0], W_gate=[[-3.2, 0], [-3.2, 0]], b_dec=[0.8, -0.4]
    )


def test_relu_by_hand(step_of):
    sae = set_parameters(ReluSAE(2, 2, torch.float64), W_enc=[[1, 0], [0, 1]], b_enc=[-1, -3], W_dec=[[0.6, 0.8], [1, 0]], b_dec=[1, 0])
    out = step_of("relu")(sae, X)
    assert out.fired.tolist() == out.opened.tolist() == [1, 0]
    # f = (1, 0); x_hat = (1.6, 0.8); less x (-1.4, -1.2), of square 3.4; g = (-2.8, -2.4). dW_dec[0] = g; df_0 = g . (0.6, 0.8) = -3.6;
    # dW_enc[:, 0] = -3.6 (2, 2); db_dec = g + 3.6 (1, 0).
    losses = out.losses
    assert losses.reconstruction.item() == pytest.approx(3.4 / 2)
    assert_gradients(
        sae, losses.reconstruction, W_dec=[[-1.4, -1.2], [0, 0]], b_enc=[-1.8, 0], W_enc=[[-3.6, 0], [-3.6, 0]], b_dec=[0.4, -1.2]
    )
    assert losses.sparsity.item() == pytest.approx(1 / 2)
    assert_gradients(sae, losses.sparsity, b_enc=[0.5, 0], W_enc=[[1, 0], [1, 0]], b_dec=[-0.5, 0])
    assert losses.auxiliary.item() == 0


def random_sae(name, d_model=5, num_features=7):
    """An SAE with nothing at its initial value, and rows on which some features are on and some off."""
    sae = build(name, d_model, num_features, seed=3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return sae, torch.randn(11, d_model, generator=generator, dtype=torch.float64)


def naive_losses(name, sae, x):
    """The formulas as the papers write them."""
    centred = x - sae.b_dec
    if name == "relu":
        f = torch.relu(centred @ sae.W_enc + sae.b_enc)
        return Losses(((x - (f @ sae.W_dec + sae.b_dec)) ** 2).sum(1).mean(), f.abs().sum(1).mean(), torch.zeros(()))
    a = centred @ sae.W_gate
    pi_gate = a + sae.b_gate
    f = (pi_gate > 0).double() * torch.relu(torch.exp(sae.r_mag) * a + sae.b_mag)
    g = torch.relu(pi_gate)
    reconstruction = ((x - (f @ sae.W_dec + sae.b_dec)) ** 2).sum(1).mean()
    frozen = ((x - (g @ sae.W_dec.detach() + sae.b_dec.detach())) ** 2).sum(1).mean()
    free = ((x - (g @ sae.W_dec + sae.b_dec)) ** 2).sum(1).mean()
    weights = sae.W_dec.pow(2).sum(1).sqrt()
    return {
        "gated": Losses(reconstruction, g.sum(1).mean(), frozen),
        "gated-no-aux": Losses(reconstruction, g.sum(1).mean(), torch.zeros(())),
        "gated-norm-weighted": Losses(reconstruction, (g * weights).sum(1).mean(), free),
    }[name]


@pytest.mark.parametrize("name", SAE_CLASS)
@pytest.mark.parametrize("term", TERMS)
def test_values_and_gradients_are_those_of_the_formula(step_of, name, term):
    sae, x = random_sae(name)
    found, wanted = getattr(step_of(name)(sae, x).losses, term), getattr(naive_losses(name, sae, x), term)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12, check_dtype=False)
    for parameter, value in gradients(sae, wanted).items():
        torch.testing.assert_close(gradients(sae, found)[parameter], value, rtol=1e-10, atol=1e-12)


def test_the_auxiliary_term_does_not_teach_the_decoder(step_of):
    sae, x = random_sae("gated")
    found = gradients(sae, step_of("gated")(sae, x).losses.auxiliary)
    assert found["W_dec"].abs().max() == 0
    # b_dec's whole gradient is its encoder side, -(sum over rows of da) W_gate; for this term da = dpi_gate, whose sum is db_gate.
    torch.testing.assert_close(found["b_dec"], -(sae.W_gate @ found["b_gate"]))
    assert found["b_gate"].abs().max() > 0


@pytest.mark.parametrize("name", GATED)
def test_gate_and_magnitude_learn_from_their_own_terms(step_of, name):
    sae, x = random_sae(name)
    losses = step_of(name)(sae, x).losses
    assert gradients(sae, losses.reconstruction)["b_gate"].abs().max() == 0
    for term in (losses.sparsity, losses.auxiliary):
        assert gradients(sae, term)["r_mag"].abs().max() == 0
        assert gradients(sae, term)["b_mag"].abs().max() == 0


def test_without_the_auxiliary_term_gates_can_only_close(step_of):
    sae, x = random_sae("gated-no-aux")
    assert gradients(sae, step_of("gated-no-aux")(sae, x).losses.total(0.1))["b_gate"].min() >= 0


@pytest.mark.parametrize("name", SAE_CLASS)
def test_only_the_losses_carry_gradients(step_of, name):
    sae, x = random_sae(name)
    out = step_of(name)(sae, x)
    assert out.losses.total(0.1).requires_grad
    assert not any(value.requires_grad for value in (out.x_hat, out.fired, out.opened))


@pytest.mark.parametrize("name", SAE_CLASS)
def test_the_forward_pass_is_the_models(step_of, name):
    sae, x = random_sae(name)
    out = step_of(name)(sae, x)
    f = sae.encode(x)
    torch.testing.assert_close(out.x_hat, sae(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(out.fired, (f > 0).sum(0))
    assert torch.equal(out.opened, ((f if name == "relu" else sae.pre_activations(x).pi_gate) > 0).sum(0))


def test_lambda_weighs_the_sparsity_term_alone():
    assert Losses(torch.tensor(2.0), torch.tensor(3.0), torch.tensor(5.0)).total(0.1).item() == pytest.approx(7.3)


# What each parameter's gradient can be checked by finite differences for: all terms in which no stop-gradient holds it.
UNFROZEN = {
    "relu": {"W_enc": TERMS, "b_enc": TERMS, "W_dec": TERMS, "b_dec": TERMS},
    "gated": {
        **dict.fromkeys(("W_gate", "r_mag", "b_mag", "b_gate"), TERMS),
        "W_dec": ("reconstruction", "sparsity"),
        "b_dec": ("reconstruction", "sparsity"),
    },
    "gated-no-aux": dict.fromkeys(("W_gate", "r_mag", "b_mag", "b_gate", "W_dec", "b_dec"), TERMS),
    "gated-norm-weighted": dict.fromkeys(("W_gate", "r_mag", "b_mag", "b_gate", "W_dec", "b_dec"), TERMS),
}


class LossesOf(torch.nn.Module):
    """The losses as a module's output, so that a parameter can be exchanged for the leaf that gradcheck moves."""

    def __init__(self, sae, step):
        super().__init__()
        self.sae, self.step = sae, step

    def forward(self, x):
        return self.step(self.sae, x).losses


@pytest.mark.parametrize(("name", "parameter"), [(name, parameter) for name, found in UNFROZEN.items() for parameter in found])
def test_gradients_are_finite_differences(step_of, name, parameter):
    sae, x = random_sae(name)
    module = LossesOf(sae, step_of(name))

    def losses(value):
        found = torch.func.functional_call(module, {f"sae.{parameter}": value}, (x,))
        return tuple(getattr(found, term) for term in UNFROZEN[name][parameter])

    assert torch.autograd.gradcheck(losses, getattr(sae, parameter).detach().clone().requires_grad_())


class ProductCounter(TorchDispatchMode):
    """Counts matrix products of rows x d_model x features, leaving out products with a vector."""

    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            self.products += min(*left.shape, right.shape[1]) > 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "products"), [("relu", 5), ("gated", 7), ("gated-no-aux", 5), ("gated-norm-weighted", 8)])
def test_a_step_needs_few_products(name, products):
    sae, x = random_sae(name)
    with ProductCounter() as counter:
        objective(name)(sae, x).losses.total(0.1).backward()
    assert counter.products == products


@pytest.mark.parametrize("name", SAE_CLASS)
def test_initial_values(name):
    sae = build(name, 8, 32, seed=1, dtype=torch.float64)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32, dtype=torch.float64))
    assert torch.equal(sae.encoder, sae.W_dec.T)
    assert all(value.abs().max() == 0 for key, value in sae.state_dict().items() if not key.startswith("W_"))
    assert (sae.d_model, sae.num_features) == (8, 32)
    assert torch.equal(build(name, 8, 32, seed=1).W_dec, build(name, 8, 32, seed=1).W_dec)
    torch.testing.assert_close(build(name, 8, 32, seed=1).W_dec.double(), sae.W_dec, rtol=0, atol=1e-6)
    assert not torch.equal(build(name, 8, 32, seed=2).W_dec, build(name, 8, 32, seed=1).W_dec)


def test_the_decoder_is_normalised_where_the_objective_says_so():
    assert set(SAE_CLASS) - UNIT_NORM == {"gated-norm-weighted"}
