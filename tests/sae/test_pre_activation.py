"""The pre-activation loss of dead features: value and gradient by hand and by differences; whom it teaches."""

import pytest
import torch

from gsae.sae.gated import GatedSAE
from gsae.sae.objective import build, objective
from gsae.sae.pre_activation import pre_activation_loss
from gsae.sae.relu import ReluSAE
from gsae.train.step import TrainingModule

DEAD = torch.tensor([1, 4, 6])
NAMES = ("relu", "gated")
ENCODER = {"relu": "W_enc", "gated": "W_gate"}
GATE_BIAS = {"relu": "b_enc", "gated": "b_gate"}


def gradients(sae, loss):
    """The gradient at every parameter; zeros where the loss does not reach it."""
    names = dict(sae.named_parameters())
    found = torch.autograd.grad(loss, list(names.values()), retain_graph=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def random_sae(name):
    """Seven features of R^5 with nothing at its initial value, of which DEAD are closed on all rows; rows."""
    sae = build(name, 5, 7, seed=3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        x = torch.randn(11, 5, generator=generator, dtype=torch.float64)
        sae.gate_bias[DEAD] -= 8
        assert not (sae.encode(x)[:, DEAD] > 0).any()
        return sae, x


@pytest.mark.parametrize("kind", [GatedSAE, ReluSAE])
def test_value_and_gradient_by_hand(kind):
    # Two features of R^2 with encoder directions (1, 0) and (0, 1), b_dec = (1, 0); feature 1 is dead.
    sae = kind(2, 2, torch.float64)
    with torch.no_grad():
        sae.encoder.copy_(torch.eye(2))
        sae.gate_bias.copy_(torch.tensor([-1.0, -3.0]))
        sae.b_dec.copy_(torch.tensor([1.0, 0.0]))
    x = torch.tensor([[3.0, 2.0], [1.0, 0.0], [1.0, 4.0]], dtype=torch.float64)
    # x - b_dec = (2, 2), (0, 0), (0, 4): pi_gate = -1, -3, 1, so relu(-pi_gate) = 1, 3, 0, of mean 4/3. At the two closed gates
    # the gradient of pi_gate is -1/3: db_gate = -2/3; dW_gate[:, 1] = -1/3 ((2, 2) + (0, 0)).
    loss = pre_activation_loss(sae, x, torch.tensor([1]))
    assert loss.item() == pytest.approx(4 / 3)
    name = "relu" if kind is ReluSAE else "gated"
    expected = {ENCODER[name]: [[0, -2 / 3], [0, -2 / 3]], GATE_BIAS[name]: [0, -2 / 3]}
    for parameter, value in gradients(sae, loss).items():
        wanted = torch.tensor(expected.get(parameter, 0.0), dtype=torch.float64).expand_as(value)
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12, msg=lambda text, name=parameter: f"{name}: {text}")


class Term(torch.nn.Module):
    """The term as a module's output, so that a parameter can be exchanged for the leaf that gradcheck moves."""

    def __init__(self, sae):
        super().__init__()
        self.sae = sae

    def forward(self, x):
        return pre_activation_loss(self.sae, x, DEAD)


@pytest.mark.parametrize(("name", "parameter"), [(name, key) for name in NAMES for key in (ENCODER[name], GATE_BIAS[name])])
def test_gradients_are_finite_differences(name, parameter):
    sae, x = random_sae(name)

    def loss(value):
        return torch.func.functional_call(Term(sae), {f"sae.{parameter}": value}, (x,))

    assert torch.autograd.gradcheck(loss, getattr(sae, parameter).detach().clone().requires_grad_())


@pytest.mark.parametrize("name", NAMES)
def test_only_dead_features_learn_and_each_does_though_closed_on_all_rows(name):
    sae, x = random_sae(name)
    found = gradients(sae, pre_activation_loss(sae, x, DEAD))
    taught = {parameter: sae.FEATURE_AXIS[parameter] for parameter in (ENCODER[name], GATE_BIAS[name])}
    for parameter, value in found.items():
        if parameter not in taught:
            assert value.abs().max() == 0, parameter
            continue
        reached = value.movedim(taught[parameter], 0).flatten(1).abs().sum(1) if value.dim() > 1 else value.abs()
        assert reached.nonzero().flatten().tolist() == DEAD.tolist(), parameter


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_sparse", [False, True])
def test_the_loss_of_a_step_has_the_term_times_its_weight(name, is_sparse):
    sae, x = random_sae(name)
    module = TrainingModule(sae, name, pre_activation_weight=0.25)
    module.is_sparse, module.dead = is_sparse, DEAD
    out, plain = module(x, 0.1), objective(name)(sae, x).losses.total(0.1)
    term = pre_activation_loss(sae, x, DEAD)
    torch.testing.assert_close(out.pre_activation, term)
    torch.testing.assert_close(out.total, plain + 0.25 * 0.1 * term)
    for parameter, value in gradients(sae, plain + 0.25 * 0.1 * term).items():
        torch.testing.assert_close(gradients(sae, module(x, 0.1).total)[parameter], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_without_dead_features_or_without_weight_has_no_term(name):
    sae, x = random_sae(name)
    plain = objective(name)(sae, x).losses.total(0.1)
    for weight, dead in ((0.25, DEAD[:0]), (0.0, DEAD)):
        module = TrainingModule(sae, name, weight)
        module.dead = dead
        out = module(x, 0.1)
        assert out.pre_activation.item() == 0
        assert torch.equal(out.total, plain)


@pytest.mark.parametrize("name", NAMES)
def test_descent_on_the_term_alone_opens_gates_that_are_closed_on_all_rows(name):
    sae, x = random_sae(name)
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.05, betas=(0.0, 0.999))
    for _ in range(400):
        optimizer.zero_grad()
        pre_activation_loss(sae, x, DEAD).backward()
        optimizer.step()
    pre = (x - sae.b_dec) @ sae.encoder + sae.gate_bias
    assert (pre[:, DEAD] > 0).any(dim=0).all()
