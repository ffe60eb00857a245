"""Products from bfloat16 factors: their error against its bound, alone and through the gradients of every objective."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gsae.sae.objective import SAE_CLASS, build
from gsae.sae.products import affine, product, rounded_factors
from gsae.train.step import TrainingModule

U = 2.0**-8  # bfloat16 has 8 significant bits
D_MODEL, FEATURES, LAMBDA = 16, 24, 0.3


def randn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def entry_bound(left, right):
    """The bound of the module's docstring, with sums of n terms in float32."""
    left, right = left.double(), right.double()
    return (2 * U + U * U + left.shape[1] * 2.0**-24) * (left.abs() @ right.abs()) + 1.01 * U * (left @ right).abs()


@pytest.mark.parametrize("is_transposed", [False, True])
def test_values_and_gradients_are_within_the_bound_of_each_entry(is_transposed):
    left, upstream = randn(40, 30).requires_grad_(), randn(40, 20, seed=2)
    right = (randn(20, 30, seed=1).T if is_transposed else randn(30, 20, seed=1)).requires_grad_()
    with rounded_factors("bfloat16"):
        found = product(left, right)
    d_left, d_right = torch.autograd.grad(found, (left, right), upstream)
    for got, factors in (
        (found, (left, right)),
        (d_left, (upstream, right.T)),
        (d_right, (left.T, upstream)),
    ):
        exact = factors[0].detach().double() @ factors[1].detach().double()
        error = (got.detach().double() - exact).abs()
        assert got.dtype == torch.float32
        assert (error <= entry_bound(*(factor.detach() for factor in factors))).all()
        assert error.max() > 1e-4, "nothing was rounded"
    assert d_right.stride() == right.stride(), "a gradient in another layout than its weight's is copied"


def test_factors_that_bfloat16_holds_give_exact_products():
    """Small whole numbers: sums up to 2^8 are exact in bfloat16 too."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-2, 3, size, generator=generator).float() for size in ((6, 5), (5, 4)))
    bias = torch.tensor([0.1, 1e-3, 1 / 3, 7.77])
    with rounded_factors("bfloat16"):
        assert torch.equal(product(left, right), left @ right)
        assert torch.equal(affine(bias, left, right), bias + left @ right), "the bias is not rounded"


def test_a_factor_that_needs_no_gradient_costs_no_product():
    left, right = randn(4, 5), randn(5, 6).requires_grad_()
    with Products() as products, rounded_factors("bfloat16"):
        product(left, right).sum().backward()
    assert products.types == [torch.bfloat16] * 2


def test_outside_of_the_block_products_are_exact_also_after_an_error():
    left, right = randn(9, 8), randn(8, 7)
    with pytest.raises(ZeroDivisionError), rounded_factors("bfloat16"):
        raise ZeroDivisionError
    assert torch.equal(product(left, right), left @ right)
    assert torch.equal(affine(right[0], left, right), torch.addmm(right[0], left, right))


class Products(TorchDispatchMode):
    """Types of the factors of each product of two matrices, and of all results that are not two matrices' product or its copies."""

    def __init__(self):
        super().__init__()
        self.types = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            if min(*left.shape, right.shape[1]) > 1:
                self.types += [left.dtype]
                assert left.dtype == right.dtype
        elif func not in (torch.ops.aten._to_copy.default, torch.ops.aten.permute.default, torch.ops.aten.detach.default):
            tensors = [value for value in args if isinstance(value, torch.Tensor)]
            assert not any(value.dtype == torch.bfloat16 for value in tensors), f"{func} of bfloat16"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "products"), [("relu", 5), ("gated", 7), ("gated-no-aux", 5), ("gated-norm-weighted", 8)])
def test_all_products_of_a_dense_step_are_in_bfloat16_and_nothing_else_is(name, products):
    sae, x = sae_and_rows(name)
    with Products() as found:
        output = TrainingModule(sae, name, products="bfloat16")(x, LAMBDA)
        output.total.backward()
    assert found.types == [torch.bfloat16] * products
    losses = (output.total, output.losses.reconstruction, output.losses.sparsity, output.losses.auxiliary)
    assert {value.dtype for value in (*losses, *(parameter.grad for parameter in sae.parameters()))} == {torch.float32}


def test_the_pre_activation_loss_takes_bfloat16_products_too():
    sae, x = sae_and_rows("gated")
    module = TrainingModule(sae, "gated", 1.0, "bfloat16")
    module.dead = torch.arange(5)
    with Products() as found:
        module(x, LAMBDA).total.backward()
    assert found.types == [torch.bfloat16] * 9


def sae_and_rows(name):
    """An SAE with nothing at its initial value, and rows of which none is so near a threshold that rounding could carry it over."""
    sae = build(name, D_MODEL, FEATURES, seed=6)
    with torch.no_grad():
        for number, parameter in enumerate(sae.parameters()):
            parameter += 0.2 * randn(*parameter.shape, seed=number)
        sae.gate_bias.sub_(0.5)
    x, exact = randn(2000, D_MODEL, seed=9), build(name, D_MODEL, FEATURES, seed=6, dtype=torch.float64)
    exact.load_state_dict(sae.state_dict())
    a = (x.double() - exact.b_dec) @ exact.encoder
    thresholds = [a + exact.gate_bias] if name == "relu" else [a + exact.b_gate, a + torch.exp(-exact.r_mag) * exact.b_mag]
    is_far = torch.stack([(value.abs() > 1.01 * entry_bound(x - sae.b_dec, sae.encoder)).all(dim=1) for value in thresholds]).all(dim=0)
    x = x[is_far.detach()][:150]
    assert len(x) == 150
    return sae, x


def step_gradients(name, sae, x, lambda_=LAMBDA, products="bfloat16", is_sparse=False):
    module = TrainingModule(sae, name, products=products)
    module.is_sparse = is_sparse
    sae.zero_grad()
    output = module(x, lambda_)
    output.total.backward()
    return output, {key: parameter.grad.double() for key, parameter in sae.named_parameters()}


# A gradient is a chain of up to four products (encode, decode, to the features, to a weight); in each, two factors and on a CPU the
# result are rounded, which changes a matrix by at most U of its Frobenius norm. These 12 errors know nothing of each other: they add up
# in squares. The rows are such that no gate flips, and no gradient here is a small difference of large terms.
GRADIENT_BOUND = 12**0.5 * U


def assert_gradients_near(found, wanted, bound):
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        assert (found[key] - gradient).norm() <= bound * gradient.norm(), key


@pytest.mark.parametrize("name", SAE_CLASS)
def test_gradients_of_the_dense_step_are_as_near_as_bfloat16_allows(name):
    sae, x = sae_and_rows(name)
    output, wanted = step_gradients(name, sae, x, products="float32")
    rounded, found = step_gradients(name, sae, x)
    assert torch.equal(rounded.opened, output.opened)
    assert torch.equal(rounded.fired, output.fired)
    assert_gradients_near(found, wanted, GRADIENT_BOUND)
    assert (found["W_dec"] - wanted["W_dec"]).norm() > U / 10 * wanted["W_dec"].norm(), "nothing was rounded"


@pytest.mark.parametrize("name", SAE_CLASS)
def test_the_sparse_step_stays_exact(name):
    sae, x = sae_and_rows(name)
    wanted = step_gradients(name, sae, x, products="float32")[1]
    assert_gradients_near(step_gradients(name, sae, x, is_sparse=True)[1], wanted, 1e-5)


def test_a_mean_far_from_zero_is_subtracted_before_rows_are_rounded():
    sae, x = sae_and_rows("gated")
    wanted = step_gradients("gated", sae, x, products="float32")[1]
    with torch.no_grad():
        sae.b_dec.add_(256)  # which float32 can still subtract from the rows
    assert_gradients_near(step_gradients("gated", sae, x + 256)[1], wanted, GRADIENT_BOUND)


@pytest.mark.parametrize("is_sparse", [False, True])
def test_stop_gradients_hold(is_sparse):
    sae, x = sae_and_rows("gated")
    module = TrainingModule(sae, "gated", products="bfloat16")
    module.is_sparse = is_sparse
    losses = module(x, LAMBDA).losses
    of_term = {}
    for term in ("reconstruction", "sparsity", "auxiliary"):
        sae.zero_grad()
        getattr(losses, term).backward(retain_graph=True)
        of_term[term] = {key: 0 if value.grad is None else value.grad.clone() for key, value in sae.named_parameters()}
    for frozen, term in (("W_dec", "auxiliary"), ("b_gate", "reconstruction"), ("r_mag", "auxiliary"), ("b_mag", "sparsity")):
        assert torch.as_tensor(of_term[term][frozen]).abs().max() == 0, (frozen, term)
    # All of b_dec's gradient by this term is its encoder side.
    auxiliary = of_term["auxiliary"]
    torch.testing.assert_close(auxiliary["b_dec"], -(sae.W_gate @ auxiliary["b_gate"]).detach(), rtol=1e-4, atol=1e-5)
    assert auxiliary["b_gate"].abs().max() > 0


def test_a_step_sees_the_weights_as_they_are_now():
    sae, x = sae_and_rows("gated")
    module = TrainingModule(sae, "gated", products="bfloat16")
    module(x, LAMBDA).total.backward()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.mul_(0.5)
    assert torch.equal(module(x, LAMBDA).total, TrainingModule(sae, "gated", products="bfloat16")(x, LAMBDA).total)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", SAE_CLASS)
def test_cuda_is_as_near_and_hands_out_sums_in_float32(name):
    left, right = randn(64, 48).cuda(), randn(48, 32, seed=1).cuda()
    with rounded_factors("bfloat16"):
        found = product(left, right)
    exact = (left.bfloat16().double() @ right.bfloat16().double()).float()
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
    sae, x = sae_and_rows(name)
    wanted = step_gradients(name, sae, x, products="float32")[1]
    found = step_gradients(name, sae.cuda(), x.cuda())[1]
    assert_gradients_near({key: value.cpu() for key, value in found.items()}, wanted, GRADIENT_BOUND)
